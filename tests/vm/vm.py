"""A real VM for tests: QEMU without a display, a Debian guest, virtio-serial ports as sockets on the host.

    with Vm(image, files={"/usr/bin/hello": b"#!/bin/sh\\necho hello\\n"}) as vm:
        code, output = vm.run("hello")

``image`` is the directory that packaging/vm-image prints. A VM starts from a snapshot taken after boot (made
once per image and QEMU command line, kept beside the image) or, with ``cold=True``, by booting. Its disk is a
throw-away overlay unless ``disk=`` names one. QEMU never outlives the test.

VMs from one snapshot have the same machine id and the same boot id; clock and random numbers are their own.

This file knows QEMU and the guest's command server (guest_shell.py), and nothing of the product: product.py
does. One thread at a time may use a Vm. It is one module because all of it is the life of one QEMU process.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import io
import json
import os
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Callable, Optional, Union

QEMU = "qemu-system-x86_64"
QGA_PORT = "org.qemu.guest_agent.0"
AGENT_PORT = "org.vmr_agent.0"
BENCH_PORT = "org.vmr_agent.bench.0"
PORTS = (QGA_PORT, AGENT_PORT, BENCH_PORT)

# Emulated CPUs are slow and the machine may be busy: limits are there to end a hang, not to measure.
START_LIMIT = 60.0
BOOT_LIMIT = 300.0
RUN_LIMIT = 120.0
UNUSED_LIMIT = 4 * 3600.0  # longer than any run of the tests

# Fixed, because a guest restored from a snapshot knows the size of its disks already. The file is sparse.
FILES_SIZE = 64 << 20

# Drivers of what is not there, and the ciphers' tests of themselves, would be a tenth of each boot.
_KERNEL = (
    "root=/dev/vda rw console=ttyS0 loglevel=4 random.trust_cpu=on mitigations=off cryptomgr.notests"
    " module_blacklist=powernow_k8,ata_piix,ata_generic"
)

Files = Union[Mapping[str, bytes], Path]


class VmError(Exception):
    """The VM or its guest did not do what was asked; the message ends with the tail of its console."""


class Vm:
    """One running VM. All paths of its sockets lie in ``directory``, which goes with it."""

    def __init__(
        self,
        image: Path,
        *,
        files: Optional[Files] = None,
        cold: bool = False,
        disk: Optional[Path] = None,
        through: Callable[[Path], str] = os.fspath,
        ports: Sequence[str] = PORTS,
        snapshot: Optional[Path] = None,
    ) -> None:
        """``files`` are put in before the first command (see ``put``).

        ``snapshot``, of ``ensure_snapshot`` for the same ports, is what it starts from instead of the plain one.

        ``disk`` is made if it is missing and stays afterwards, as after a power cut; a VM on a disk that is
        there already always boots cold, since a snapshot's memory fits only the snapshot's disk.
        ``through`` is told where it is, and says what QEMU is to open instead.
        """
        self.image = image
        self.ports = tuple(ports)
        self.boot_id = ""
        self.cold = cold or (disk is not None and disk.exists())
        self._files = files
        self._disk = disk
        self._through = through
        self._snapshot = snapshot
        self._request = 0
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._qmp: Optional[_JsonLines] = None
        self._shell: Optional[_JsonLines] = None
        self._qga: Optional[_JsonLines] = None
        self.events: list[dict[str, Any]] = []
        """QMP events seen so far, oldest first; ``qmp`` and ``wait_event`` add to it."""

    # -- life ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Vm:
        # Short, since a socket's path has at most 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._end()

    def _start(self) -> None:
        base, incoming = self.image / "image.qcow2", None
        if not self.cold:
            snapshot = self._snapshot or ensure_snapshot(self.image, ports=self.ports)
            base, incoming = snapshot / "disk.qcow2", snapshot / "state"
        if self._disk is None:
            self._disk = self.directory / "disk.qcow2"
        if not self._disk.exists():
            backing = os.fspath(base.resolve())
            _qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", backing, os.fspath(self._disk))
        self._write_files(self._files or {})
        command = [QEMU, *_arguments(self.image, self.directory, self._through(self._disk), self.ports)]
        if incoming is not None:
            command += ["-incoming", f"exec:exec cat {shlex.quote(os.fspath(incoming))}"]
        with (self.directory / "qemu.log").open("wb") as log:
            self._process = _spawn(command, log)
        self._qmp = self._connect("qmp", START_LIMIT)
        self._receive(self._qmp, START_LIMIT, "QMP's greeting")
        self.qmp("qmp_capabilities")
        deadline = time.monotonic() + START_LIMIT
        while self.qmp("query-status")["status"] == "inmigrate":
            if time.monotonic() > deadline:
                raise self._error("the snapshot was not loaded")
            time.sleep(0.02)
        self.qmp("cont")  # a snapshot is of a paused VM
        self._shell = self._connect("shell", START_LIMIT)
        self._reach_guest(BOOT_LIMIT, settle=True)
        if self._files:
            self._unpack("/", RUN_LIMIT)

    def _end(self) -> None:
        self.kill()
        for lines in (self._qmp, self._shell, self._qga):
            if lines is not None:
                lines.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def kill(self) -> None:
        """The power cut: QEMU gets SIGKILL. What the guest has not flushed to its disk may be lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def quit(self) -> None:
        """End QEMU in order: its disk file is whole, though the guest has not been asked."""
        assert self._process is not None
        self.qmp("quit")
        self._process.wait(START_LIMIT)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def reset(self) -> None:
        """The reset button; returns when the guest has booted again and answers."""
        self.qmp("system_reset")
        self.wait_reboot()

    def wait_reboot(self, timeout: float = BOOT_LIMIT) -> None:
        """Wait until the guest answers from another boot than the last one heard of."""
        self._reach_guest(timeout, settle=True, not_boot=self.boot_id)

    def pause(self) -> None:
        self.qmp("stop")

    def resume(self) -> None:
        self.qmp("cont")

    def save(self, tag: str) -> None:
        """Keep the whole VM, memory and disk, under ``tag`` in its disk file, for ``restore``."""
        self._monitor(f"savevm {tag}")

    def restore(self, tag: str) -> None:
        """Time travel: the VM is again what it was at ``save``, with its old clock and old random numbers.

        QEMU's sockets stay connected.
        """
        self._monitor(f"loadvm {tag}")
        self._reach_guest(START_LIMIT, settle=False)

    # -- commands and files ----------------------------------------------------------------------------------

    def run(self, command: str, timeout: float = RUN_LIMIT) -> tuple[int, bytes]:
        """Run ``command`` by ``bash -c`` as root; its exit code (or minus the signal), and all it wrote.

        stdout and stderr come as one. It returns at the command's exit; what the command leaves running in
        the background must have its output redirected, or gets SIGPIPE at its next write. At ``timeout`` the
        command's process group is killed and VmError raised; the VM stays usable.
        """
        reply = self._ask({"command": command, "timeout": timeout}, timeout + 60, f"the end of {command!r}")
        output = base64.b64decode(reply["output"])
        if reply["timed_out"]:
            raise self._error(f"killed after {timeout:g} s: {command!r}; it wrote {output[-2000:]!r}")
        return int(reply["code"]), output

    def start(self, command: str) -> None:
        """Have ``command`` run and do not wait: one that reboots the guest has no end to wait for."""
        assert self._shell is not None
        self._shell.send({"id": -1, "command": command, "timeout": RUN_LIMIT})

    def check(self, command: str, timeout: float = RUN_LIMIT) -> bytes:
        """``run`` for commands that must succeed; only the output."""
        code, output = self.run(command, timeout)
        if code != 0:
            text = output[-4000:].decode(errors="replace")
            raise self._error(f"exit code {code}: {command!r}; it wrote: {text}")
        return output

    def put(self, files: Files, dest: str = "/", timeout: float = RUN_LIMIT) -> None:
        """Put files below ``dest``: names and contents (executable if they begin with ``#!``), or a tree.

        They go in as a tar on a small disk, so size hardly matters (up to 60 MiB). Owner is root.
        """
        self._write_files(files)
        self._unpack(dest, timeout)

    def _write_files(self, files: Files) -> None:
        archive = _tar(files)
        if len(archive) > FILES_SIZE:
            raise ValueError(f"cannot put {len(archive)} bytes at once")
        # In place: QEMU has this very file open.
        with os.fdopen(os.open(self.directory / "files", os.O_RDWR | os.O_CREAT, 0o600), "r+b") as disk:
            disk.write(archive)
            disk.truncate(FILES_SIZE)

    def _unpack(self, dest: str, timeout: float) -> None:
        # A guest believes that a disk changes only by its own writes: make it forget what it has read before.
        where = shlex.quote(dest)
        self.check(
            f"mkdir -p {where} && blockdev --flushbufs /dev/vdb && tar -xpf /dev/vdb -C {where}", timeout
        )

    # -- the guest agent, QMP, ports -------------------------------------------------------------------------

    def qmp(self, command: str, **arguments: Any) -> Any:
        """One QMP command; what it returns."""
        assert self._qmp is not None
        self._qmp.send({"execute": command, "arguments": arguments})
        while True:
            message = self._receive(self._qmp, START_LIMIT, f"the answer to QMP {command}")
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise self._error(f"QMP {command}: {message['error']['desc']}")
            elif "return" in message:
                return message["return"]

    def wait_event(self, name: str, timeout: float = START_LIMIT, **data: Any) -> dict[str, Any]:
        """Take the first QMP event ``name`` whose data include ``data`` out of ``events``, or wait for it."""
        assert self._qmp is not None
        deadline = time.monotonic() + timeout
        while True:
            for event in self.events:
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    self.events.remove(event)
                    return event
            message = self._receive(self._qmp, deadline - time.monotonic(), f"the QMP event {name}")
            if "event" in message:
                self.events.append(message)

    def qga(self, command: str, timeout: float = START_LIMIT, **arguments: Any) -> Any:
        """One command to the QEMU guest agent; what it returns."""
        if self._qga is None:
            self._qga = self._connect(QGA_PORT, START_LIMIT)
        # Whatever an earlier conversation, or boot, left in the channel ends at the answer to this.
        token = secrets.randbits(31)
        self._qga.send({"execute": "guest-sync-delimited", "arguments": {"id": token}}, before=b"\xff")
        deadline = time.monotonic() + timeout
        what = f"the guest agent's answer to {command}"
        while self._receive(self._qga, deadline - time.monotonic(), what).get("return") != token:
            pass
        self._qga.send({"execute": command, "arguments": arguments})
        message = self._receive(self._qga, deadline - time.monotonic(), what)
        if "error" in message:
            raise self._error(f"guest agent, {command}: {message['error']['desc']}")
        return message["return"]

    def port_socket(self, name: str = AGENT_PORT) -> Path:
        """The host's end of a port: the path of a listening unix socket that serves one client at a time."""
        return self.directory / name

    def connect(self, name: str = AGENT_PORT, timeout: float = START_LIMIT) -> socket.socket:
        """A connection to a port's socket."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(timeout)
        client.connect(os.fspath(self.port_socket(name)))
        return client

    def port_add(self, name: str) -> None:
        """Plug in a port; its socket is there when this returns, the guest's device soon after."""
        if name not in {device["label"] for device in self.qmp("query-chardev")}:
            address = {"type": "unix", "data": {"path": os.fspath(self.port_socket(name))}}
            backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
            self.qmp("chardev-add", id=name, backend=backend)
        port = {"driver": "virtserialport", "bus": "serial.0", "id": f"port-{name}", "chardev": name}
        self.qmp("device_add", name=name, **port)

    def port_del(self, name: str) -> None:
        """Unplug a port; its socket stays and serves nobody until ``port_add``."""
        self.qmp("device_del", id=f"port-{name}")
        self.wait_event("DEVICE_DELETED", device=f"port-{name}")

    def _monitor(self, line: str) -> None:
        complaint = self.qmp("human-monitor-command", **{"command-line": line})
        if complaint:
            raise self._error(f"QEMU, {line}: {complaint.strip()}")

    # -- talking ---------------------------------------------------------------------------------------------

    def console(self) -> str:
        """All that the guest has written to its console, kernel and boot messages above all."""
        try:
            return (self.directory / "console.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _ask(self, request: dict[str, Any], timeout: float, what: str) -> dict[str, Any]:
        assert self._shell is not None
        self._request += 1
        self._shell.send({"id": self._request, **request})
        deadline = time.monotonic() + timeout
        while True:
            reply = self._receive(self._shell, deadline - time.monotonic(), what)
            if reply.get("id") == self._request:
                self.boot_id = reply["boot"]
                return reply

    def _reach_guest(self, timeout: float, *, settle: bool, not_boot: str = "") -> None:
        """Knock until the guest's command server answers; nobody listens to what is sent during boot.

        ``settle``: give the guest the right time and random numbers of its own.
        """
        assert self._shell is not None
        deadline = time.monotonic() + timeout
        while True:
            self._request += 1
            try:
                self._shell.send({"id": self._request}, before=b"\n")
                reply = self._shell.receive(min(1.0, max(0.0, deadline - time.monotonic())))
            except TimeoutError:
                reply = {}
            except (EOFError, ConnectionError):
                raise self._error("QEMU ended") from None
            if reply.get("boot", not_boot) != not_boot:
                break
            if time.monotonic() > deadline:
                raise self._error(f"the guest did not answer within {timeout:g} s")
        if settle:
            request = {"clock": time.time(), "entropy": secrets.token_hex(32)}
            self._ask(request, START_LIMIT, "the clock to be set")
        else:
            self._ask({}, START_LIMIT, "an answer")

    def _connect(self, name: str, timeout: float) -> _JsonLines:
        deadline = time.monotonic() + timeout
        while True:
            try:
                return _JsonLines(self.directory / name)
            except (FileNotFoundError, ConnectionRefusedError):
                if not self.alive or time.monotonic() > deadline:
                    raise self._error(f"QEMU's socket {name} is not there") from None
                time.sleep(0.01)

    def _receive(self, lines: _JsonLines, timeout: float, what: str) -> dict[str, Any]:
        try:
            return lines.receive(max(0.0, timeout))
        except TimeoutError:
            raise self._error(f"waited in vain for {what}") from None
        except (EOFError, ConnectionError):
            raise self._error(f"QEMU ended before {what}") from None

    def _error(self, message: str) -> VmError:
        qemu = (self.directory / "qemu.log").read_text(errors="replace").strip()
        tail = "\n".join(self.console()[-4000:].replace("\r", "").splitlines()[-30:])
        return VmError(f"{message}\n--- QEMU says ---\n{qemu}\n--- the end of the console ---\n{tail}")


def drain(port: socket.socket) -> None:
    """Take what the guest has left in a port, until it says no more."""
    port.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while port.recv(1 << 16):
            pass
    port.settimeout(START_LIMIT)


class _JsonLines:
    """A unix socket that carries one JSON object a line. Lines that are none are dropped."""

    def __init__(self, path: Path) -> None:
        self._received = bytearray()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(os.fspath(path))
        except BaseException:
            self._socket.close()
            raise

    def send(self, message: Mapping[str, Any], before: bytes = b"") -> None:
        # A guest that does not read must not hold up the test for ever.
        if not select.select([], [self._socket], [], START_LIMIT)[1]:
            raise TimeoutError("the guest does not read")
        self._socket.sendall(before + json.dumps(message).encode("ascii") + b"\n")

    def receive(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if newline:
                self._received = rest
                try:
                    message = json.loads(line.lstrip(b"\xff"))
                except ValueError:
                    continue
                if isinstance(message, dict):
                    return message
                continue
            if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            piece = self._socket.recv(1 << 20)
            if not piece:
                raise EOFError
            self._received += piece

    def close(self) -> None:
        self._socket.close()


def ensure_snapshot(
    image: Path,
    *,
    ports: Sequence[str] = PORTS,
    key: str = "",
    prepare: Optional[Callable[[Vm], None]] = None,
) -> Path:
    """The directory with memory and disk of a booted VM with these devices; made if it is not there.

    ``prepare`` makes another, kept under ``key``: of a VM from the plain one, when it is prepared.

    Memory is a migration stream in a file of its own, and each VM's disk an overlay: starting a VM copies
    nothing. (QEMU's own ``savevm`` would keep memory in the disk file, to be copied for each VM.)
    """
    devices = " ".join(_arguments(Path("image"), Path("vm"), "disk", ports)) + _qemu_version()
    directory = image / f"snapshot-{hashlib.sha256(devices.encode()).hexdigest()[:16]}"
    backing = "../image.qcow2"
    if prepare is not None:
        ensure_snapshot(image, ports=ports)
        backing = f"../{directory.name}/disk.qcow2"
        directory = directory.with_name(f"{directory.name}-{key}")
    if directory.exists():
        os.utime(directory)
        return directory
    with (image / "snapshot.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            return directory
        _forget_unused(image)
        making = Path(tempfile.mkdtemp(prefix="making-", dir=image))
        try:
            with Vm(image, cold=prepare is None, disk=making / "disk.qcow2", ports=ports) as vm:
                (prepare or _wait_booted)(vm)
                _save(vm, making / "state")
            # Relative, so that the cache can be moved.
            _qemu_img("rebase", "-u", "-F", "qcow2", "-b", backing, os.fspath(making / "disk.qcow2"))
            making.rename(directory)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return directory


def _forget_unused(image: Path) -> None:
    """Prepared snapshots are as many as there are versions of what is prepared; VMs on one's disk use it as well."""
    for directory in image.glob("snapshot-*-*"):
        if directory.stat().st_mtime < time.time() - UNUSED_LIMIT:
            shutil.rmtree(directory, ignore_errors=True)


def _wait_booted(vm: Vm) -> None:
    vm.check("systemctl is-system-running --wait || { systemctl --failed; false; }", BOOT_LIMIT)
    if QGA_PORT in vm.ports:
        vm.qga("guest-ping")
    # What most tests will want from the disk is in memory then.
    vm.check("python3 -c 'import psutil, msgpack, watchdog.observers'; sync; sleep 1")


def _save(vm: Vm, state: Path) -> None:
    """Write the VM's memory to a file, and end the VM."""
    vm.pause()
    vm.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    vm.qmp("migrate", uri=f"exec:exec cat > {shlex.quote(os.fspath(state))}")
    deadline = time.monotonic() + START_LIMIT
    while (status := vm.qmp("query-migrate").get("status")) != "completed":
        if status == "failed" or time.monotonic() > deadline:
            raise VmError(f"cannot save the snapshot: {status}")
        time.sleep(0.05)
    vm.quit()


def _arguments(image: Path, directory: Path, disk: str, ports: Sequence[str]) -> list[str]:
    """QEMU's command line. All of it makes the snapshot's name: memory fits only the machine it is from."""

    def listening(name: str) -> str:
        return f"socket,id={name},path={directory}/{name},server=on,wait=off"

    arguments = [
        *("-nodefaults", "-no-user-config", "-display", "none"),
        # Emulated: a /dev/kvm that opens need not be able to run a guest.
        *("-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", "qemu64,+rdrand,-svm"),
        *("-smp", "2", "-m", "512"),
        *("-kernel", f"{image}/vmlinuz", "-initrd", f"{image}/initrd"),
        *("-append", _KERNEL),
        *("-drive", f"if=none,id=disk,format=qcow2,file={disk}", "-device", "virtio-blk-pci,drive=disk"),
        *("-drive", f"if=none,id=files,format=raw,readonly=on,file={directory}/files"),
        *("-device", "virtio-blk-pci,drive=files"),
        *(
            "-chardev",
            f"{listening('console')},logfile={directory}/console.log",
            "-serial",
            "chardev:console",
        ),
        *("-chardev", listening("shell"), "-serial", "chardev:shell"),
        *("-qmp", f"unix:{directory}/qmp,server=on,wait=off"),
        *("-device", "virtio-serial-pci,id=serial,max_ports=31"),
    ]
    for name in ports:
        arguments += ["-chardev", listening(name)]
        # QMP's VSERPORT_CHANGE names a port by its id.
        arguments += ["-device", f"virtserialport,bus=serial.0,id=port-{name},chardev={name},name={name}"]
    return arguments


def _tar(files: Files) -> bytes:
    def as_root(member: tarfile.TarInfo) -> Optional[tarfile.TarInfo]:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        return member

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        if isinstance(files, Path):
            for path in sorted(files.iterdir()):
                archive.add(path, path.name, filter=as_root)
        else:
            for name, content in files.items():
                member = tarfile.TarInfo(name.lstrip("/"))
                member.size = len(content)
                member.mode = 0o755 if content.startswith(b"#!") else 0o644
                member.mtime = int(time.time())
                archive.addfile(member, io.BytesIO(content))
    # Only the closed archive has its end mark, and what the disk held before lies behind it.
    return buffer.getvalue()


@functools.lru_cache(maxsize=1)
def _qemu_version() -> str:
    return subprocess.run([QEMU, "--version"], check=True, capture_output=True, text=True).stdout


def _qemu_img(*arguments: str) -> None:
    done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise VmError(f"qemu-img {arguments[0]}: {done.stderr.strip()}")


_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# PR_SET_PDEATHSIG means the parent *thread*: a VM started by a passing thread would end with that thread.
_spawner = ThreadPoolExecutor(1, "vm-spawner")


def _spawn(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return _spawner.submit(
        subprocess.Popen,
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        preexec_fn=_die_with_parent,
        start_new_session=True,
    ).result()
