"""What a replay writes down, and where it goes on: one line of JSON per call, behind a line that says of what.

A call's line is written when all policies have served it, and is flushed to the disk; a line that was cut while it was written
is dropped when the file is opened again. Whoever writes holds a lock on the file, which goes with the process. The same rows go
into a CSV at the end.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Self

from kvcomm.errors import InputError
from kvcomm.segments import RUNGS

__all__ = ["FAILED", "Log", "Outcome", "Row", "write_csv"]

SCHEMA = "kvcomm.replay.calls/1"
FAILED = "failed: "  # how the reason of a row begins that is tried again


@dataclass(frozen=True)
class Outcome:
    """One call under one policy. What it is compared with is dense on the same prompt and the same answer."""

    ttft_ms: float | None
    reused_tokens: int
    tokens_by_rung: Mapping[str, int]
    prompt_tokens: int
    answer_tokens: int
    fallback: str | None = None
    positions: int = 0  # of the answer, compared
    kl_first: float | None = None  # nats, of dense from this; None: not compared
    kl_early: float | None = None
    kl: float | None = None
    top1_first: bool | None = None
    top1_early: float | None = None
    top1: float | None = None
    differs: Sequence[Sequence[Any]] = ()  # position, text in front, dense's choice, this one's, text that came
    text: str | None = None  # what was said, where outputs flow
    same_text: bool | None = None  # as dense said in the same place


@dataclass(frozen=True)
class Row:
    """One call."""

    number: int
    session: str
    agent: str
    id: str
    where: str
    hop: int
    reads: Sequence[int]  # numbers of the calls whose output it reads
    skipped: str | None = None  # why it was not served
    changes: Mapping[str, int] = field(default_factory=dict)  # what was done to be readable for the model: messages
    policies: Mapping[str, Outcome] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """The model could not do it here; elsewhere it may."""
        return self.skipped is not None and self.skipped.startswith(FAILED)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Row:
        """From a line. Raises TypeError or KeyError where it is not one."""
        return cls(**{**data, "policies": {name: Outcome(**found) for name, found in data["policies"].items()}})


class Log:
    """The rows of one replay. Mutable; nobody else writes to its file until it is closed."""

    def __init__(self, path: Path | None, head: Mapping[str, object]) -> None:
        """Reads what is there of the same replay, and cuts a broken end off. `head` says what the replay is of; without a path
        nothing is written. Raises InputError where `path` cannot be written, another replay is writing there, or it holds the
        rows of another replay, or something else.
        """
        self.path, self.head = path, {"schema": SCHEMA, **json.loads(json.dumps(head))}
        self.rows: dict[int, Row] = {}
        self._file = None if path is None else _locked(path)
        try:
            if path is not None:
                self._go_on(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, row: Row) -> None:
        self.rows[row.number] = row
        self._append(asdict(row))

    def _go_on(self, path: Path) -> None:
        whole = path.read_bytes()
        kept = whole.rfind(b"\n") + 1  # what is behind was cut while it was written
        if kept:
            self._read(whole[:kept].splitlines())
        elif whole and not json.dumps(self.head).encode().startswith(whole):
            raise InputError(f"{path} is no log of a replay; give another --output")
        if kept < len(whole):
            os.truncate(path, kept)
        if not kept:
            self._append(self.head)

    def _read(self, lines: Sequence[bytes]) -> None:
        try:
            head, *rows = (json.loads(line) for line in lines)
            found = {row.number: row for row in map(Row.parse, rows)}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{self.path} is no log of a replay ({error}); give another --output") from error
        if not isinstance(head, dict) or head != self.head:
            raise InputError(f"{self.path} holds another replay: {_difference(head, self.head)}; give another --output")
        self.rows = {number: row for number, row in found.items() if not row.failed}

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, ensure_ascii=True, allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _locked(path: Path) -> BinaryIO:
    """The file, to be written on at its end; the lock goes when it is closed, or with the process."""
    import fcntl  # here, so that a system without it can import the package

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; give another --output") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        why = "another replay is writing here" if isinstance(error, BlockingIOError) else f"no lock: {error.strerror}"
        raise InputError(f"{path}: {why}; wait for its end or give another --output") from error
    return file


def _difference(there: object, here: Mapping[str, object]) -> str:
    if not isinstance(there, dict):
        return "its first line does not say of what"
    name = next(name for name in [*here, *there] if there.get(name) != here.get(name))
    old, new = there.get(name), here.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
        if old.keys() != new.keys():
            return f"its {name} are {', '.join(old)}, and now {', '.join(new)}"
        return f"{name}: {_difference(old, new)}"
    return f"its {name} is {old!r}, and now {new!r}"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """A line per call and policy; a call that was skipped has one line, without a policy."""
    plain = [f.name for f in fields(Outcome) if f.name not in ("tokens_by_rung", "differs", "text")]
    names = ["number", "session", "agent", "id", "hop", "skipped", "policy", *plain, *(f"{rung}_tokens" for rung in RUNGS)]
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, names, restval="")
        out.writeheader()
        for row in rows:
            facts = {name: getattr(row, name) for name in names[:6]}
            if not row.policies:
                out.writerow(facts)
            for policy, outcome in row.policies.items():
                rungs = {f"{rung}_tokens": outcome.tokens_by_rung.get(rung, 0) for rung in RUNGS}
                out.writerow({**facts, "policy": policy, **{name: getattr(outcome, name) for name in plain}, **rungs})
