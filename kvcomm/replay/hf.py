"""Replays on a Hugging Face model: one engine per policy, all on the same weights.

A recorded answer is forced by a `generate` of its own: the first forward is the one that generate makes, so that the engine
does everything it does in life; then all tokens of the answer are given at once, which leaves the KV that decoding them would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvcomm.backends.hf import HFBackend
from kvcomm.config import Config
from kvcomm.engine import KVComm
from kvcomm.replay.measure import Heard
from kvcomm.replay.player import Asked, Served
from kvcomm.replay.policies import Policy
from kvcomm.replay.wording import Wording

__all__ = ["HFPlayer", "forced"]

BLOCK = 512  # answer tokens given at once


class HFPlayer:
    """A `Player` (see its contract)."""

    def __init__(self, backend: HFBackend, positions: int) -> None:
        """`positions`: of an answer, whose distributions are kept."""
        self.wording = Wording(backend.tokenizer)
        self.limit = backend.context_limit
        self._backend, self._positions = backend, positions
        self._engines: dict[str, KVComm] = {}

    def identity(self) -> str:
        return f"hf {self._backend.fingerprint}"

    def begin(self) -> None:
        self._engines = {}

    def serve(self, policy: Policy, asked: Asked) -> Served:
        engine = self._engines.get(policy.name)
        if engine is None:
            engine = self._engines[policy.name] = KVComm(self._backend, config=Config.from_env(**policy.changes))
        heard = _Ear(self._positions)
        said: dict[str, Any] = {"agent": asked.agent, "rule": policy.rule, "tenant": asked.session, "do_sample": False}
        if asked.answer is None:
            out = engine.generate(asked.chat, max_new_tokens=asked.new_tokens, logits_processor=[heard.processor], **said)
        else:
            with forced(self._backend, asked.answer, heard):
                out = engine.generate(asked.chat, max_new_tokens=max(len(asked.answer), 1), **said)
        report = out.report
        searching = (report.match_ms or 0.0) if policy.rule == "exact" else 0.0  # a prefix cache does not search
        return Served(
            ttft_ms=None if report.ttft_ms is None else report.ttft_ms - searching,
            reused_tokens=report.reused_tokens,
            tokens_by_rung=report.tokens_by_rung,
            fallback=report.fallback,
            answer=out.token_ids,
            heard=heard.heard(),
        )

    def dense(self, asked: Asked, answer: Sequence[int]) -> Heard:
        heard, cache = _Ear(self._positions), self._backend.cache(len(asked.ids) + len(answer))
        with forced(self._backend, answer, heard), self._backend.hooked():
            model: Any = self._backend.model
            model.generate(torch.tensor([list(asked.ids)], device=model.device), past_key_values=cache)
        self._backend.release(cache)
        return heard.heard()


@contextmanager
def forced(backend: HFBackend, answer: Sequence[int], hear: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, the model's `generate` gives `answer`, whatever it is asked. `hear` gets the logits [tokens, vocabulary] that the
    model had for it, in order: at least one row, that behind the prompt.
    """
    model: Any = backend.model

    @torch.no_grad()
    def generate(inputs: Tensor, past_key_values: Any = None, **_: Any) -> Tensor:
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        out = model(input_ids=inputs[:, held:], past_key_values=past_key_values, use_cache=True, logits_to_keep=1)
        hear(out.logits[0])
        given = torch.tensor([list(answer)], dtype=inputs.dtype, device=inputs.device)
        for part in given[:, :-1].split(BLOCK, dim=1) if len(answer) > 1 else ():
            hear(model(input_ids=part, past_key_values=out.past_key_values, use_cache=True).logits[0])
        return torch.cat([inputs, given], dim=1)

    hidden = vars(model).get("generate")
    model.generate = generate  # an instance attribute hides the method until it is deleted
    try:
        yield
    finally:
        if hidden is None:
            del model.generate
        else:
            model.generate = hidden


class _Ear:
    """Keeps the logits of an answer's first `positions` tokens."""

    def __init__(self, positions: int) -> None:
        self._positions, self._parts, self._kept = positions, list[Tensor](), 0

    def __call__(self, logits: Tensor) -> None:
        part = logits[: self._positions - self._kept]
        if len(part):
            self._parts.append(part.to("cpu", copy=True))
            self._kept += len(part)

    def processor(self, _: Tensor, scores: Tensor) -> Tensor:
        """The same for generate's own loop."""
        self(scores)
        return scores

    def heard(self) -> Heard:
        return Heard(torch.cat(self._parts))
