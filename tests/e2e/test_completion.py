"""What a Tab offers in bash, zsh and fish: real shells, and the names that a real daemon and collector know."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from tests import apt
from tests.e2e.world import World, until
from vmr_agent.cli import arguments, status, tables

SCRIPTS = Path(__file__).resolve().parents[2] / "packaging" / "completion"
VMRS = ("-100000/mv_1", "-4/compress.py", "-4/my tool", "-3/tar", "10.5/a:b=c", "1/bash", "1e-05/tiny")
NO_VMRS = ("-4/.part", ".hidden/x", "nope/x", "-2/two\nlines")
SHELLS = pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])

Complete = Callable[..., list[str]]


@pytest.fixture
def launch(tmp_path: Path) -> Path:
    for name in (*VMRS, *NO_VMRS):
        (tmp_path / "launch" / name).mkdir(parents=True)
    (tmp_path / "launch" / "-4" / "no-directory").write_text("")
    return tmp_path / "launch"


def in_bash(line: str, environment: Mapping[str, str]) -> list[str]:
    """What bash would be given, with its quoting undone where it is no file's name."""
    program = line.split()[0]
    script = (
        f'source "{SCRIPTS}/bash/{program}"; COMP_LINE=$1 COMP_POINT=${{#1}}; _{program.replace("-", "_")}; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "-", line], env=environment, capture_output=True, text=True
    )
    assert done.stderr == ""
    return [each for each in done.stdout.split("\n") if each]


