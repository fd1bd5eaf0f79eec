"""Kills the process it is loaded into, by SIGKILL, at named steps of the product's own code. Knows no test.

Python loads a module of this name at its start, so the daemon, the collector and the renderer do when this
directory is on their PYTHONPATH; the fork server, which runs with -I -S -E, is started through it by the daemon's
copy. A step is a statement of a source file, and a process is killed when it reaches it, or when it is done with
it; the debugger's interface, `sys.settrace`, says when. So the product is what it is without the test, line by
line: it knows of nothing, nothing in it is replaced, and each step is known by its place in the source.

$VMR_TEST_STEPS names a file with the steps, see ../steps.py. Each is taken once, and then said in the file
beside it that ends in `.taken`, whichever process it was.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import sys
import threading
from pathlib import Path

start_new_thread = _thread.start_new_thread

ROLES = (  # by what stands in the command line
    (("vmr_agent.cli.start", "run"), "daemon"),
    (("vmr_agent.cli.start", "reset"), "reset"),
    (("vmr_agent.cli.host", "collect"), "collector"),
    (("vmr_agent.host.renderer",), "renderer"),
)


KNOWS = {"hold": "shim", "_execute": "script"}
"""Functions of the shim's that have the order, and the role of who comes there."""


def whole(name):
    """Whether a file holds one JSON object, whole: what the daemon takes for a record."""
    try:
        return isinstance(json.loads(Path(name).read_bytes()), dict)
    except (OSError, ValueError):
        return False


def size(name):
    try:
        return os.stat(name).st_size
    except OSError:
        return 0


class Killer:
    def __init__(self, plan):
        self.plan = plan
        self.place = {}  # of a shim's run
        self.armed = {}

    def arm(self, role, vmr=""):
        """Be killed at each step of this role that nobody has taken."""
        steps = json.loads(Path(self.plan).read_bytes())
        try:
            lines = Path(self.plan + ".taken").read_bytes().splitlines()
            taken = {json.loads(line)["step"] for line in lines}
        except FileNotFoundError:
            taken = set()
        self.armed = {}
        for name, step in steps.items():
            if step["role"] == role and step["vmr"] == vmr and name not in taken:
                key = step["file"], step["function"]
                self.armed.setdefault(key, []).append({**step, "name": name, "seen": 0})
        # Where there is nothing to be killed at, nothing is looked at: each call would be. A fork server has no role.
        trace = self.trace if self.armed or not role else None
        sys.settrace(trace)
        threading.settrace(trace)
        if role == "shim" and self.armed:
            _thread.start_new_thread = self.start_traced

    def start_traced(self, work, arguments):
        """A shim's threads are none of `threading`, which it doesn't load."""

        def traced():
            sys.settrace(self.trace)
            work(*arguments)

        return start_new_thread(traced, ())

    def trace(self, frame, event, arg):
        code = frame.f_code
        steps = self.armed.get((code.co_filename, code.co_name))
        if steps is None:
            return None
        if code.co_filename.endswith("/guest/shim.py") and code.co_name in KNOWS and not self.place:
            order = frame.f_locals["order"]
            self.place = {"vmr": os.fsdecode(order[3]), "directory": os.fsdecode(order[1])}
            self.arm(KNOWS[code.co_name], self.place["vmr"])
            steps = self.armed.get((code.co_filename, code.co_name), ())
        return self.watch([step for step in steps if step["line"] == code.co_firstlineno])

    def watch(self, steps):
        inside = []

        def local(frame, event, arg):
            nonlocal inside
            at = frame.f_lineno if event == "line" else 0
            if event == "exception":
                inside = []  # it failed, so it was not done
                return local
            now = [step for step in steps if step["first"] <= at <= step["last"]]
            for step in inside:
                # The same line again is the next turn of a loop; within several lines it may be the same one.
                if step["after"] and (step not in now or step["first"] == step["last"]):
                    self.reach(step)
            for step in now:
                if not step["after"] and step not in inside:
                    self.reach(step)
            inside = now
            return local

        return local

    def reach(self, step):
        step["seen"] += 1
        if step["seen"] != step["visit"]:
            return
        sys.settrace(None)
        row = {"step": step["name"], "pid": os.getpid(), **self.place}
        if self.place:
            path = self.place["directory"] + "/"
            row["started"] = whole(path + "started") or whole(path + "starting")
            row["ended"] = whole(path + "exit.json") or whole(path + "exit.json.new")
            row["captured"] = [size(path + "stdout"), size(path + "stderr")]
            row["apart"] = _thread.get_ident() != threading.main_thread().ident
        fd = os.open(self.plan + ".taken", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(fd, json.dumps(row).encode() + b"\n")
        os.kill(os.getpid(), signal.SIGKILL)


def load():
    plan = os.environ.get("VMR_TEST_STEPS")
    if not plan:
        return
    role = next((role for words, role in ROLES if set(words) <= set(sys.orig_argv)), None)
    if role is None:
        return
    if role == "daemon":
        from vmr_agent.guest import runner

        command = runner.fork_server_command()
        runner.fork_server_command = lambda: [*command[:-1], __file__, plan, command[-1]]
    Killer(plan).arm(role)


def main():
    import runpy

    plan, program = sys.argv[1:]
    killer = Killer(plan)
    # Nothing to be killed at before a shim, or who is to be the script, knows whose it is; then it is to be seen.
    killer.arm("")
    for function in KNOWS:
        killer.armed[os.path.join(os.path.dirname(program), "shim.py"), function] = []
    sys.argv[:] = [program]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
else:
    load()
