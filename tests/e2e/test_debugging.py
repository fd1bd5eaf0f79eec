"""Debugging in place, in the guest's shell: what each verb shows, on a terminal and to programs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.e2e import unprivileged
from tests.e2e.terminal import Terminal
from tests.e2e.unprivileged import needs_root
from tests.e2e.world import World, until
from vmr_agent.cli import status

BROKEN = """\
#!/usr/bin/env python3
import tarfile

print(os.path.basename("/opt/file.txt"))
"""
FIXED = BROKEN.replace("import tarfile", "import os\nimport tarfile")


def save(path: Path, text: str) -> None:
    """As vim does: a trial file, a swap file, then another file under the old name."""
    beside = path.parent
    (beside / "4913").touch()
    (beside / "4913").unlink()
    (beside / f".{path.name}.swp").write_text("swap")
    new = beside / f"{path.name}~new"
    new.write_text(text)
    new.chmod(path.stat().st_mode & 0o7777)
    path.rename(beside / f"{path.name}~")
    new.rename(path)
    (beside / f"{path.name}~").unlink()
    (beside / f".{path.name}.swp").unlink()


def wait_for(world: World, vmr: str, state: str = "exited") -> dict[str, Any]:
    until(lambda: world.row(vmr).get("state") == state, f"{vmr} is {state}\n{world.tail()}")
    return world.row(vmr)


def merged(world: World, *arguments: str) -> bytes:
    """What a verb shows where both its streams go to the same place."""
    return subprocess.run(
        [sys.executable, "-m", "vmr_agent.cli.start", *arguments],
        env=world.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    ).stdout


@pytest.fixture
def tutorial(world: World) -> World:
    """The tutorial's broken VMR, which has run."""
    world.stage("-4/compress.py", "./compress.py", files={"compress.py": BROKEN})
    world.start_daemon()
    wait_for(world, "-4/compress.py")
    return world


def script(world: World) -> Path:
    return world.launch / "-4" / "compress.py" / "compress.py"


# --- logs ----------------------------------------------------------------------------------------------------


def test_logs_come_in_the_order_captured_with_the_daemon_down(world: World) -> None:
    # Two pipes have no order but that of their reading: each line waits until the one before is in the spool.
    spool = world.spool / "runs" / "-1" / "both" / "1"
    seen = f"until grep -q '^%s$' {spool}/%s; do sleep 0.01; done"
    world.stage(
        "-1/both",
        "for i in 1 2 3 4 5; do echo out $i; "
        + seen % ("out '$i'", "stdout")
        + "; echo err $i >&2; "
        + seen % ("err '$i'", "stderr")
        + "; done",
    )
    world.start_daemon()
    wait_for(world, "-1/both")
    world.stop(world.daemon)
    expected = b"".join(b"out %d\nerr %d\n" % (i, i) for i in range(1, 6))
    assert merged(world, "logs", "-1/both") == expected
    assert merged(world, "logs", "-1/both", "--follow") == expected
    apart = world.agent("logs", "-1/both")
    assert apart.stdout == b"".join(b"out %d\n" % i for i in range(1, 6))
    assert apart.stderr == b"".join(b"err %d\n" % i for i in range(1, 6))
    assert world.agent("logs", "-1/both", "--stream", "stderr").stdout == apart.stderr


def test_timestamps_stand_before_whole_lines_and_bytes_stay_bytes(world: World) -> None:
    world.stage("-1/odd", r"printf 'one\n\xef'; sleep 0.1; printf '\xff\n'; printf 'no end' >&2")
    world.start_daemon()
    wait_for(world, "-1/odd")
    done = world.agent("logs", "-1/odd", "--timestamps")
    time_ = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z "
    assert re.fullmatch(time_ + rb"stdout one\n" + time_ + rb"stdout \xef\xff\n", done.stdout), done.stdout
    assert re.fullmatch(time_ + rb"stderr no end\n", done.stderr), done.stderr
    assert world.agent("logs", "-1/odd").stdout == b"one\n\xef\xff\n"


def test_follow_passes_on_what_comes_and_ends_with_the_pipes(world: World) -> None:
    world.stage("-1/daemon", "echo first; (sleep 1; echo last) & echo second")
    world.start_daemon()
    until(lambda: world.agent("logs", "-1/daemon").returncode == 0, "it has begun")
    assert world.agent("logs", "-1/daemon", "--follow").stdout == b"first\nsecond\nlast\n"


