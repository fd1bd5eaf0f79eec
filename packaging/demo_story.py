"""The story of FIREWHEEL's debugging tutorial, end to end: a VMR fails, is repaired where it lies, and runs again.

Here: guest and host are processes of this machine, and a socket stands in for the port. With --vm the guest is a
Debian VM under QEMU. Every line shown is real output of the commands above it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parent.parent
BOLD, DIM, OFF = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
LIMIT = 180.0  # s; generous: a VM without KVM is slow

COMPRESS = """\
#!/usr/bin/env python3
import tarfile

filename = "{root}/opt/file.txt"

# Place the new tarfile in {root}/tmp/out.tgz
with tarfile.open("{root}/tmp/out.tgz", "w:gz") as tar:
    tar.add(filename, arcname=os.path.basename(filename))
"""


def vmr(start_time: str, name: str, command: str, files: Mapping[str, bytes] = {}) -> dict[str, bytes]:
    """One VMR's files, the script in FIREWHEEL's form and last, since its x bit is the commit."""
    where = f"{start_time}/{name}"
    script = f'#!/bin/bash\nCURRENT_DIR="$(dirname "$0")"\ncd {{launch}}/{where}\n{command}\n'
    return {
        **{f"{where}/{each}": data for each, data in files.items()},
        f"{where}/call_arguments.sh": script.encode(),
    }


def experiment(root: str, launch: str) -> dict[str, bytes]:
    """The tutorial's VMRs: path below the launch directory → content."""
    noise = bytearray(os.urandom(64 * 1024))
    noise[0] = 0xEF  # never valid UTF-8: the byte that cost FIREWHEEL the record
    staged: dict[str, bytes] = {}
    staged.update(vmr("-5", "drop_file", f"cp file.txt {root}/opt/file.txt", {"file.txt": bytes(noise)}))
    staged.update(
        vmr(
            "-4",
            "compress.py",
            "{launch}/-4/compress.py/compress.py",
            {"compress.py": COMPRESS.format(root=root).encode()},
        )
    )
    staged.update(vmr("-3", "tar", f"tar -C {root}/tmp -xvzf {root}/tmp/out.tgz"))
    staged.update(vmr("-2", "head", f"head {root}/tmp/file.txt"))
    serve = f"-c 'pushd {root}/opt; python3 -u -m http.server --bind 127.0.0.1 0; popd'"
    staged.update(vmr("1", "bash", f"bash {serve}"))
    return {path: data.replace(b"{launch}", launch.encode()) for path, data in staged.items()}


def title(text: str) -> None:
    print(f"\n{BOLD}== {text}{OFF}", flush=True)


started: list[tuple[subprocess.Popen[bytes], Path]] = []
"""The processes that must live for the story to go on, and their logs."""


