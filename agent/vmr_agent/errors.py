"""What lives here: the one exception that a user sees as a line, and how names are shown.

It must not know: rooms, files, sockets.
"""

from __future__ import annotations

from typing import Optional


class Problem(Exception):
    """Something that can't be done, said in one line: ``vmr-agent: cannot …``.

    ``str()`` is the sentence without the program's name, beginning "cannot …"; ``hint`` says what to do
    about it. Commands catch it at the top; the daemon logs it and goes on.
    """

    def __init__(self, sentence: str, *, hint: Optional[str] = None) -> None:
        super().__init__(sentence)
        self.hint = hint

    def __str__(self) -> str:
        sentence = str(self.args[0])
        return f"{sentence} ({self.hint})" if self.hint else sentence


def show(name: bytes) -> str:
    """A name for people's eyes: bytes that aren't UTF-8, and control characters, as ``\\xNN``.

    VMR names are whatever Linux allows in a file name, so a name may hold a newline or an escape
    sequence; shown raw it could forge a log line.
    """
    text = name.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