# --- kill and ps ---------------------------------------------------------------------------------------------


def test_ps_shows_the_tree_and_kill_says_whom_it_ended(world: World) -> None:
    world.stage("-1/tree", "(setsid sleep 61 &); sleep 62")
    world.start_daemon()
    wait_for(world, "-1/tree", "running")
    until(lambda: world.agent("ps", "-1/tree").stdout.count(b"\n") == 4, "three processes and a head")
    lines = world.agent("ps", "-1/tree").stdout.decode().splitlines()
    assert lines[0].split() == ["PID", "STATE", "CPU", "MEMORY", "READ", "WRITTEN", "PIPES", "COMMAND"]
    assert "/bin/bash" in lines[1] and "call_arguments.sh" in lines[1]
    column = lines[0].index("COMMAND")
    assert any(line[column:] == "  sleep 62" for line in lines[2:]), "a child is below its parent"
    assert any(line[column:] == "sleep 61" for line in lines[2:]), "one that went its own way is shown too"
    assert all("holds" in line for line in lines[1:])
    killed = world.agent("kill", "-1/tree", "--signal", "KILL").stdout.decode()
    assert re.fullmatch(
        r"SIGKILL sent to attempt 1 of -1/tree: call_arguments.sh \(\d+\), sleep \(\d+\), sleep \(\d+\)\n",
        killed,
    )
    assert wait_for(world, "-1/tree", "killed")["signal"] == "SIGKILL"


def test_ps_names_who_keeps_a_run_open_that_has_exited(world: World) -> None:
    world.stage("-1/left", "sleep 63 & exit 0")
    world.start_daemon()
    wait_for(world, "-1/left")
    shown = world.agent("ps", "-1/left").stdout.decode()
    assert "sleep 63" in shown and "attempt 1 of -1/left has exited; its pipes are still held" in shown
    assert b"sleep (" in world.agent("kill", "-1/left").stdout
    until(lambda: world.row("-1/left")["complete"], "its pipes are closed")
    done = world.agent("ps", "-1/left")
    assert (
        done.returncode == 1
        and done.stderr == b"vmr-agent: cannot show processes of -1/left: attempt 1 has none\n"
    )


def test_ps_shows_and_kill_hits_what_the_latest_attempt_left_first(world: World) -> None:
    world.stage("-1/left", "echo $VMR_ATTEMPT; sleep 6$VMR_ATTEMPT & exit 0")
    world.start_daemon()
    wait_for(world, "-1/left")
    for _ in range(2):
        assert world.agent("rerun", "-1/left").returncode == 0
    for attempt, others in ((3, "attempts 1, 2"), (2, "attempt 1"), (1, "")):
        shown = world.agent("ps", "-1/left").stdout.decode()
        assert f"sleep 6{attempt}" in shown and f"attempt {attempt} of -1/left has exited" in shown
        assert (f"processes of {others} are left too" if others else "") in shown
        assert ("are left too" in shown) is bool(others)
        killed = world.agent("kill", "-1/left").stdout.decode()
        assert killed.startswith(f"SIGTERM sent to attempt {attempt} of -1/left: sleep (")
        until(lambda: f"sleep 6{attempt}" not in str(world.agent("ps", "-1/left").stdout), "it is gone")
    assert world.agent("ps", "-1/left").returncode == 1


# --- diff ----------------------------------------------------------------------------------------------------


def test_diff_shows_what_changed_since_staging_as_patch_takes_it(tutorial: World, tmp_path: Path) -> None:
    done = tutorial.agent("diff", "-4/compress.py")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr == b"vmr-agent: nothing differs between attempt 1 and now\n"
    save(script(tutorial), FIXED)
    done = tutorial.agent("diff", cwd=script(tutorial).parent)
    assert done.stdout.decode().splitlines() == [
        "--- a/compress.py\tattempt 1",
        "+++ b/compress.py\tnow",
        "@@ -1,4 +1,5 @@",
        " #!/usr/bin/env python3",
        "+import os",
        " import tarfile",
        " ",
        ' print(os.path.basename("/opt/file.txt"))',
    ]
    tutorial.stop(tutorial.daemon)
    assert tutorial.agent("diff", "-4/compress.py").stdout == done.stdout, "no daemon is needed"


