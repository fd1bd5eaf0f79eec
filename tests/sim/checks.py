"""What lives here: what must hold, at each step and at the end of a history.

It must not know: how any of it is done; it looks at disks, at frames, and at what scripts really wrote.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, AnyStr, Optional

from tests.sim.disk import Directory, Disk, File, Link
from tests.sim.guest import STATE, Script
from tests.sim.host import LOGS, VM
from vmr_agent.host import quota
from vmr_agent.host.journal import LIFE, Kind, records
from vmr_agent.runs import RunState, Stream, Trigger, run_path
from vmr_agent.schedule import start_time_of
from vmr_agent.wire import framing, messages

_HEADER = framing.HEADER.size
_OUTPUT = b"\x89\xa4type\xa6output"
_LOG = re.compile(rb"\[[^]]*\] (?P<name>.*?) \((?P<pid>\d+)\) (?P<stream>stdout|stderr): (?P<data>b['\"].*)")


class Checks:
    def __init__(self, world: Any) -> None:
        self.world = world
        self.executions: list[Script] = []
        self.by_run: dict[bytes, list[Script]] = {}
        self.gaps: dict[tuple[bytes, int], list[tuple[int, int]]] = {}
        """Of each stream of a run, by the guest's own words."""
        self.acked: dict[tuple[int, bytes], tuple[int, int, int]] = {}
        """By the number of the life and run: the most that the host has said it holds."""
        self.labels: dict[bytes, tuple[bytes, int]] = {}
        self.exits: dict[tuple[bytes, bytes], messages.Exit] = {}

    # --- a script begins

    def executed(self, script: Script) -> None:
        world, vm = self.world, script.vm
        name = f"{script.vmr.decode()} attempt {script.attempt}"
        world.say(f"{name} executes (pid {script.pid})")
        path = f"{STATE}/runs/{run_path(script.vmr, script.attempt)}"
        row = self.record(vm.disk, path, "started", "starting", durable=True)
        if row is None or bytes.fromhex(row["run"]["run"]) != script.run:
            world.violated(f"{name} executes, and a power cut would leave nothing that says so")
            return
        if vm.disk.find(f"{STATE}/open/{script.run.hex()}", durable=True) is None:
            world.violated(f"{name} executes, and a power cut would take its link in open/")
        for other in self.by_run.get(script.run, []):
            if other.timeline == script.timeline:
                world.violated(f"{name} executes twice")
        info = row["run"]
        trigger = Trigger(info["trigger"])
        same = [
            each for each in self.executions if each.vmr == script.vmr and each.timeline == script.timeline
        ]
        self._cause(script, trigger, same, name)
        if trigger in (Trigger.SCHEDULE, Trigger.REBOOT):
            self._turn(script, info, name)
        script.trigger, script.holds = trigger, bool(info["holds"])  # type: ignore[attr-defined]
        self.executions.append(script)
        self.by_run.setdefault(script.run, []).append(script)

    def goes_on(self, script: Script) -> None:
        """One that a snapshot caught in mid-run: what had come to the spool is its beginning."""
        world, earlier = self.world, self.by_run[script.run][-1]
        world.say(f"{script.vmr.decode()} attempt {script.attempt} goes on (pid {script.pid})")
        for stream in Stream:
            path = f"{STATE}/runs/{run_path(script.vmr, script.attempt)}/{stream.filename}"
            node = script.vm.disk.find(path)
            if isinstance(node, File):  # of what is pruned the spool has zeros
                script.written[stream] += (
                    earlier.written[stream][: node.punched] + node.content[node.punched :]
                )
        script.trigger, script.holds = earlier.trigger, earlier.holds  # type: ignore[attr-defined]
        # In its place: it was executed once.
        self.executions = [each for each in self.executions if each is not earlier] + [script]
        self.by_run[script.run].append(script)

    def _cause(self, script: Script, trigger: Trigger, same: list[Script], name: str) -> None:
        """No VMR runs twice without cause."""
        world = self.world
        earlier = [each for each in same if each.trigger is trigger]  # type: ignore[attr-defined]
        scheduled = [each for each in same if each.trigger in (Trigger.SCHEDULE, Trigger.REBOOT)]  # type: ignore[attr-defined]
        if trigger is Trigger.REBOOT and scheduled and scheduled[-1].boot == script.boot:
            world.violated(f"{name} executes for a reboot that has not happened")
        causes = {
            Trigger.SCHEDULE: world.stagings.get(script.vmr, 0),
            Trigger.HOST: world.reruns_asked.get(script.vmr, 0),
            Trigger.RERUN: world.reruns_asked.get(script.vmr, 0),
            Trigger.REBOOT: world.asked_reboot.get(script.vmr, 0),
        }[trigger]
        if len(earlier) >= causes:
            world.violated(f"{name} executes by {trigger.value} though there is no cause (left of {causes})")

    def _turn(self, script: Script, info: dict[str, Any], name: str) -> None:
        """The barriers."""
        world, vm = self.world, script.vm
        at = start_time_of(script.vmr)
        configured = vm.disk.find(f"{STATE}/configured", durable=True) is not None
        if at > 0:
            zero = json.loads(vm.disk.content(f"{STATE}/zero.json", durable=True) or b"null")
            if not configured or zero is None:
                world.violated(f"{name} executes before the VM is configured and knows time zero")
            elif zero["boot_id"] == vm.boot and vm.boottime_ns() < zero["boottime_ns"] + at * 1e9:
                world.violated(f"{name} executes too early")
            return
        held = world.held_since
        if held is not None and info["created_ns"] > held + 10**9 and "clock" not in world.happened:
            world.violated(f"{name} was begun under .hold")
        if not info["holds"]:
            return
        for other in self.executions:
            there = start_time_of(other.vmr)
            scheduled = other.trigger in (Trigger.SCHEDULE, Trigger.REBOOT)  # type: ignore[attr-defined]
            if other.timeline != script.timeline or there > 0 or there == at or not scheduled:
                continue
            if other.alive and other.executes and other.holds:  # type: ignore[attr-defined]
                world.violated(f"{name} executes beside {other.vmr.decode()}")
            if there < at and not other.alive and other.holds:  # type: ignore[attr-defined]
                path = f"{STATE}/runs/{run_path(other.vmr, other.attempt)}"
                if self.record(vm.disk, path, "exit.json", "exit.json.new", durable=True) is None:
                    world.violated(f"{name} executes on an end of {other.vmr.decode()} that isn't durable")
        executed = {each.vmr for each in self.executions if each.timeline == script.timeline}
        for first in world.staged_first:
            if start_time_of(first) < at and first not in executed and not self._begun(vm.disk, first):
                world.violated(f"{name} executes before {first.decode()}, which has not run")

    def _begun(self, disk: Disk, vmr: bytes) -> bool:
        directory = disk.find(f"{STATE}/runs/{run_path(vmr, 1)}".rpartition("/")[0])
        return isinstance(directory, Directory) and any(
            isinstance(each, Directory) and ("exit.json" in each.names) for each in directory.names.values()
        )

    @staticmethod
    def record(disk: Disk, directory: str, *names: str, durable: bool = False) -> Optional[dict[str, Any]]:
        for name in names:
            content = disk.content(f"{directory}/{name}", durable=durable)
            try:
                row = json.loads(content) if content else None
            except ValueError:
                row = None
            if isinstance(row, dict):
                return row
        return None

    def durable(self, directory: Directory, what: str, lengths: dict[Stream, int]) -> None:
        """What a shim says to be on the disk is there; of a full disk's run it may hold the rest itself."""
        for stream, length in lengths.items():
            node = directory.names.get(stream.filename)
            if not isinstance(node, File):
                continue
            if "guest disk full" in self.world.happened:
                length = min(length, len(node.content))
            held = node.durable[:length]
            if len(held) < length or held[node.punched :] != node.content[node.punched : length]:
                self.world.violated(
                    f"{what} counts {length} bytes of {stream.filename}, and a power cut would take some"
                )

    # --- frames

    def guest_sent(self, payload: bytes) -> None:
        if payload.startswith(_OUTPUT):
            return
        message = messages.unpack(payload).message
        if isinstance(message, messages.Run):
            self.labels[message.run] = (message.vmr, message.attempt)
        elif isinstance(message, messages.Gap):
            self._gap(message)
        elif isinstance(message, messages.Exit):
            self._exit(message)

    def _gap(self, message: messages.Gap) -> None:
        label = self.labels[message.run]
        self.world.say(
            f"gap: {label[0].decode()} {message.stream} {message.offset}+{message.length} {message.reason}"
        )
        key = (message.run, message.stream)
        self.gaps.setdefault(key, []).append((message.offset, message.offset + message.length))
        stream = Stream(message.stream)
        node = self.world.vm.disk.find(f"{STATE}/runs/{run_path(*label)}/{stream.filename}")
        begin, end = message.offset, message.offset + message.length
        noted = self.world.vm.disk.find(f"{STATE}/runs/{run_path(*label)}/pruned")
        pruned = int(noted.target.split()[message.stream - 1]) if isinstance(noted, Link) else 0
        if isinstance(node, File) and any(node.content[max(begin, pruned) : end]):
            self.world.violated(f"a gap is told of bytes that the spool has, from {begin} on")
        row = self.record(self.world.vm.disk, f"{STATE}/runs/{run_path(*label)}", "exit.json")
        counted = row[stream.filename] if row is not None and row["ending"] in ("code", "signal") else 0
        if message.offset < counted and not self._may_lose(node, message, pruned):
            self.world.violated(f"bytes that {label[0].decode()}'s end counts are lost")

    def _may_lose(self, node: Any, message: messages.Gap, noted: int) -> bool:
        """Whether what an end counts may be missing: held in memory for want of space, or pruned before.

        It counts as pruned when that is noted: a power cut may undo the hole and not the note.
        """
        happened = self.world.happened
        end = message.offset + message.length
        pruned = end <= noted
        dropped = self.world.plan.drop and isinstance(node, File) and end <= len(node.content)
        return pruned or dropped or "guest disk full" in happened

    def _exit(self, message: messages.Exit) -> None:
        label = self.labels[message.run]
        path = f"{STATE}/runs/{run_path(*label)}"
        disk = self.world.vm.disk
        if self.record(disk, path, "exit.json", "exit.json.new", durable=True) is None:
            self.world.violated(f"the end of {label[0].decode()} is told before it is durable")

    def host_sent(self, frame: bytes) -> None:
        message = messages.unpack(frame[_HEADER:]).message
        guest = self.world.host.guest
        if not isinstance(message, messages.Ack) or guest is None or guest.store._life is None:
            return
        label = self.labels.get(message.run)
        if label is None:
            return
        key = (guest.store._life.number, message.run)
        state, out, err = self.acked.get(key, (0, 0, 0))
        name = f"{label[0].decode()} attempt {label[1]}"
        if (message.state, message.stdout, message.stderr) != (state, out, err):
            self.world.say(f"ack: {name} {message.state} {message.stdout} {message.stderr}")
        # After a power cut that took the last mark it holds, for a moment, more than it says.
        held = guest.store._life._runs.get(message.run)
        says = (message.state, message.stdout, message.stderr)
        if held is not None:
            says = (
                max(says[0], held.state),
                *(max(a, s.held) for a, s in zip(says[1:], held.streams.values())),
            )  # type: ignore[assignment]
        if any(now < before for now, before in zip(says, (state, out, err))):
            self.world.violated(
                f"{name}: {(state, out, err)} was acknowledged, and now "
                f"{(message.state, message.stdout, message.stderr)}"
            )
        self.acked[key] = (
            max(state, message.state),
            max(out, message.stdout),
            max(err, message.stderr),
        )
        for stream, length in ((Stream.STDOUT, message.stdout), (Stream.STDERR, message.stderr)):
            if length and message.tails is None:
                path = f"{LOGS}/{VM}/{run_path(*label)}/{stream.filename}"
                held = self.world.host.disk.content(path, durable=True) or b""
                if len(held) < length:
                    self.world.violated(
                        f"{name} {stream.filename}: {length} acknowledged, {len(held)} durable"
                    )
                else:
                    self.compare(message.run, stream, held[:length], name)

    def compare(self, run: bytes, stream: Stream, held: bytes, name: str) -> bool:
        """Whether the bytes are those that some execution of this run wrote, but for gaps."""
        scripts = self.by_run.get(run, [])
        for script in scripts:
            if script.written[stream].startswith(held):
                return True
        gaps = self.gaps.get((run, int(stream)), [])
        for script in scripts:
            if _matches(held, script.written[stream], gaps):
                return True
        if any(held):
            self.world.violated(f"{name} {stream.filename}: {len(held)} bytes that no script wrote")
        return False

    def pruned(self, path: str, upto: int) -> None:
        if not path.endswith(("stdout", "stderr")):
            return
        index = 1 if path.endswith("stdout") else 2
        for (_, run), acked in self.acked.items():
            directory = run_path(*self.labels[run])
            if path == f"{STATE}/runs/{directory}/{path.rpartition('/')[2]}" and acked[index] >= upto:
                return
        self.world.violated(f"{path} is pruned up to {upto}, and the host has not said that it holds it")

    # --- the end

    def delivered(self) -> str:
        """What is still to be delivered or done, when all is well; empty when nothing is."""
        world = self.world
        running = world.vm.daemon
        if running is None or world.host.guest is None:
            return "something doesn't run"
        if any(script.alive for script in world.vm.scripts.values()):
            script = next(script for script in world.vm.scripts.values() if script.alive)
            pipes = [len(pipe.data) for pipe in script.pipes.values()]
            return (
                f"{script.vmr.decode()} runs: {script.steps[:1]} {pipes}, its shim {vars(script.shim.task)}"
            )
        if running._shipper.runs():
            return f"{len(running._shipper.runs())} runs to deliver"
        open_links = world.vm.disk.find(f"{STATE}/open")
        if isinstance(open_links, Directory) and open_links.names:
            targets = [each.target for each in open_links.names.values() if isinstance(each, Link)]
            return f"links in open/: {targets}"
        if not running._link.open:
            return "no session"
        for vmr in world.vm.staged():
            entry = running._supervisor.roster.get(vmr.encode())
            if entry is None or entry.vmr is None:
                return f"{vmr} is not seen"
            if entry.latest is None and start_time_of(entry.name) > 0 and "clock" in world.happened:
                continue  # after a reboot only a clock that was set can tell when its time comes
            # What the host has whole needs no `closed` here: it may have learned of it in another past.
            if entry.latest is None or entry.latest.result() is None:
                return f"{vmr} has not run"
        if not running._spool.configured():
            return "not configured"
        note = self._note()
        if note is None or not self._rendered(note):
            return "the logs are behind"
        return ""

    def quota(self) -> None:
        """A VM takes no more on the host than it may, and what sessions and ends of runs need."""
        world = self.world
        limit = world.plan.quota
        if not limit or world.healing:
            return
        most = limit + max(quota.RESERVE, limit // 16) + 4 * world.plan.constants["chunk"] + 10_000
        top = world.host.disk.find(LOGS)
        taken = sum(_taken(entry) for name, entry in top.names.items() if name.startswith(VM))
        if taken > most:
            world.violated(f"{taken} bytes on the host, and {limit} is the quota")
        if world.host.guest is not None and world.host.guest.over_quota:
            world.happened["over quota"] = 1

    def full_of_history(self) -> bool:
        """Whether scripts wait, or more, for want of room that what always stays has taken."""
        running = self.world.vm.daemon
        spool = running._spool if running is not None else None
        if spool is None or not spool._full or spool._prunable or self.world.vm.settings.overflow_drop:
            return False
        self.world.vm._activate()
        held = {run: running._shipper.acked(run.info.run) for run in spool.open_runs()}
        return all(known is not None and run.lengths() == known[1:] for run, known in held.items())

    def _note(self) -> Optional[dict[str, Any]]:
        content = self.world.host.disk.content(f"{LOGS}/.{VM}.rendered")
        return json.loads(content) if content else None

    def _rendered(self, note: dict[str, Any]) -> bool:
        content = self.world.host.disk.content(f"{LOGS}/{VM}/.journal") or b""
        marked = 0
        for _, kind, body in records(content):
            if kind == Kind.LIFE and LIFE.unpack(body)[0] != note["life"]:
                return False
            if kind == Kind.MARK:
                marked = int.from_bytes(body, "little")
        return bool(note["journal"] >= marked)

    def at_the_end(self) -> None:
        self._guest_is_at_the_host()
        lives = self._lives()
        for (number, run), acked in self.acked.items():
            life = lives.get(number)
            if not any(acked):
                continue
            if life is None:
                self.world.violated(f"life {number} is gone, with what was acknowledged")
                continue
            for stream, length in ((Stream.STDOUT, acked[1]), (Stream.STDERR, acked[2])):
                path = f"{LOGS}/{life}/{run_path(*self.labels[run])}/{stream.filename}"
                held = self.world.host.disk.content(path) or b""
                if len(held) < length:
                    self.world.violated(f"{path} had {length} bytes acknowledged, and has {len(held)}")
                self.compare(run, stream, held, path)
        self._logs(list(lives.values()))

    def _lives(self) -> dict[int, str]:
        found = {}
        for name in self.world.host.lives():
            content = self.world.host.disk.content(f"{LOGS}/{name}/.journal") or b""
            for _, kind, body in records(content):
                if kind == Kind.LIFE:
                    found[LIFE.unpack(body)[0]] = name
                break
        return found

    def _runs(self) -> Iterator[tuple[str, Directory]]:
        """Every run in the guest's spool."""
        top = self.world.vm.disk.find(f"{STATE}/runs")
        for start_time, names in top.names.items():
            for name, attempts in names.names.items():
                for attempt, directory in attempts.names.items():
                    if attempt.isdecimal() and "exit.json" in directory.names:
                        yield f"{start_time}/{name}/{attempt}", directory

    def _guest_is_at_the_host(self) -> None:
        world = self.world
        for path, directory in self._runs():
            ours = json.loads(directory.names["exit.json"].content)
            # Restored to a snapshot of an earlier life's it holds runs that the host has in that one.
            for life in world.host.lives()[::-1]:
                row = self.record(world.host.disk, f"{LOGS}/{life}/{path}", "result.json")
                if row is not None and row["closed"]:
                    break
            else:
                world.violated(f"{path} is over in the guest, and its result.json says {row}")
                continue
            state = {"code": "exited", "signal": "killed", "errno": "failed to start", "lost": "lost"}
            # Set back in time it may have lost what the host saw ending: nothing differs, and the host knows more.
            behind = world.vm.timeline and ours["ending"] == "lost"
            if row["state"] != state[ours["ending"]] and not behind:
                world.violated(f"{path} {ours['ending']} in the guest, {row['state']} at the host")
            gaps = {"stdout": [], "stderr": []}  # type: ignore[var-annotated]
            for gap in row["gaps"]:
                gaps[gap["stream"]].append((gap["offset"], gap["offset"] + gap["length"]))
            for stream in Stream:
                node = directory.names.get(stream.filename)
                spooled = bytes(node.content) if isinstance(node, File) else b""
                begin = node.punched if isinstance(node, File) else 0
                held = world.host.disk.content(f"{LOGS}/{life}/{path}/{stream.filename}") or b""
                if behind and len(held) > len(spooled):
                    # That these are of another past it could only see while it ran, and then it could not note it.
                    continue
                if held[begin : len(spooled)] != spooled[begin:] and not _matches(
                    held[begin : len(spooled)],
                    spooled[begin:],
                    [(a - begin, b - begin) for a, b in gaps[stream.filename]],
                ):
                    world.violated(
                        f"{path} {stream.filename}: the host's {len(held)} bytes are not the spool's"
                    )
                whole = ours["ending"] in ("code", "signal")
                scripts = [
                    s
                    for s in self.executions
                    if run_path(s.vmr, s.attempt) == path and s.timeline == world.vm.timeline
                ]
                capture_ended = (
                    "closed" in directory.names and json.loads(directory.names["closed"].content)["reason"]
                )
                if not whole or not scripts or capture_ended:
                    continue
                wrote, told = scripts[-1].written[stream], gaps[stream.filename]
                if len(held) != len(wrote) or not _matches(held, wrote, told):
                    world.violated(f"{path} {stream.filename}: {len(held)} bytes, {len(wrote)} were written")

    def _logs(self, lives: list[str]) -> None:
        """Each output byte is in `.log`, and its text in `.json`, once and in order."""
        disk = self.world.host.disk
        shown: dict[tuple[int, str], bytearray] = {}
        for line in (disk.content(f"{LOGS}/{VM}.log") or b"").split(b"\n"):
            found = _LOG.fullmatch(line)
            if found:
                key = (int(found["pid"]), found["stream"].decode())
                shown.setdefault(key, bytearray()).extend(ast.literal_eval(found["data"].decode()))
        texts: dict[tuple[str, int, str], str] = {}
        for line in (disk.content(f"{LOGS}/{VM}.json") or b"").splitlines():
            row = json.loads(line)
            at = (row["vmr"], row["attempt"], row["stream"])
            texts[at] = texts.get(at, "") + str(row["msg"])
        stored: dict[tuple[int, str], list[tuple[bytes, bool]]] = {}
        expected: dict[tuple[str, int, str], list[tuple[str, bool]]] = {}
        for life in lives:
            for path, row in self._results(life):
                gaps = [gap for gap in row["gaps"]]
                for stream in Stream:
                    raw = disk.content(f"{LOGS}/{life}/{path}/{stream.filename}") or b""
                    for gap in reversed([g for g in gaps if g["stream"] == stream.filename]):
                        raw = raw[: gap["offset"]] + raw[gap["offset"] + gap["length"] :]
                    # Nobody may ever end it: its VM was set back to before it. A last line may be held back.
                    whole = row["closed"]
                    stored.setdefault((row["pid"], stream.filename), []).append((raw, whole))
                    at = (row["vmr"], row["attempt"], stream.filename)
                    expected.setdefault(at, []).append(("".join(raw.decode().split()), whole))
        for key in sorted(stored.keys() | shown.keys()):
            logged = bytes(shown.get(key, b""))
            if not _in_order(stored.get(key, []), logged):
                sizes = [len(piece) for piece, _ in stored.get(key, [])]
                self.world.violated(f"{key}: {sizes} bytes stored, {len(logged)} in the log")
        for at in sorted(expected.keys() | texts.keys()):
            if not _in_order(expected.get(at, []), "".join(texts.get(at, "").split())):
                self.world.violated(f"{at}: the rows of .json are not what was stored")

    def _results(self, life: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows of a life. After a power cut there may be one that its journal doesn't know."""
        top = self.world.host.disk.find(f"{LOGS}/{life}")
        assert isinstance(top, Directory)
        cut = any("power cut" in what and ("host" in what or "coll" in what) for what in self.world.happened)
        known = self._journaled(life)
        for start_time, names in top.names.items():
            for name, attempts in names.names.items() if isinstance(names, Directory) else ():
                for attempt, directory in attempts.names.items():
                    counts = not cut or (f"{start_time}/{name}".encode(), int(attempt)) in known
                    if counts and "result.json" in directory.names:
                        row = json.loads(directory.names["result.json"].content)
                        yield f"{start_time}/{name}/{attempt}", row

    def _journaled(self, life: str) -> set[tuple[bytes, int]]:
        content = self.world.host.disk.content(f"{LOGS}/{life}/.journal") or b""
        runs = (messages.unpack(body).message for _, kind, body in records(content) if kind == Kind.RUN)
        return {(run.vmr, run.attempt) for run in runs if isinstance(run, messages.Run)}


def _taken(entry: Any) -> int:
    """Bytes that a tree takes; of output, those that are none of a hole."""
    if isinstance(entry, Directory):
        return sum(map(_taken, entry.names.values()))
    return len(entry.content) - entry.content.count(0) if isinstance(entry, File) else 0


def _shared(one: AnyStr, other: AnyStr) -> int:
    """How long the beginning is that they share."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _in_order(pieces: Sequence[tuple[AnyStr, bool]], shown: AnyStr) -> bool:
    """Whether this is one piece after the other, each to its end but those that needn't be whole."""
    ends = {0}
    for piece, whole in pieces:
        if whole:
            ends = {end + len(piece) for end in ends if shown.startswith(piece, end)}
        else:
            ends = {
                end + length
                for end in ends
                for length in range(1 + _shared(piece, shown[end : end + len(piece)]))
            }
    return len(shown) in ends


def _matches(held: bytes, truth: bytes, gaps: list[tuple[int, int]]) -> bool:
    """Whether these are the true bytes, or zeros where a gap was told, in this life or in another."""
    at = 0
    for begin, end in sorted(gaps):
        begin, end = max(begin, at), min(end, len(held))
        if begin >= end:
            continue
        if held[at:begin] != truth[at:begin]:
            return False
        if any(byte not in (0, true) for byte, true in zip(held[begin:end], truth[begin:end])):
            return False
        if any(held[max(begin, len(truth)) : end]):
            return False
        at = end
    return held[at:] == truth[at : len(held)]


assert RunState.CLOSED == 3
