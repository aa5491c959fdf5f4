"""Reading recorded runs: `read_trace` takes a file or a folder of any known format. How a format is added: base.py."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from kvcomm.errors import InputError
from kvcomm.replay.calls import Call
from kvcomm.replay.readers.base import Around, BadRecord, Format, NoText, Problem, Record, clean
from kvcomm.replay.readers.documents import records
from kvcomm.replay.readers.jsonl import Jsonl
from kvcomm.replay.readers.langsmith import LangSmith
from kvcomm.replay.readers.openinference import OpenInference
from kvcomm.replay.readers.otel import OTel
from kvcomm.replay.readers.sessions import in_sessions

__all__ = ["FORMATS", "Problem", "Trace", "read_trace"]

FORMATS: tuple[type[Format], ...] = (OpenInference, OTel, LangSmith, Jsonl)  # the first that fits reads the record
ENDINGS = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz")  # of files in a folder
SHOWN = 20  # problems that are kept; all are counted


class Trace:
    """The calls of a trace, to be iterated once; what was left out is known afterwards. Mutable while it is read.

    Iterating raises InputError where the trace holds no call that can be used, or (strict) at the first problem.
    """

    def __init__(self, path: Path, *, strict: bool) -> None:
        self.path, self.strict = path, strict
        self.problems: list[Problem] = []  # the first ones
        self.skipped = 0  # all of them
        self.formats: Counter[str] = Counter()  # calls by format
        self.records = 0
        self.unknown = 0  # of no known format
        self._passed = 0  # files of the folder that are not read
        self._calls = in_sessions(self._found())

    @property
    def name(self) -> str:
        """Of the file or folder, as text."""
        return clean(self.path.name)

    def __iter__(self) -> Iterator[Call]:
        return self._calls

    def _report(self, problem: Problem) -> None:
        if self.strict:
            raise InputError(str(problem))
        self.skipped += 1
        if len(self.problems) < SHOWN:
            self.problems.append(problem)

    def _found(self) -> Iterator[Call | Around]:
        for path in self._files():
            yield from self._file(path)
        if not self.formats.total():
            if not self.records + self.skipped:
                others = f"{self._passed} files, none named {', '.join(ENDINGS[:3])} (or .gz)"
                raise InputError(f"{self.path}: {others if self._passed else 'there is nothing in it'}")
            if not self.problems:
                raise InputError(
                    f"{self.path}: {self.records} records, and none of them is a call of a model with its messages"
                )
            names = ", ".join(f.name for f in (kind() for kind in FORMATS))
            more = f" (and {self.skipped - 1} more)" if self.skipped > 1 else ""
            raise InputError(f"{self.path}: no call of a model that can be read as {names}. {self.problems[0]}{more}")

    def _file(self, path: Path) -> Iterator[Call | Around]:
        formats: list[Format] = [kind() for kind in FORMATS]
        calls = 0
        try:
            for record, where in records(path, self._report):
                self.records += 1
                format_ = next((f for f in formats if f.fits(record)), None)
                if format_ is None:
                    self.unknown += 1
                    self._report(Problem(where, f"no known format: {_outline(record)}"))
                    continue
                try:
                    found = format_.read(record, where)
                except (BadRecord, RecursionError) as e:
                    self._report(Problem(where, str(e)))
                    continue
                except NoText as e:
                    if not calls:
                        raise
                    self._report(Problem(where, str(e)))
                    continue
                new = sum(isinstance(thing, Call) for thing in found)
                self.formats[format_.name] += new
                calls += new
                yield from found
        except NoText as e:
            if path == self.path:
                raise InputError(f"{path.name}: {e}") from None
            self._report(Problem(path.name, str(e)))
        except OSError as e:
            if path == self.path:
                raise InputError(f"{path} cannot be read: {e.strerror or e}") from None
            self._report(Problem(path.name, f"cannot be read: {e.strerror or e}"))

    def _files(self) -> Iterator[Path]:
        """The file, or those of the folder and the folders in it, by name; links to folders are not followed."""
        if self.path.is_file():
            yield self.path
            return
        if not self.path.is_dir():
            what = "is no file and no folder" if self.path.exists() else "does not exist"
            raise InputError(f"{self.path} {what}")
        for folder, inner, names in os.walk(self.path, onerror=self._unreadable):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                if name.startswith(".") or not path.is_file():
                    continue
                if name.lower().endswith(ENDINGS):
                    yield path
                else:
                    self._passed += 1

    def _unreadable(self, error: OSError) -> None:
        self._report(Problem(str(error.filename), f"cannot be read: {error.strerror}"))


def read_trace(path: str | os.PathLike[str], *, strict: bool = False) -> Trace:
    """The calls of a file or folder, session by session; nothing is read before the first one is asked for.

    The format is found by what the records hold. A record that cannot be used is left out and counted in the trace's
    `skipped`; with `strict` it raises InputError.
    """
    return Trace(Path(path), strict=strict)


def _outline(record: Record) -> str:
    keys = sorted(str(k) for k in record)
    return "an empty object" if not keys else f"an object with {', '.join(k[:40] for k in keys[:6])}{' ...' * (len(keys) > 6)}"
