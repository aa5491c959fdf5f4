"""Replays on vLLM with kvcomm's connector: one engine in this process, every policy with cache salts of its own.

    dense     a salt per call, and kvcomm leaves it alone
    prefix    vLLM's own prefix cache, under a salt per session; kvcomm leaves it alone
    others    kvcomm, under a salt per policy and session

Recorded answers are forced by vLLM's trace replay where its model runner has it, else by a logits processor; either way the
distributions are those from before it. vLLM gives the LIKELIEST tokens of each, so that KL is from below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import count
from types import MappingProxyType
from typing import Any

import torch

from kvcomm.connectors.local import LocalEngine, need_vllm
from kvcomm.errors import InputError
from kvcomm.replay.measure import Heard
from kvcomm.replay.player import Asked, Served
from kvcomm.replay.policies import Policy
from kvcomm.replay.wording import Wording
from kvcomm.segments import RUNGS

__all__ = ["LIKELIEST", "VLLMPlayer", "start"]

LIKELIEST = 20  # tokens per position
EXTRA = {"least_gain": 32}  # also where loading is not faster than computing, which only is so for the smallest models
FORCED = "kvcomm_forced_answer"  # of a request's extra arguments
WISHES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "dense": {"mode": "off"},
        "prefix": {"mode": "off"},
        "rotate": {"rung": "rotate"},
        "boundary": {"rung": "boundary"},
        "auto": {},
    }
)


class VLLMPlayer:
    """A `Player` (see its contract). Without policy `anchor`, which is a setting of the whole engine."""

    def __init__(self, engine: LocalEngine, positions: int, *, trace_replay: bool) -> None:
        self.wording = Wording(engine.llm.get_tokenizer())
        self.limit: int | None = int(engine.llm.llm_engine.model_config.max_model_len)
        self._engine, self._positions, self._traces = engine, positions, trace_replay
        self._names = count()
        self._life = 0  # counts `begin`: salts of an earlier one find nothing

    def identity(self) -> str:
        model = self._engine.llm.llm_engine.model_config
        return f"vllm {self._engine.version} {model.model} {model.revision or ''} {model.dtype}"

    def begin(self) -> None:
        self._life += 1

    def serve(self, policy: Policy, asked: Asked) -> Served:
        salt = f"{policy.name} {self._life} {asked.session}"
        if policy.name == "dense":
            salt += f" {next(self._names)}"
        return self._run(asked, asked.answer, salt, WISHES[policy.name])

    def dense(self, asked: Asked, answer: Sequence[int]) -> Heard:
        return self._run(asked, answer, f"reference {next(self._names)}", WISHES["dense"]).heard

    def close(self) -> None:
        self._engine.close()

    def _run(self, asked: Asked, answer: Sequence[int] | None, salt: str, wish: Mapping[str, str]) -> Served:
        reply = self._engine.ask(asked.ids, tenant=salt, **self._sampling(asked, answer, {**wish, "agent": asked.agent}))
        cached = int(reply.output.num_cached_tokens or 0)
        report = None if wish == WISHES["dense"] else reply.report
        rungs: dict[Any, int] = {"exact": cached, "dense": len(asked.ids) - cached}
        if report is not None:
            rungs = dict(report.tokens_by_rung)
        return Served(
            ttft_ms=reply.first_ms,
            reused_tokens=cached if report is None else report.reused_tokens,
            tokens_by_rung={**dict.fromkeys(RUNGS, 0), **rungs},
            fallback=None if report is None else report.fallback,
            answer=reply.ids if answer is None else list(answer),
            heard=_heard(reply.output.outputs[0].logprobs[: self._positions]),
        )

    def _sampling(self, asked: Asked, answer: Sequence[int] | None, wish: Mapping[str, str]) -> dict[str, Any]:
        """What `LocalEngine.ask` takes."""
        extra: dict[str, Any] = {"kv_transfer_params": {"kvcomm": dict(wish)}}
        options: dict[str, Any] = {"logprobs": LIKELIEST, "detokenize": False, "extra_args": extra}
        if answer is None:
            return {"new": asked.new_tokens, **options}
        if self._traces and answer:
            options["trace_decode_token_ids"] = list(answer)
        else:
            extra[FORCED] = list(answer)
        return {"new": max(len(answer), 1), "ignore_eos": True, **options}


def start(model: str, dtype: str, context: int | None, positions: int, *, quiet: bool) -> VLLMPlayer:
    """An engine with the connector. Raises InputError where vLLM is missing or does not take the model."""
    need_vllm()
    longer: dict[str, Any] = {} if context is None else {"hf_overrides": {"max_position_embeddings": context}}
    for trace_replay in (True, False):
        more: dict[str, Any] = {"enable_trace_replay": True} if trace_replay else {"logits_processors": [_forcing()]}
        try:
            engine = LocalEngine.start(
                model,
                dtype=dtype,
                tokens=context,
                tokenizer=True,
                quiet=quiet,
                extra=EXTRA,
                async_scheduling=False,
                **longer,
                **more,
            )
        except InputError as error:
            if not trace_replay or not re.search("trace.replay", str(error)):
                raise
        else:
            return VLLMPlayer(engine, positions, trace_replay=trace_replay)
    raise AssertionError("the second way raises or returns")


def _forcing() -> type:
    """A logits processor that lets one token through at each position of an answer that is to be forced."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forcing(AdapterLogitsProcessor):  # type: ignore[misc]  # vLLM's, which most environments lack
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            answer = (params.extra_args or {}).get(FORCED)
            return _let_through(answer) if answer else None

    return Forcing


def _let_through(answer: Sequence[int]) -> Any:
    def only(output: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        at = len(output)
        if at < len(answer):
            logits.fill_(float("-inf"))
            logits[answer[at]] = 0.0
        return logits

    return only


def _heard(given: Sequence[Mapping[int, Any]]) -> Heard:
    """The likeliest tokens of each position, in their order: vLLM adds the one that was taken."""
    rows = [sorted(row.items(), key=lambda item: item[1].rank)[:LIKELIEST] for row in given]
    ids = torch.tensor([[token for token, _ in row] for row in rows])
    return Heard(torch.tensor([[one.logprob for _, one in row] for row in rows]), ids)