def in_fish(line: str, environment: Mapping[str, str]) -> list[str]:
    """What fish would offer, without what it says of each."""
    program = line.split()[0]
    command = f"source {SCRIPTS}/fish/{program}.fish; complete -C {shlex.quote(line)}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", command],
        env={**environment, "XDG_DATA_HOME": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    found = [each.partition("\t")[0] for each in done.stdout.split("\n") if each]
    return [each for each in found if each.startswith(line.split(" ")[-1])]  # where none fits it guesses


CASES = [
    ("vmr-agent re", {"rerun", "resume", "reset"}),
    ("vmr-agent --v", {"--version"}),
    ("vmr-agent rerun ", set(VMRS)),
    ("vmr-agent rerun -4/", {"-4/compress.py", "-4/my tool"}),
    ("vmr-agent rerun -4/c", {"-4/compress.py"}),
    ("vmr-agent logs --attempt 2 -3", {"-3/tar"}),
    ("vmr-agent diff --attempt 1 2 -3", {"-3/tar"}),
    ("vmr-agent rerun --w", {"--watch"}),
    ("vmr-agent rerun --watch --w", set()),
    ("vmr-agent rerun -4/compress.py --res", {"--restart"}),
    ("vmr-agent status --js", {"--json"}),
    ("vmr-agent logs --stream ", {"stdout", "stderr"}),
    ("vmr-agent kill -3/tar --signal K", {"KILL"}),
    ("vmr-agent rerun nobody", set()),
    ("vmr-agent rerun -3/tar -", {"--config", "--detach", "--help", "--launch-dir", "--port", "--restart"}),
]


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize(("line", "offered"), CASES, ids=[line for line, _ in CASES])
def test_what_is_offered(shell: str, line: str, offered: set[str], launch: Path) -> None:
    apt.need(shell, shell)
    complete = in_bash if shell == "bash" else in_fish
    found = complete(line, {**os.environ, "VMR_AGENT_LAUNCH_DIR": str(launch)})
    assert len(found) == len(set(found))
    names = {shlex.split(each)[0] for each in found} if shell == "bash" else set(found)
    if line.endswith(" -"):
        assert names >= offered and not names & set(VMRS)
    else:
        assert names == offered


def test_bash_completes_within_words_that_readline_divides(launch: Path) -> None:
    environment = {**os.environ, "VMR_AGENT_LAUNCH_DIR": str(launch)}
    assert in_bash("vmr-agent rerun 10.5/a:b", environment) == ["b=c"]
    assert in_bash("vmr-agent logs --stream=stdo", environment) == ["stdout"]
    assert in_bash("vmr-agent rerun --config=/etc/hostn", environment)[0] == "/etc/hostname"
    assert in_bash("vmr-agent rerun -4/my\\ t", environment) == ["-4/my\\ tool"]
    assert in_bash("vmr-agent rerun '-4/my t", environment) == ["-4/my tool"]
    assert "/etc/hostname" in in_bash("vmr-agent logs -3/tar 2>/dev/null > /etc/hostn", environment)
    assert in_bash("vmr-agent logs -3/tar 2>/dev/null --fo", environment) == ["--follow"]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_bash_offers_no_name_that_it_would_act_on(launch: Path, quote: str) -> None:
    """A VM names its VMRs; within quotes, a name stands on the line as it is."""
    environment = {**os.environ, "VMR_AGENT_LAUNCH_DIR": str(launch)}
    for name in (
        "$(touch pwned)",
        "`touch pwned`",
        "$HOME",
        "a!b",
        "a\\b",
        f"a{quote}; touch pwned; {quote}b",
    ):
        (launch / "-7" / name).mkdir(parents=True)
    (launch / "-7" / "plain; & * name").mkdir()
    assert in_bash(f"vmr-agent rerun {quote}-7/", environment) == ["-7/plain; & * name"]
    quoted = in_bash("vmr-agent rerun -7/", environment)
    assert len(quoted) == 7 and {shlex.split(each)[0] for each in quoted} == {
        f"-7/{path.name}" for path in (launch / "-7").iterdir()
    }


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_the_launch_directory_is_found_as_the_commands_find_it(
    shell: str, launch: Path, tmp_path: Path
) -> None:
    apt.need(shell, shell)
    complete = in_bash if shell == "bash" else in_fish
    config = tmp_path / "agent.conf"
    config.write_text(f"# launch_dir = /wrong\n[vmr-agent]\nlaunch_dir = {launch}\nquiet=1")
    other = tmp_path / "other"
    (other / "-7" / "x").mkdir(parents=True)
    bare = {key: value for key, value in os.environ.items() if not key.startswith("VMR_")}
    by_file = {**bare, "VMR_AGENT_CONFIG": str(config)}
    assert complete("vmr-agent rerun -3", by_file) == ["-3/tar"]
    assert complete(f"vmr-agent rerun --config {config} -3", bare) == ["-3/tar"]
    both = {**by_file, "VMR_AGENT_LAUNCH_DIR": str(other)}
    assert complete("vmr-agent rerun ", both) == ["-7/x"]
    assert complete(f"vmr-agent rerun --launch-dir={launch} -3", both) == ["-3/tar"]
    assert complete("vmr-agent rerun -3", {**bare, "VMR_AGENT_LAUNCH_DIR": "/nonexistent"}) == []
    assert complete("vmr-agent rerun -3", {**bare, "VMR_AGENT_CONFIG": "/nonexistent"}) == []


def test_each_signal_offered_is_one() -> None:
    sys.path.append(str(SCRIPTS.parent))
    try:
        import completions
    finally:
        sys.path.remove(str(SCRIPTS.parent))
    for name in completions.SIGNALS:
        assert isinstance(arguments.signal_number(name), signal.Signals)


# --- at a terminal -------------------------------------------------------------------------------------------


class Shell:
    """A shell at a terminal, with our completion and none of its user's settings."""

    START = {
        "bash": ["bash", "--norc", "--noprofile", "-i"],
        "zsh": ["zsh", "-f", "-i"],
        "fish": ["fish", "--no-config", "-i"],
    }
    SETUP = {
        "bash": "PS1='> '; bind 'set enable-bracketed-paste off'; source '{scripts}/bash/vmr-agent'",
        "zsh": "PS1='> '; unsetopt zle_bracketed_paste; fpath=('{scripts}/zsh' $fpath); autoload -Uz compinit; "
        "compinit -u -D",
        "fish": "source '{scripts}/fish/vmr-agent.fish'",
    }

    def __init__(self, shell: str, environment: Mapping[str, str]) -> None:
        self._end, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
        self._process = subprocess.Popen(
            self.START[shell],
            env={**environment, "TERM": "dumb"},
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        os.close(other)
        self._type(self.SETUP[shell].format(scripts=SCRIPTS) + "; echo all''set\n")
        self._until("allset")

    def _type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def _until(self, words: str, limit: float = 30) -> None:
        seen, deadline = "", time.monotonic() + limit
        while words not in seen:
            ready, _, _ = select.select([self._end], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"gave up waiting for {words!r}: {seen!r}"
            seen += os.read(self._end, 65536).decode("utf-8", "replace").replace("\a", "")

    def completes(self, line: str, to: str) -> None:
        """A Tab behind the line makes this of it: it is run as an argument of `printf`, and shown."""
        self._type(line + "\t")
        self._until(to)
        self._type("\x15")  # the line is emptied

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._end)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_tab_at_a_terminal(shell: str, launch: Path) -> None:
    apt.need(shell, shell)
    typed = Shell(shell, {**os.environ, "VMR_AGENT_LAUNCH_DIR": str(launch)})
    try:
        typed.completes("vmr-agent rer", "vmr-agent rerun ")
        typed.completes("vmr-agent rerun -4/c", "-4/compress.py ")
        typed.completes("vmr-agent rerun -4/m", "-4/my\\ tool ")
        typed.completes("vmr-agent rerun --det", "--detach ")
        typed.completes("vmr-agent logs --stream=stdo", "--stream=stdout ")
        typed.completes("vmr-agent kill -3/tar --signal K", "KILL ")
        typed.completes("vmr-agent diff --attempt 1 2 -3", "-3/tar ")
        typed.completes("vmr-agent rerun --config=/etc/hostn", "/etc/hostname")
    finally:
        typed.close()


# --- names that the host knows -------------------------------------------------------------------------------


@pytest.fixture
def host(world: World) -> Iterator[World]:
    programs = world.path / "bin"
    programs.mkdir()
    command = programs / "vmr-host"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vmr_agent.cli.host "$@"\n')
    command.chmod(0o755)
    world.stage("-4/compress.py", "echo hello")
    world.stage("-4/my tool", "true")
    world.stage("50/later", "true")
    world.start_collector()
    world.start_daemon()
    world.complete("-4/my%20tool")
    world.complete("-4/compress.py")
    yield world


def with_path(world: World) -> dict[str, str]:
    return {**world.environment, "PATH": f"{world.path}/bin:{os.environ['PATH']}"}


def test_names_on_the_host_and_the_keys_of_its_json(host: World) -> None:
    environment = with_path(host)
    until(lambda: "50/later" in host.host("names", "Server").stdout.decode(), "the collector knows it")
    shells = {"bash": in_bash, "fish": in_fish}
    for shell, complete in shells.items():
        if shutil.which(shell) is None:
            continue
        assert complete("vmr-host list ", environment) == ["Server"]
        assert complete("vmr-host rerun Server 5", environment) == ["50/later"]
        assert len(complete("vmr-host rerun Server -4/", environment)) == 2
        assert complete("vmr-host rerun Nobody ", environment) == []
        assert complete("vmr-host stage Server --at -3 ./program --n", environment) == []
        assert complete("vmr-host stage Server --n", environment) == ["--name"]
    assert complete("vmr-host collect A=/etc/hostn", environment)[0] == "A=/etc/hostname"

    (vm,) = json.loads(host.host("mix", "--json").stdout)
    assert list(vm) == list(tables.VM_KEYS)
    rows = json.loads(host.host("list", "Server", "--json").stdout)
    assert {row["attempt"] for row in rows} == {0, 1}
    assert all(list(row) == list(tables.VMR_KEYS) for row in rows)
    assert list(json.loads((host.logs / "Server/-4/compress.py/1/result.json").read_text())) == list(
        tables.VMR_KEYS
    )
    own = {"age_s", "waiting", "delivered", "staged", "changed", "dropped_bytes"}
    assert set(status.KEYS) - own <= set(tables.VMR_KEYS)

    host.stop(host.collector)  # then the log directory knows what has run
    assert in_bash("vmr-host list ", environment) == ["Server"]
    assert in_bash("vmr-host rerun Server -4/c", environment) == ["-4/compress.py"]


def test_names_where_nobody_answers(tmp_path: Path) -> None:
    """A Tab must not hang with the collector, nor say what is wrong."""
    programs = {**os.environ, "PYTHONPATH": str(SCRIPTS.parents[1] / "agent")}
    path = f"/tmp/vmr-{os.getpid()}-silent"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen(1)
        try:
            for control in (path, "/nonexistent/control"):
                done = subprocess.run(
                    [sys.executable, "-m", "vmr_agent.cli.host", "names", "--control", control],
                    env=programs,
                    capture_output=True,
                    timeout=20,
                )
                assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        finally:
            with suppress(OSError):
                os.unlink(path)