def test_diff_between_attempts_and_what_is_not_text(tutorial: World) -> None:
    directory = script(tutorial).parent
    script(tutorial).write_text(FIXED)
    (directory / "data").write_bytes(b"\0\1")
    tutorial.agent("rerun", "-4/compress.py")
    script(tutorial).write_text(FIXED + "# more")
    (directory / "data").write_bytes(b"\0\1\2")
    (directory / "empty").touch()
    (directory / "link").symlink_to("data")
    script(tutorial).chmod(0o755)
    older = tutorial.agent("diff", "--attempt", "1", "2", "-4/compress.py").stdout.decode()
    assert "+import os\n" in older and "# more" not in older
    assert "data: attempt 1: not there\ndata: attempt 2: 2 bytes, sha256 b413f47d13ee2fe6" in older
    newer = tutorial.agent("diff", "-4/compress.py").stdout.decode()
    assert "compress.py: mode 0777 -> mode 0755\n" in newer
    assert "+# more\n\\ No newline at end of file\n" in newer
    assert "data: now: 3 bytes, sha256 " in newer
    assert "empty: attempt 1: not there\nempty: now: 0 bytes, sha256 e3b0c442" in newer
    assert "link: now: link to data\n" in newer


def test_a_long_file_is_told_by_its_size_and_what_was_not_kept(make_world: Callable[..., World]) -> None:
    world = make_world(settings={"keep_files": "1K"})
    directory = world.stage("-1/long", "true", files={"long": b"x" * 2000})
    world.start_daemon()
    wait_for(world, "-1/long")
    (directory / "long").write_bytes(b"x" * 2001)
    shown = world.agent("diff", "-1/long").stdout.decode()
    assert "long: attempt 1: 2,000 bytes, not kept\nlong: now: 2,001 bytes, sha256 " in shown


def test_a_new_vmr_of_the_same_name_is_compared_with_itself(tutorial: World) -> None:
    directory = script(tutorial).parent
    directory.rename(tutorial.path / "aside")
    until(lambda: not tutorial.row("-4/compress.py")["staged"], "it is seen gone")
    gone = tutorial.agent("diff", "-4/compress.py")
    assert gone.returncode == 1 and b"it has not run since it was staged anew" in gone.stderr
    tutorial.stage("-4/compress.py", "true", files={"other": "text\n"})
    until(lambda: tutorial.row("-4/compress.py")["attempt"] == 2, "the new one runs")
    wait_for(tutorial, "-4/compress.py")
    (directory / "other").write_text("edited\n")
    assert tutorial.agent("diff", "-4/compress.py").stdout.startswith(b"--- a/other\tattempt 2\n")


# --- status --------------------------------------------------------------------------------------------------


def test_status_fits_80_columns_and_says_what_was_changed(world: World) -> None:
    world.stage("-250/set_hostname.sh", "head -c 1000000 /dev/zero")
    world.stage("-4/compress.py", "exit 3", files={"compress.py": BROKEN})
    world.stage("-100000/mv_1", "kill -KILL $$")
    missing = world.stage("-3/tar", "true") / "call_arguments.sh"
    missing.write_text("#!/no/such/interpreter\n")
    world.stage("-1/slow", "exec sleep 60")
    world.stage("10.5/later", "true")
    world.start_daemon()
    wait_for(world, "-1/slow", "running")
    (world.launch / "-4/compress.py/compress.py").write_text(FIXED)
    (world.launch / "-250/set_hostname.sh/new").write_text("a file of the script's own is no edit")
    lines = world.agent("status").stdout.decode().splitlines()
    table = lines[: lines.index("")]
    reason = next(line for line in table if line.startswith("    "))
    assert "interpreter" in reason and "missing" in reason
    table.remove(reason)
    assert max(map(len, table)) <= 80, table
    cells = {line.split()[0]: line.split()[1:] for line in table[1:]}
    assert list(cells) == [
        *("-100000/mv_1", "-250/set_hostname.sh", "-4/compress.py", "-3/tar", "-1/slow", "10.5/later"),
    ]
    assert cells["-100000/mv_1"][:3] == ["1", "killed", "SIGKILL"]
    assert cells["-4/compress.py"][:3] == ["1", "exited", "3"] and "yes" in cells["-4/compress.py"]
    assert "yes" not in cells["-250/set_hostname.sh"]
    assert cells["-3/tar"][:4] == ["1", "failed", "to", "start"]
    assert cells["10.5/later"] == ["waiting", "waits", "for", "the", "VM", "to", "be", "configured"]
    rows = json.loads(world.agent("status", "--json").stdout)
    assert all(list(row) == sorted(row, key=list(status.KEYS).index) for row in rows)
    assert all(set(row) == set(status.KEYS) for row in rows)
    assert [row["changed"] for row in rows] == [False, False, True, False, False, None]
    assert rows[4]["age_s"] > 0 and rows[4]["duration_s"] is None
    help_ = world.agent("status", "--help").stdout.decode()
    assert all(f"  {key} " in help_ for key in status.KEYS)


