"""The records of a file: of JSON lines, or inside one JSON document of any size, gzipped or not, in bounded memory.

A document that only wraps others (`{"resourceSpans": [{"scopeSpans": [{"spans": [...]}]}]}`, a list, `{"runs": [...]}`) is
opened and never held. Knows nothing of what records mean. What cannot be read is reported and left out; after a broken line
the next one is read, after broken JSON in one document nothing is.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

from kvcomm.replay.readers.base import Problem, Record, clean

__all__ = ["MAX_DEPTH", "MAX_RECORD", "records"]

MAX_RECORD = 16 << 20  # bytes of one record: four million tokens, more than any model reads
MAX_DEPTH = 200  # brackets in brackets
HEAD = 1 << 20  # bytes that are looked at to tell lines from a document
OTLP = ("resourceSpans", "resource_spans", "scopeSpans", "scope_spans", "instrumentationLibrarySpans")
LOGS = ("resourceLogs", "resource_logs", "scopeLogs", "scope_logs", "logRecords", "log_records")
WRAPPERS = (*OTLP, *LOGS, "spans", "traces", "runs", "child_runs", "data")
OWN = ("attributes", "messages", "run_type")  # an object with one of these is a record, even where it holds others
BOM = b"\xef\xbb\xbf"  # that some editors begin a file with
UNPACKING = (EOFError, gzip.BadGzipFile, zlib.error)
Report = Callable[[Problem], None]


def records(path: Path, report: Report) -> Iterator[tuple[Record, str]]:
    """Every record of a file and its place, in file order. Raises OSError where the file cannot be opened."""
    with path.open("rb") as raw:
        zipped = raw.peek(2)[:2] == b"\x1f\x8b"
        file = _Limited(gzip.GzipFile(fileobj=raw) if zipped else raw)
        try:
            found = _lines if _is_lines(*file.peek()) else _document
            yield from found(file, clean(path.name), report)
        except UNPACKING as e:
            report(Problem(path.name, f"the rest cannot be unpacked: {e}"))


class _Limited:
    """A file that is read forwards; what was read since `begin` is bounded when a parser asks for more."""

    def __init__(self, file: BufferedReader | gzip.GzipFile) -> None:
        self._file, self._head, self._at, self._taken = file, b"", 0, 0
        self._broken: Exception | None = None

    def peek(self) -> tuple[bytes, bool]:
        """The beginning, and whether it is all there is: HEAD bytes, and as many again while an object's line has no end."""
        parts: list[bytes] = []
        missing = HEAD
        try:
            while missing > 0 and (part := self._file.read1(missing)):
                parts.append(part)
                missing -= len(part)
                if not missing and _one_line(parts) and sum(map(len, parts)) < MAX_RECORD:
                    missing = HEAD
        except UNPACKING as e:
            self._broken = e  # what is there is read first
        self._head = b"".join(parts).removeprefix(BOM)
        return self._head, missing > 0

    def begin(self) -> None:
        self._taken = 0

    def read(self, size: int = -1) -> bytes:
        if size == 0:
            return b""
        size = min(size if size > 0 else HEAD, HEAD)
        self._taken += size
        if self._taken > MAX_RECORD + 2 * HEAD:
            raise _TooLarge
        if self._at < len(self._head):
            self._at += size
            return self._head[self._at - size : self._at]
        self._head, self._at = b"", 0
        return self._rest().read(size)

    def _rest(self) -> BufferedReader | gzip.GzipFile:
        if self._broken:
            raise self._broken
        return self._file

    def lines(self) -> Iterator[tuple[int, bytes, bool]]:
        """Every line with its number, and whether it is whole; of one longer than MAX_RECORD there is only the beginning.

        Blank lines may be left out.
        """
        *head, line = self._head.split(b"\n")
        self._head = b""
        yield from ((number, text, True) for number, text in enumerate(head, 1))
        number = len(head)
        line += self._rest().readline(max(0, MAX_RECORD - len(line)))
        while line:
            number += 1
            whole = line.endswith(b"\n") or len(line) < MAX_RECORD
            yield number, line, whole
            while not whole:
                rest = self._file.readline(HEAD)
                whole = rest.endswith(b"\n") or not rest
            line = self._file.readline(MAX_RECORD)
            while line == b"\n" and (blank := self._file.peek(HEAD)[:HEAD]).startswith(b"\n"):  # many at once
                count = len(blank) - len(blank.lstrip(b"\n"))
                number += count
                self._file.read(count)


class _TooLarge(Exception):
    pass


def _one_line(parts: list[bytes]) -> bool:
    """Do these begin an object whose line goes on?"""
    return parts[0].removeprefix(BOM).startswith(b"{") and not any(b"\n" in part for part in parts)


def _is_lines(head: bytes, complete: bool) -> bool:
    """One JSON object a line, and not a document over several or one very long line: is there a line that is one by itself?

    A first line that is broken, or too long to tell, is one of many unless it begins as documents do.
    """
    whole = head.split(b"\n")[: None if complete else -1]
    if any(isinstance(_parsed(line), dict) for line in whole if line.startswith(b"{")):
        return True
    if head.startswith(b"{") and head.find(b"\n", 0, HEAD) < 0 and len(head) >= HEAD:
        return not _wraps(head[:HEAD])
    return not any(line.startswith(b"{") for line in whole) and head.lstrip()[:1] not in (b"[", b"{")


