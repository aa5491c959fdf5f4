"""A generator that writes down what another one is asked and answers, for teams and for code that calls one itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvcomm.replay.recording.recorder import Recorder
from kvcomm.replay.recording.span import Attribute, Record

__all__ = ["Recorded"]


class Recorded:
    """Generates as `generator` does, errors included; every call is written when it has ended."""

    def __init__(self, generator: Any, recorder: Recorder, session: str, model: str = "") -> None:
        self._generator, self._recorder, self._session, self._model = generator, recorder, session, model
        self.concurrent = bool(getattr(generator, "concurrent", False))

    def generate(self, messages: Sequence[Mapping[str, str]], /, *, agent: str, **options: Any) -> Any:
        """Whatever `generator.generate` returns."""
        began, output, failed = time.time_ns(), None, None
        try:
            output = self._generator.generate(messages, agent=agent, **options)
        except BaseException as why:
            failed = why
            raise
        finally:
            ended = time.time_ns()
            self._recorder.add(lambda: [self._record(messages, agent, options, began, ended, output, failed)])
        return output

    def _record(
        self,
        messages: Sequence[Mapping[str, str]],
        agent: str,
        options: Mapping[str, Any],
        began: int,
        ended: int,
        output: Any,
        failed: BaseException | None,
    ) -> Record:
        report, ids, ttft = (getattr(output, name, None) for name in ("report", "token_ids", "ttft_ms"))
        found: dict[str, Attribute | None] = {
            "gen_ai.provider.name": "kvcomm",
            "gen_ai.request.max_tokens": options.get("max_new_tokens"),
            "gen_ai.usage.input_tokens": getattr(report, "prompt_tokens", None),
            "gen_ai.usage.cache_read.input_tokens": getattr(report, "reused_tokens", None),
            "gen_ai.usage.output_tokens": None if ids is None else len(ids),
            "gen_ai.response.time_to_first_chunk": None if ttft is None else ttft / 1e3,
        }
        return Record(
            operation="chat",
            session=self._session,
            agent=agent,
            started_ns=began,
            ended_ns=ended,
            model=self._model,
            messages=[_message(message["role"], message["content"]) for message in messages],
            answers=[] if output is None else [_message("assistant", output.text)],
            attributes={key: value for key, value in found.items() if value is not None},
            error="" if failed is None else type(failed).__name__,
            reason="" if failed is None else str(failed),
        )


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}
