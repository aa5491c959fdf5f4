"""The file that calls are written to: appended to, private to the user, one whole line at a time.

Nothing that goes wrong with recording reaches the caller once the file is open: it is counted, said once, and the call is
kept without its text, or lost. Knows nothing of where calls come from.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Self

from kvcomm.errors import InputError
from kvcomm.replay.recording.span import Record, Redact

__all__ = ["Recorder", "redaction"]

log = logging.getLogger(__name__)


class Recorder:
    """Safe to use from several threads; several processes may append to one file. Raises OSError where it cannot be opened."""

    def __init__(self, path: str | os.PathLike[str], redact: Redact | None = None) -> None:
        self.path, self._redact = Path(path), redact
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self._broken = _ends_in_a_part(self._file)  # somebody was killed while writing: begin on a line of our own
        self.written = 0
        self.without_text = 0  # of these
        self.lost = 0
        self.problems: Counter[str] = Counter()  # why calls have no text, or are lost

    def write(self, record: Record) -> None:
        """Append one call. Never raises for a call that cannot be written."""
        self.add(lambda: [record])

    def add(self, records: Callable[[], Iterable[Record]]) -> None:
        """As `write`, for calls that are still to be made out of what was seen; where that fails, they are lost."""
        try:
            for record in records():
                self._append(*self._line(record))
        except OSError as why:
            self.lose(f"{self.path}: {why.strerror or why}")
        except Exception as why:  # noqa: BLE001  # whatever it is, it is the recording's and not the caller's
            self.lose(f"a call cannot be written down: {type(why).__name__}")

    def lose(self, problem: str) -> None:
        """Count a call that will not be in the file, and say why."""
        with self._lock:
            self.lost += 1
        self._say(problem)

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _line(self, record: Record) -> tuple[bytes, bool]:
        """The line, and whether it had to do without its text."""
        if self._redact is None:
            return record.line(), False
        try:
            return record.redacted(self._redact).line(), False
        except Exception as why:  # noqa: BLE001  # the hook is somebody else's code, and its error may quote the text
            problem = f"the redaction failed: {type(why).__name__}"
            self._say(problem)
            return record.bare(problem).line(), True

    def _append(self, line: bytes, bare: bool) -> None:
        """In one call of the system where it can be. Raises OSError; a part that stays behind is cut off from the next line."""
        with self._lock:
            part = self._broken or _ends_in_a_part(self._file)  # of ours, or of a writer that was killed in the middle
            rest = memoryview(b"\n" + line if part else line)
            while rest:
                done = os.write(self._file, rest)
                rest, self._broken = rest[done:], True
            self._broken = False
            self.written += 1
            self.without_text += bare

    def _say(self, problem: str) -> None:
        with self._lock:
            self.problems[problem] += 1
            first = self.problems[problem] == 1
        if first:
            log.warning("recording: %s", problem)


def redaction(name: str) -> Redact:
    """The function called `module:function`. Raises InputError where there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function) if module and function else None
    except Exception as why:  # importing is running somebody else's code
        raise InputError(f"the redaction {name!r} cannot be loaded: {type(why).__name__}: {why}") from why
    if not callable(found):
        raise InputError(f"the redaction is {name!r}; give a function from a text to a text as module:function")
    return found  # type: ignore[no-any-return]  # what it returns is looked at when it does


def _ends_in_a_part(file: int) -> bool:
    """Whether there is something after the last newline."""
    try:
        size = os.fstat(file).st_size
        return size > 0 and os.pread(file, 1, size - 1) != b"\n"
    except OSError:  # a pipe, /dev/stdout
        return False
