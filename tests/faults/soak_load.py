"""What lives here: the VMRs that the soak runs, and for each attempt the very bytes it prints and how it ends.

It must not know: our processes and files, faults, time. No line of output holds a blank, so that a line shown in
two pieces, as one is whose writer pauses in its middle, is the same text again when its pieces are joined.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Callable, Optional


@dataclass(frozen=True)
class Expected:
    """What one attempt leaves behind."""

    stdout: bytes = b""
    stderr: bytes = b""
    state: str = "exited"
    exit_code: Optional[int] = 0
    signal: Optional[str] = None


@dataclass(frozen=True)
class Program:
    """One VMR as it is staged. ``expect`` says what an attempt of this number does."""

    kind: str
    command: str
    expect: Callable[[int], Expected]
    interpreter: str = "/bin/bash"


Make = Callable[[str, random.Random], Program]


def _lines(form: str, vmr: str, attempt: int, count: int, first: int = 0) -> bytes:
    tag = f"{vmr}.{attempt}"
    return "".join(form.format(tag=tag, n=number) + "\n" for number in range(first, first + count)).encode()


def quick(vmr: str, rng: random.Random) -> Program:
    return Program("quick", 'echo "$TAG"', lambda attempt: Expected(f"{vmr}.{attempt}\n".encode()))


def silent(vmr: str, rng: random.Random) -> Program:
    return Program("silent", ":", lambda attempt: Expected())


def both(vmr: str, rng: random.Random) -> Program:
    count = rng.choice((10, 50, 200, 400))
    command = f'for ((n = 0; n < {count}; n++)); do echo "out.$TAG.$n"; echo "err.$TAG.$n" >&2; done'
    return Program(
        "both streams",
        command,
        lambda attempt: Expected(
            _lines("out.{tag}.{n}", vmr, attempt, count), _lines("err.{tag}.{n}", vmr, attempt, count)
        ),
    )


def bulk(vmr: str, rng: random.Random) -> Program:
    count = rng.choice((2_000, 5_000, 20_000))
    return Program(
        "bulk",
        f'seq -f "bulk.$TAG.%07.0f" 1 {count}',
        lambda attempt: Expected(_lines("bulk.{tag}.{n:07}", vmr, attempt, count, first=1)),
    )


def flood(vmr: str, rng: random.Random) -> Program:
    size = rng.choice((1, 3)) << 20

    def expect(attempt: int) -> Expected:
        line = f"flood.{vmr}.{attempt}\n".encode()
        return Expected((line * (size // len(line) + 1))[:size])

    # yes dies of SIGPIPE, and the pipe's end is head's: 0.
    return Program("flood", f'yes "flood.$TAG" | head -c {size}', expect)


def slow(vmr: str, rng: random.Random) -> Program:
    count, pause = rng.randint(4, 14), rng.choice((0.2, 0.5, 1.2))
    command = f'for ((n = 0; n < {count}; n++)); do echo "slow.$TAG.$n"; sleep {pause}; done'
    return Program("slow", command, lambda attempt: Expected(_lines("slow.{tag}.{n}", vmr, attempt, count)))


def prompt(vmr: str, rng: random.Random) -> Program:
    """A line whose end comes two seconds after its beginning."""
    return Program(
        "prompt",
        'printf "name?"; sleep 2; echo "$TAG"',
        lambda attempt: Expected(f"name?{vmr}.{attempt}\n".encode()),
    )


def leaver(vmr: str, rng: random.Random) -> Program:
    """Leaves a child behind that holds the pipes, and prints something long after the exit."""
    pause = rng.choice((0.3, 1.5, 4.0))
    setsid = rng.choice(("", "setsid "))
    command = f'{setsid}bash -c "sleep {pause}; echo late.$TAG; echo late.$TAG >&2" & echo "now.$TAG"'

    def expect(attempt: int) -> Expected:
        late = f"late.{vmr}.{attempt}\n".encode()
        return Expected(f"now.{vmr}.{attempt}\n".encode() + late, late)

    return Program("leaves a daemon", command, expect)


def failing(vmr: str, rng: random.Random) -> Program:
    code = rng.randint(20, 200)
    return Program(
        "fails",
        f'echo "$TAG" >&2; exit {code}',
        lambda attempt: Expected(b"", f"{vmr}.{attempt}\n".encode(), exit_code=code),
    )


def killed(vmr: str, rng: random.Random) -> Program:
    name = rng.choice(("SEGV", "TERM", "KILL", "ABRT"))
    return Program(
        "dies of a signal",
        f'echo "$TAG"; ulimit -c 0; kill -{name} $$; sleep 5',
        lambda attempt: Expected(
            f"{vmr}.{attempt}\n".encode(), state="killed", exit_code=None, signal=f"SIG{name}"
        ),
    )


def unstartable(vmr: str, rng: random.Random) -> Program:
    return Program(
        "can't start",
        "echo never",
        lambda attempt: Expected(state="failed to start", exit_code=None),
        interpreter="/no/such/interpreter",
    )


def raw(vmr: str, rng: random.Random) -> Program:
    """Bytes that are no text, no newline at their end; one write, so that no reader sees half of them."""
    data = bytes([0xEF, *(rng.choice((0, 7, 0x1B, *range(0x80, 0x100))) for _ in range(rng.randint(1, 500)))])
    data = data[: len(data) // 2] + b"\n" + data[len(data) // 2 :]
    escaped = "".join(f"\\x{byte:02x}" for byte in data)
    return Program("not UTF-8", f"printf '{escaped}'", lambda attempt: Expected(data))


KINDS: dict[Make, int] = {
    quick: 26,
    silent: 4,
    both: 20,
    bulk: 7,
    flood: 2,
    slow: 7,
    prompt: 3,
    leaver: 9,
    failing: 7,
    killed: 4,
    unstartable: 3,
    raw: 8,
}
"""How often each is staged."""

VERB_KINDS = ("quick", "both streams", "not UTF-8", "silent")
"""What the verb of the command line is tried with: quick, and it ends with 0."""


def program(vmr: str, rng: random.Random) -> Program:
    (make,) = rng.choices(list(KINDS), list(KINDS.values()))
    return make(vmr, rng)
