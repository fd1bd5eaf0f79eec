"""The bug of FIREWHEEL's debugging tutorial, fixed twice in a real VM: from inside the guest, and from the host alone.

What is printed is what was typed and what it wrote, but for colours and progress bars. README shows it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "packaging")]

from demo_story import experiment  # noqa: E402

from tests.vm.console import Console  # noqa: E402
from tests.vm.product import product_files  # noqa: E402
from tests.vm.vm import AGENT_PORT, Vm, ensure_snapshot  # noqa: E402

LIMIT = 180.0  # s; a VM without KVM is slow
_COLOURS = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")
_BAR = "━"
SED = "sed -i 's/^import tarfile/import os, tarfile/'"


class Scene:
    """A fresh VM in which the tutorial's experiment has run and failed, and its host."""

    def __init__(self, image: Path, work: Path) -> None:
        self.work = work
        self._vm = Vm(image, files={**product_files(), "/etc/vmr-agent.conf": b"[vmr-agent]\nquiet = 1\n"})
        self._vm.__enter__()
        self._vm.check("touch /var/launch/.hold")
        self._vm.put({f"var/launch/{path}": data for path, data in experiment("", "/var/launch").items()})
        self._vm.check("chmod +x /var/launch/*/*/*.py /var/launch/*/*/call_arguments.sh")
        self._environment = {**os.environ, "VMR_HOST_CONTROL": str(work / "control"), "COLUMNS": "100"}
        source = f"Server={self._vm.port_socket(AGENT_PORT)}"
        with (work / "collector.log").open("wb") as log:
            self._collector = subprocess.Popen(
                ["vmr-host", "collect", "--log-dir", "vm_resource_logs", source, "--expect", "1"]
                + ["--start-buffer", "0"],
                cwd=work,
                env=self._environment,
                stderr=log,
            )
        # As FIREWHEEL names a VM's host; what the guest says to pull is said with this name.
        self._vm.check("hostname Server; systemctl start vmr-agent; rm /var/launch/.hold")
        self.until("the web server of time 1 has said something", lambda: "Serving HTTP" in self.log())
        self.console = Console(self._vm, columns=120)

    def close(self) -> None:
        self._collector.terminate()
        self._collector.wait()
        self._vm.__exit__(None, None, None)

    def log(self) -> str:
        path = self.work / "vm_resource_logs/Server.log"
        return path.read_text() if path.exists() else ""

    def until(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not holds():
            if self._collector.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"record-sessions: gave up waiting until {what}")
            time.sleep(0.1)

    def guest(self, line: str) -> None:
        print(f"guest# {line}")
        print(_COLOURS.sub("", self.console.type(line, LIMIT)[1]), end="", flush=True)

    def host(self, line: str) -> None:
        """By a shell on a terminal, as the verbs have more to say to one; progress bars are left out."""
        print(f"host$ {line}")
        typed = ["script", "-qec", line, "/dev/null"] if shutil.which("script") else ["sh", "-c", line]
        done = subprocess.run(
            typed, cwd=self.work, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        text = done.stdout.decode(errors="backslashreplace").replace("\r\n", "\n")
        for shown in text.splitlines():
            plain = _COLOURS.sub("", shown)
            if _BAR not in shown and (plain or not shown):
                print(plain, flush=True)


def from_the_guest(scene: Scene) -> None:
    scene.guest("vmr-agent status")
    scene.guest("vmr-agent logs -4/compress.py")
    scene.guest(f"{SED} /var/launch/-4/compress.py/compress.py")
    seen = len(scene.log())
    scene.guest("vmr-agent rerun -4/compress.py")
    scene.guest("vmr-agent rerun -3/tar")
    scene.guest("vmr-agent rerun -2/head | od -A d -t x1z | head -n 1")
    scene.guest("vmr-agent diff -4/compress.py")
    scene.guest("vmr-agent status")
    scene.until("the host has logged it", lambda: scene.log()[seen:].count("exited after") == 3)
    scene.host("tail -n 8 vm_resource_logs/Server.log | cut -c -100")


def from_the_host(scene: Scene) -> None:
    scene.host("vmr-host mix")
    scene.host("vmr-host list Server")
    scene.host("vmr-host logs Server -4/compress.py")
    scene.host("vmr-host pull -4/compress.py/compress.py Server vm_resources/compress.py")
    scene.host(f"{SED} vm_resources/compress.py")
    scene.host("vmr-host push vm_resources/compress.py Server -4/compress.py/compress.py")
    scene.host("vmr-host rerun Server -4/compress.py && vmr-host rerun Server -3/tar")
    scene.host("vmr-host rerun Server -2/head > head.bin; od -A d -t x1z head.bin | head -n 1")
    scene.host("vmr-host list Server")
    scene.host("head -n 2 vm_resources/compress.py")


def main() -> None:
    built = subprocess.run([ROOT / "packaging" / "vm-image"], stdout=subprocess.PIPE, text=True)
    if built.returncode:
        raise SystemExit(built.returncode)
    image = Path(built.stdout.strip())
    ensure_snapshot(image)
    for title, session in (("from inside the guest", from_the_guest), ("from the host alone", from_the_host)):
        with tempfile.TemporaryDirectory(prefix="vmr-record-") as work:
            (Path(work) / "vm_resources").mkdir()
            scene = Scene(image, Path(work))
            try:
                print(f"== {title}", flush=True)
                session(scene)
            finally:
                scene.close()


if __name__ == "__main__":
    main()