def test_status_watch_refreshes_until_ctrl_c(tutorial: World) -> None:
    for number in range(40):
        tutorial.stage(f"5/many{number}", "true")
    until(lambda: tutorial.row("5/many39"), "they are staged")
    with Terminal(tutorial, "status", "--watch") as terminal:
        terminal.shows("lines above", times=1)
        tutorial.agent("rerun", "-4/compress.py")
        terminal.shows("-4/compress.py    2")
        assert terminal.interrupt() == 130
        for screen in terminal.text.split("\x1b[H")[1:]:
            assert screen.rstrip("\n").count("\n") < 24
            assert all(len(line) <= 80 for line in screen.replace("\x1b[K", "").splitlines())
    done = tutorial.agent("status", "--watch")
    assert done.returncode == 1 and b"cannot watch: standard output is no terminal" in done.stderr


def test_status_watch_outlasts_the_daemon(tutorial: World) -> None:
    with Terminal(tutorial, "status", "--watch") as terminal:
        terminal.shows("-4/compress.py")
        tutorial.stop(tutorial.daemon)
        terminal.shows("isn't")
        before = terminal.text.count("-4/compress.py")
        tutorial.start_daemon()
        terminal.shows("-4/compress.py", times=before + 1)
        assert terminal.interrupt() == 130


# --- rerun --watch -------------------------------------------------------------------------------------------


def test_watch_runs_again_on_each_save(tutorial: World) -> None:
    with Terminal(tutorial, "rerun", "-4/compress.py", "--watch") as terminal:
        terminal.shows("attempt 2 exited with code 1 after")
        assert re.search(r"\x1b\[1mattempt 2 of -4/compress.py, \d\d:\d\d:\d\d\x1b\[m\n", terminal.text)
        save(script(tutorial), FIXED)
        terminal.shows("attempt 3 exited with code 0 after")
        # On a busy machine it may be seen while the editor is at it, with another word than "changed".
        assert re.search(r"attempt 3 of -4/compress.py, \d\d:\d\d:\d\d: .*compress.py", terminal.text)
        terminal.shows("-4/compress.py changed since staging: vmr-host pull -4/compress.py/compress.py ")
        script(tutorial).write_text(FIXED + "print('in place')\n")
        terminal.shows("attempt 4 exited with code 0 after")
        (script(tutorial).parent / "helper.py").write_text("")
        terminal.shows("helper.py changed")
        terminal.shows("attempt 5 exited with code 0 after")
        assert terminal.interrupt() == 130
        assert terminal.text.endswith("stopped watching -4/compress.py\n")
        assert terminal.text.count("NameError") == 1 and terminal.text.count("in place\n") == 2