def start(command: list[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stderr=file)
    started.append((process, log))
    return process


def until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not holds():
        for process, log in started:
            if process.poll() is not None:
                raise SystemExit(f"demo: {process.args[0]} ended; its last words:\n{log.read_text()[-2000:]}")
        if time.monotonic() > deadline:
            raise SystemExit(f"demo: gave up waiting until {what}")
        time.sleep(0.1)


class LocalGuest:
    """The guest as processes of this machine, below one directory."""

    def __init__(self, work: Path) -> None:
        self.root = str(work / "guest")
        self.launch = f"{self.root}/var/launch"
        self.port = work / "port"
        self._daemon: Optional[subprocess.Popen[bytes]] = None
        for each in ("opt", "tmp", "run", "state"):
            (Path(self.root) / each).mkdir(parents=True)
        config = Path(self.root) / "vmr-agent.conf"
        config.write_text("[vmr-agent]\nquiet = 1\n")
        self._environment = {
            **os.environ,
            "VMR_AGENT_CONFIG": str(config),
            "VMR_AGENT_LAUNCH_DIR": self.launch,
            "VMR_AGENT_STATE_DIR": f"{self.root}/state",
            "VMR_AGENT_RUNTIME_DIR": f"{self.root}/run",
            "VMR_AGENT_PORT": f"unix:{self.port}",
        }

    def source(self) -> list[str]:
        return ["--listen", f"Server={self.port}"]

    def stage(self, staged: Mapping[str, bytes]) -> None:
        for path, data in staged.items():
            target = Path(self.launch) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            if path.endswith((".py", "call_arguments.sh")):
                target.chmod(0o755)

    def start(self) -> None:
        self._daemon = start(["vmr-agent", "run"], Path(self.root) / "daemon.log", self._environment)

    def sh(self, command: str) -> tuple[int, bytes]:
        done = subprocess.run(
            ["sh", "-c", command], env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return done.returncode, done.stdout

    def close(self) -> None:
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait()


class VmGuest:
    """The guest as a Debian VM with systemd under QEMU."""

    root = ""
    launch = "/var/launch"

    def __init__(self, work: Path) -> None:
        sys.path.insert(0, str(ROOT))
        from tests.vm.product import product_files
        from tests.vm.vm import Vm, ensure_snapshot

        built = subprocess.run([ROOT / "packaging" / "vm-image"], stdout=subprocess.PIPE, text=True)
        if built.returncode:
            raise SystemExit(built.returncode)
        image = Path(built.stdout.strip())
        ensure_snapshot(image)
        self._vm = Vm(image, files=product_files())
        self._vm.__enter__()

    def source(self) -> list[str]:
        return [f"Server={self._vm.port_socket('org.vmr_agent.0')}"]

    def stage(self, staged: Mapping[str, bytes]) -> None:
        self._vm.check("mkdir -p /var/launch && touch /var/launch/.hold")
        self._vm.put({f"var/launch/{path}": data for path, data in staged.items()})
        self._vm.check("chmod +x /var/launch/*/*/*.py /var/launch/*/*/call_arguments.sh")

    def start(self) -> None:
        self._vm.check("systemctl daemon-reload; systemctl start vmr-agent; rm /var/launch/.hold")

    def sh(self, command: str) -> tuple[int, bytes]:
        return self._vm.run(command)

    def close(self) -> None:
        self._vm.__exit__(None, None, None)


class Host:
    """The collector and what it writes."""

    def __init__(self, work: Path, source: list[str]) -> None:
        self.logs = work / "logs"
        self._control = work / "control"
        self.command = (
            f"vmr-host collect --log-dir {self.logs} --expect 1 --start-buffer 2 {' '.join(source)}"
        )
        self._collector = start(
            [*self.command.split(), "--control", str(self._control)], work / "collector.log", os.environ
        )

    def log(self) -> str:
        path = self.logs / "Server.log"
        return path.read_text() if path.exists() else ""

    def close(self) -> None:
        self._collector.terminate()
        self._collector.wait()


def show_log(host: Host, already: int = 0) -> int:
    """The host's log from a position on, long lines cut; the new position."""
    text = host.log()
    for line in text[already:].splitlines():
        print(line if len(line) <= 168 else f"{line[:140]}{DIM} ... {len(line):,} characters{OFF}")
    return len(text)


def story(guest: object, host: Host) -> None:
    assert isinstance(guest, (LocalGuest, VmGuest))

    def type_in_guest(command: str, *, shown: Optional[str] = None) -> bytes:
        print(f"{BOLD}guest#{OFF} {shown or command}", flush=True)
        code, output = guest.sh(command)
        sys.stdout.flush()
        sys.stdout.buffer.write(output)
        sys.stdout.buffer.flush()
        if code:
            print(f"{DIM}(exit code {code}){OFF}")
        return output

    title(
        "The experiment is staged, and runs: -5 drop_file, -4 compress.py, -3 tar, -2 head, 1 bash (a web server)"
    )
    print(f"{BOLD}host${OFF} {host.command}")
    until("the web server of time 1 has said something", lambda: "Serving HTTP" in host.log())
    title("What the host's Server.log says: compress.py failed, and with it what builds on it")
    seen = show_log(host)

    title("Repaired where it lies, in the guest, and run again in place")
    compress = f"{guest.launch}/-4/compress.py/compress.py"
    type_in_guest(f"sed -i 's/^import tarfile/import os\\nimport tarfile/' {compress}")
    for name in ("-4/compress.py", "-3/tar"):
        type_in_guest(f"vmr-agent rerun {name}")
    type_in_guest("vmr-agent rerun -2/head | od -A d -t x1z | head -n 3")
    print()
    type_in_guest("vmr-agent status")

    title("The host saw the second attempts; where FIREWHEEL had a UnicodeDecodeError there are bytes")
    second = "Server/-2/head/2"
    until(
        "the second attempt of head is on the host",
        lambda: (
            (host.logs / second / "result.json").exists()
            and '"complete": true' in (host.logs / second / "result.json").read_text()
        ),
    )
    until("its exit is in the log", lambda: host.log()[seen:].count("exited after") >= 3)
    show_log(host, seen)
    raw = (host.logs / second / "stdout").read_bytes()
    _, expected = guest.sh(f"head {guest.root}/opt/file.txt | sha256sum")
    import hashlib

    digest = hashlib.sha256(raw).hexdigest()
    same = "the same" if expected.split()[0].decode() == digest else "NOT THE SAME"
    print(f"\n{len(raw):,} bytes of -2/head on the host, sha256 {digest[:16]}…, {same} as in the guest")
    if same != "the same":
        raise SystemExit(1)
    guest.sh("vmr-agent kill 1/bash")
    until("the web server's end is on the host", lambda: "SIGTERM" in host.log())


def main() -> None:
    arguments = argparse.ArgumentParser(prog="demo", description=__doc__)
    arguments.add_argument("--vm", action="store_true", help="the guest is a real VM under QEMU")
    arguments.add_argument("--log-dir", type=Path, metavar="DIR", help="where to leave the logs")
    args = arguments.parse_args()
    began = time.monotonic()
    # Short: a socket's path has room for 107 characters.
    work = Path(tempfile.mkdtemp(prefix="vmr-demo-"))
    guest: Optional[object] = None
    host: Optional[Host] = None
    try:
        if args.vm:
            print(
                "starting a Debian VM under QEMU (the first time its image is built: some minutes) ...",
                flush=True,
            )
            guest = VmGuest(work)
        else:
            guest = LocalGuest(work)
        guest.stage(experiment(guest.root, guest.launch))
        host = Host(work, guest.source())
        guest.start()
        story(guest, host)
    finally:
        if guest is not None:
            guest.close()  # type: ignore[attr-defined]
        if host is not None:
            host.close()
    logs = work / "logs"
    if args.log_dir:
        shutil.copytree(logs, args.log_dir, dirs_exist_ok=True)
        shutil.rmtree(work)
        logs = args.log_dir
    title(f"Done in {time.monotonic() - began:.0f} s. The host's logs are left for you to look at:")
    files = sorted(each.relative_to(logs) for each in logs.rglob("*") if each.is_file())
    print(logs)
    for each in files:
        if not any(part.startswith(".") for part in each.parts):
            print(f"  {each}  {DIM}{(logs / each).stat().st_size:,} bytes{OFF}")


if __name__ == "__main__":
    main()