def _wraps(head: bytes) -> bool:
    """Is the object that begins here a wrapper, by the first of its keys that tells?"""
    import ijson

    depth = 0
    try:
        for event, value in ijson.basic_parse(BytesIO(head)):
            depth += (event in ("start_map", "start_array")) - (event in ("end_map", "end_array"))
            if depth > MAX_DEPTH or (depth == 1 and event == "map_key" and value in OWN):
                return False
            if depth == 1 and event == "map_key" and value in WRAPPERS:
                return True
    except (ijson.JSONError, UnicodeDecodeError, ValueError):
        pass  # the head ends in the middle
    return False


def _parsed(line: bytes) -> Any:
    """The line's JSON, or a text that says what is wrong with it."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as e:
        return f"not UTF-8 at byte {e.start}"
    except json.JSONDecodeError as e:
        return f"not JSON: {e.msg} at character {e.pos}"
    except RecursionError:
        return "brackets too deep"
    except ValueError as e:  # a number of more digits than Python reads
        return f"not JSON: {e}"


def _lines(file: _Limited, name: str, report: Report) -> Iterator[tuple[Record, str]]:
    for number, line, whole in file.lines():
        where = f"{name}:{number}"
        if not line.strip():
            continue
        value = _parsed(line) if whole else f"longer than {MAX_RECORD >> 20} MiB"
        if isinstance(value, Mapping):
            inside = list(_opened(value))
            yield from ((r, where if len(inside) == 1 else f"{where}, record {i}") for i, r in enumerate(inside, 1))
        else:
            says = isinstance(value, str) and not line.lstrip().startswith(b'"')
            report(Problem(where, value if says else f"a {type(value).__name__}, not an object"))


def _opened(value: Any) -> Iterator[Record]:
    """The records in a parsed document that may wrap others."""
    stack = [value]
    while stack:
        top = stack.pop()
        if isinstance(top, list):
            stack += reversed(top)
        elif isinstance(top, Mapping):
            record = any(k in top for k in OWN)
            inside = [top[k] for k in (("child_runs",) if record else WRAPPERS) if isinstance(top.get(k), list | Mapping)]
            if record or not inside:
                yield top
            stack += reversed(inside)


def _document(file: _Limited, name: str, report: Report) -> Iterator[tuple[Record, str]]:
    """Records inside one document, or several in a row, as its parser gives them."""
    import ijson

    number = 0
    try:
        for record in _walk(ijson.basic_parse(file, multiple_values=True, use_float=True), file):
            number += 1
            yield record, f"{name}, record {number}"
    except _TooLarge:
        report(Problem(f"{name}, record {number + 1}", f"longer than {MAX_RECORD >> 20} MiB; nothing behind it was read"))
    except _TooDeep:
        report(Problem(f"{name}, record {number + 1}", f"more than {MAX_DEPTH} brackets deep; nothing behind it was read"))
    except (ijson.JSONError, UnicodeDecodeError, ValueError) as e:
        reason = str(e).removeprefix("b'").partition("\n")[0].partition("\\n")[0]
        report(Problem(f"{name}, record {number + 1}", f"not JSON: {reason}; nothing behind it was read"))


class _TooDeep(Exception):
    pass


_Events = Iterator[tuple[str, Any]]


def _walk(events: _Events, file: _Limited) -> Iterator[Record]:
    """Objects that stand in nothing but lists and wrappers; inner ones first."""
    open_: list[tuple[dict[str, Any], bool]] = []  # objects begun on the way: what they hold themselves, and whether they wrap
    key = ""
    for event, value in events:
        if open_ and event in ("start_map", "start_array"):
            open_[-1] = (open_[-1][0], True)
        if event == "start_map":
            open_.append(({}, False))
        elif event == "end_map":
            own, wraps = open_.pop()
            if not wraps or any(k in own for k in OWN):
                yield own
            file.begin()
        elif event == "map_key":
            key = value
            if key not in WRAPPERS:
                own, _ = open_[-1]
                own[key] = _built(events)
        if len(open_) > MAX_DEPTH:
            raise _TooDeep


def _built(events: _Events) -> Any:
    """The next value, whole."""
    top: list[Any] = []
    stack: list[Any] = [top]
    keys: list[str] = [""]
    for event, value in events:
        holder = stack[-1]
        if event == "map_key":
            keys[-1] = value
            continue
        if event in ("end_map", "end_array"):
            stack.pop()
            keys.pop()
        else:
            made: Any = {} if event == "start_map" else [] if event == "start_array" else value
            if isinstance(holder, dict):
                holder[keys[-1]] = made
            else:
                holder.append(made)
            if event in ("start_map", "start_array"):
                stack.append(made)
                keys.append("")
                if len(stack) > MAX_DEPTH:
                    raise _TooDeep
        if len(stack) == 1:
            return top[0]
    raise ValueError("it ends in the middle")
