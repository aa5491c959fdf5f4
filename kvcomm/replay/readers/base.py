"""The contract of a reader of traces: records come in, calls go out.

A record is one JSON object that stands for one thing that happened: a line, a span, a run. Finding the records of a file
(lines or one document, however large), their order, and what they leave unsaid is no reader's business: `documents` and
`sessions` do it for all of them.

A new format in six lines, in a file of its own, and its class in `FORMATS` of `kvcomm/replay/readers/__init__.py`:

    class Mine:
        name = "mine"
        def fits(self, record):                      # only by what it holds, never by the file's name
            return "my_prompt" in record
        def read(self, record, where):               # BadRecord("my_prompt is a number") for one that cannot be used
            return [Call(record["run"], record["who"], messages(record["my_prompt"]), record["answer"], where=where)]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvcomm.errors import InputError
from kvcomm.replay.calls import Call

__all__ = ["Around", "BadRecord", "Format", "NoText", "Problem", "Record", "clean"]

Record = Mapping[str, Any]


def clean(value: str) -> str:
    """Half a surrogate pair, which JSON allows and UTF-8 does not, becomes a question mark."""
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-8", "replace").decode()
    return value


class BadRecord(Exception):
    """This record cannot be used; the text says why. It is counted and left out, and the others are read."""


class NoText(InputError):
    """The whole trace cannot be used: its prompts are not in it."""


@dataclass(frozen=True)
class Problem:
    """Something of a trace that was left out."""

    where: str  # file:line, or file and the record's number
    reason: str

    def __post_init__(self) -> None:
        for name in ("where", "reason"):  # they quote file names and keys
            object.__setattr__(self, name, clean(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Around:
    """A span that is no call of a model, but says whose the calls inside it are."""

    trace: str
    id: str
    parent: str | None
    session: str = ""
    agent: str = ""


class Format(Protocol):
    """One format. Made anew for every file, so it may remember what it read. A call's agent or session may stay empty where
    the record does not say it; `extra["trace"]` then names the trace whose `Around` may.
    """

    name: str

    def fits(self, record: Record) -> bool:
        """Is this a record of the format, of a model's call or of anything else? Never raises."""
        ...

    def read(self, record: Record, where: str) -> Sequence[Call | Around]:
        """What a fitting record holds; empty for one that is no call. Raises BadRecord, or NoText for the whole trace."""
        ...