def test_without_a_terminal_there_are_no_colours_and_streams_are_the_vmrs(tutorial: World) -> None:
    watching = subprocess.Popen(
        [sys.executable, "-m", "vmr_agent.cli.start", "rerun", "--watch", "-4/compress.py"],
        env=tutorial.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    script(tutorial).write_text(FIXED)
    assert watching.stdout is not None and watching.stdout.readline() == b"file.txt\n"
    watching.send_signal(signal.SIGINT)
    out, errors = watching.communicate(timeout=60)
    assert out in (b"", b"file.txt\n") and b"\x1b" not in errors and b"attempt 2 of -4/compress.py" in errors


def test_a_run_in_progress_is_finished_first(world: World) -> None:
    directory = world.stage("-1/slow", "cat data; sleep 1; echo done", files={"data": "one\n"})
    world.start_daemon()
    wait_for(world, "-1/slow")
    with Terminal(world, "rerun", "-1/slow", "--watch") as terminal:
        terminal.shows("one\n")
        save(directory / "data", "two\n")
        terminal.shows("two\n")
        assert terminal.text.index("done\n") < terminal.text.index("attempt 3 of")
        terminal.interrupt()
        assert "attempt 3 goes on: vmr-agent logs --follow -1/slow\n" in terminal.text
    assert wait_for(world, "-1/slow")["exit_code"] == 0


def test_restart_stops_a_run_in_progress_and_what_it_left(world: World) -> None:
    directory = world.stage(
        "1/server", "trap '' TERM; (setsid sleep 64 &) ; cat port; sleep 65", files={"port": "80\n"}
    )
    world.settings["schedule"] = "off"
    world.write_config()
    world.start_daemon()
    until(lambda: world.row("1/server").get("state"), "it is staged")
    time.sleep(0.2)
    with Terminal(world, "rerun", "1/server", "--watch", "--restart") as terminal:
        terminal.shows("80\n")
        save(directory / "port", "8080\n")
        terminal.shows("8080\n")
        assert terminal.interrupt() == 130
    first = world.agent("ps", "1/server").stdout.decode()
    assert first.count("sleep 64") == 1, "the first one's is gone"
    shown = json.loads((world.spool / "runs/1/server/1/exit.json").read_bytes())
    assert (shown["ending"], shown["value"]) == ("signal", signal.SIGKILL), "TERM was ignored"
    world.agent("kill", "1/server", "--signal", "KILL")


def test_what_a_script_writes_beside_itself_starts_nothing(world: World) -> None:
    world.stage("-1/writes", "date >> log; echo ran", files={"data": "x"})
    world.start_daemon()
    wait_for(world, "-1/writes")
    with Terminal(world, "rerun", "-1/writes", "--watch") as terminal:
        terminal.shows("attempt 2 exited")
        time.sleep(2.5)
        assert terminal.text.count("ran\n") == 1


def test_a_script_that_edits_what_was_staged_does_not_start_itself_for_ever(world: World) -> None:
    world.stage("-1/counts", "echo x >> counter; wc -l < counter", files={"counter": ""})
    world.start_daemon()
    wait_for(world, "-1/counts")
    with Terminal(world, "rerun", "-1/counts", "--watch") as terminal:
        terminal.shows("counter changed during each of 5 runs: taken for the script's doing from now on")
        time.sleep(1.5)
        assert terminal.text.count("\x1b[1mattempt") == 5


def test_watch_outlasts_a_daemon_and_a_script_that_lost_its_x_bit(tutorial: World) -> None:
    start = script(tutorial).parent / "call_arguments.sh"
    with Terminal(tutorial, "rerun", "-4/compress.py", "--watch") as terminal:
        terminal.shows("attempt 2 exited with code 1")
        start.chmod(0o644)
        terminal.shows("its x bit isn't set; waiting for a save")
        tutorial.stop(tutorial.daemon)
        tutorial.start_daemon()
        until(lambda: tutorial.row("-4/compress.py"), "the daemon is back")
        start.chmod(0o755)
        terminal.shows("attempt 3 exited with code 1")
        assert terminal.interrupt() == 130


def test_watch_waits_for_a_run_that_somebody_else_has_started(world: World) -> None:
    world.stage("-1/slow", "sleep 1; echo ran")
    world.start_daemon()
    wait_for(world, "-1/slow", "running")
    with Terminal(world, "rerun", "-1/slow", "--watch") as terminal:
        terminal.shows("attempt 1 of -1/slow is in progress; waiting for its end")
        terminal.shows("attempt 2 exited with code 0")
        assert terminal.text.count("ran\n") == 1


# --- what to pull --------------------------------------------------------------------------------------------


def test_guest_and_host_say_what_to_pull(world: World) -> None:
    world.stage("-4/compress.py", "./compress.py", files={"compress.py": BROKEN, "other": "x"})
    world.start_collector()
    world.start_daemon()
    world.complete("-4/compress.py")
    with Terminal(world, "rerun", "-4/compress.py") as terminal:
        assert terminal.end() == 1 and "since staging" not in terminal.text, "it failed"
    script(world).write_text(FIXED)
    with Terminal(world, "rerun", "-4/compress.py") as terminal:
        assert terminal.end() == 0
        line = "-4/compress.py changed since staging: vmr-host pull -4/compress.py/compress.py "
        assert line in terminal.text
    assert line in world.daemon_log()
    said = "Server: -4/compress.py changed since staging: vmr-host pull -4/compress.py Server .\n"
    until(lambda: said in world.collector_log(), "the collector says it too")
    assert world.agent("rerun", "-4/compress.py").stderr == b"", (
        "to a program a rerun's streams are the VMR's"
    )


# --- check ---------------------------------------------------------------------------------------------------


def test_check_says_what_is_wrong_and_what_to_do(world: World) -> None:
    world.stage("-1/fine", "true")
    world.start_collector()
    world.start_daemon()
    world.complete("-1/fine")
    done = world.agent("check")
    assert (done.returncode, done.stderr) == (0, b""), done.stdout
    lines = done.stdout.decode().splitlines()
    assert all(line.startswith("ok     ") for line in lines)
    assert any("the host is there, in session" in line for line in lines)
    world.stop(world.daemon)
    world.stage("-2/open", "true").chmod(0o777)
    (world.spool / "full").touch()
    done = world.agent("check")
    assert done.returncode == 1
    wrong = [line[7:] for line in done.stdout.decode().splitlines() if line.startswith("wrong  ")]
    assert [line.partition(":")[0] for line in wrong] == ["daemon", "VMR", "spool"], wrong
    assert all(" -> " in line for line in wrong)
    assert "systemctl start vmr-agent" in wrong[0] and "-2/open is refused" in wrong[1]


# --- what people get wrong -----------------------------------------------------------------------------------


def test_each_verb_says_what_was_wrong_in_one_line(tutorial: World) -> None:
    tutorial.stage("10/later", "true")
    until(lambda: tutorial.row("10/later"), "it is staged")
    near, none = "did you mean -4/compress.py", "cannot find attempt 9 of -4/compress.py (there is 1)"
    unrun = "cannot find a run of 10/later: it has not run yet"
    for arguments, code, words in (
        (["logs", "-4/compres.py"], 1, near),
        (["logs", "-4/compress.py", "--attempt", "9"], 1, none),
        (["logs", "-4/compress.py", "--attempt", "x"], 2, "invalid int value"),
        (["logs", "10/later"], 1, unrun),
        (["ps", "-4/compres.py"], 1, near),
        (["ps", "10/later"], 1, unrun),
        (["diff", "-3/compress.py"], 1, near),
        (["diff", "-4/compress.py", "--attempt", "1", "9"], 1, none),
        (["diff", "-4/compress.py", "--attempt", "1"], 2, "expected 2 arguments"),
        (["diff", "10/later"], 1, unrun),
        (["rerun", "--watch", "-4/compres.py"], 1, near),
        (["rerun", "--watch", "10/later"], 1, "its turn hasn't come"),
        (["rerun", "--restart", "-4/compress.py"], 1, "cannot use --restart without --watch"),
        (["rerun", "--watch", "--detach", "-4/compress.py"], 2, "not allowed with argument"),
        (["status", "--watch", "--json"], 2, "not allowed with argument"),
        (["kill", "-4/compres.py"], 1, near),
    ):
        done = tutorial.agent(*arguments)
        lines = done.stderr.decode().splitlines()
        assert done.returncode == code, (arguments, lines)
        assert len(lines) == 1 and words in lines[0], (arguments, lines)


def test_without_a_daemon_the_verbs_that_need_it_say_so(tutorial: World) -> None:
    tutorial.stop(tutorial.daemon)
    for arguments in (["rerun", "--watch", "-4/compress.py"], ["status"], ["kill", "-4/compress.py"]):
        done = tutorial.agent(*arguments)
        assert done.returncode == 1 and b"it isn't running (systemctl start vmr-agent" in done.stderr, (
            arguments
        )
    for arguments in (["logs", "-4/compress.py"], ["diff", "-4/compress.py"]):
        assert tutorial.agent(*arguments).returncode == 0, arguments


@needs_root
def test_another_user_is_told_to_try_as_root(tutorial: World) -> None:
    for path in (tutorial.path, *tutorial.path.parents):
        if path != Path("/") and path.stat().st_uid == os.getuid() and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o055)
    for arguments in (["logs", "-4/compress.py"], ["diff", "-4/compress.py"], ["ps", "-4/compress.py"]):
        done = unprivileged.run(
            "sys.exit(main(sys.argv[1:]))",
            *arguments,
            imports="from vmr_agent.cli.agent import main\n"
            "import configparser, locale, psutil, vmr_agent.cli.diff, vmr_agent.cli.ps",
            environment=tutorial.environment,
        )
        assert done.returncode == 1, (arguments, done)
        assert b"permission denied (try as root)\n" in done.stderr and done.stderr.count(b"\n") == 1, (
            done.stderr
        )
