"""An answer as it is made: text pieces from a thread that runs `generate`, and the whole Output at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import copy_context
from threading import Thread
from typing import TYPE_CHECKING, Any

from transformers import TextIteratorStreamer

if TYPE_CHECKING:
    from kvcomm.engine import Output

__all__ = ["Stream"]


class Stream:
    """Iterate once for the pieces of text; `output` is there when the iteration has ended.

    The request runs to its end even if nobody listens to it. What `generate` raises is raised by the iteration.
    """

    def __init__(self, generate: Callable[[TextIteratorStreamer], Output], tokenizer: Any) -> None:
        self._pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._output: Output | None = None
        self._error: BaseException | None = None
        self._thread = Thread(target=copy_context().run, args=(self._run, generate), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        yield from (piece for piece in self._pieces if piece)
        self._thread.join()
        if self._error is not None:
            raise self._error

    @property
    def output(self) -> Output:
        """The finished answer; waits for it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._output is not None
        return self._output

    def _run(self, generate: Callable[[TextIteratorStreamer], Output]) -> None:
        try:
            self._output = generate(self._pieces)
        except BaseException as error:  # noqa: BLE001  # raised again in the reader's thread
            self._error = error
        finally:
            self._pieces.end()
