"""Replays on vLLM with kvcomm's connector: one engine in this process, every policy with cache salts of its own.

    dense     a salt per call, and kvcomm leaves it alone
    prefix    vLLM's own prefix cache, under a salt per session; kvcomm leaves it alone
    others    kvcomm, under a salt per policy and session

Recorded answers are forced by vLLM's trace replay where its model runner has it, else by a logits processor; either way the
distributions are those from before it. vLLM gives the LIKELIEST tokens of each, so that KL is from below.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import count
from time import perf_counter
from types import MappingProxyType
from typing import Any

import torch

from kvcomm.errors import InputError
from kvcomm.replay.measure import Heard
from kvcomm.replay.player import Asked, Served
from kvcomm.replay.policies import Policy
from kvcomm.replay.wording import Wording
from kvcomm.segments import RUNGS

__all__ = ["LIKELIEST", "VLLMPlayer", "start"]

LIKELIEST = 20  # tokens per position
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
    """A `Player` (see its contract). Rung `anchor` does not exist on vLLM."""

    def __init__(self, llm: Any, positions: int, *, trace_replay: bool) -> None:
        self.wording = Wording(llm.get_tokenizer())
        self.limit: int | None = int(llm.llm_engine.model_config.max_model_len)
        self._llm, self._positions, self._traces = llm, positions, trace_replay
        self._names = count()
        self._life = 0  # counts `begin`: salts of an earlier one find nothing

    def identity(self) -> str:
        from vllm import __version__

        model = self._llm.llm_engine.model_config
        return f"vllm {__version__} {model.model} {model.revision or ''} {model.dtype}"

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
        self._llm.llm_engine.engine_core.shutdown()

    def _run(self, asked: Asked, answer: Sequence[int] | None, salt: str, wish: Mapping[str, str]) -> Served:
        from vllm.inputs import TokensPrompt

        core = self._llm.llm_engine
        prompt = TokensPrompt(prompt_token_ids=list(asked.ids), cache_salt=salt)
        params = self._params(asked, answer, {**wish, "agent": asked.agent})
        first: float | None = None
        last: Any = None
        began = perf_counter()
        core.add_request(str(next(self._names)), prompt, params)
        while core.has_unfinished_requests():
            for output in core.step():
                first, last = first or perf_counter(), output
        if first is None or last is None:
            raise RuntimeError("vLLM gave no answer")
        said = (last.kv_transfer_params or {}).get("kvcomm", {}) if wish != WISHES["dense"] else {}
        done = last.outputs[0]
        cached = int(last.num_cached_tokens or 0)
        rungs = said.get("tokens_by_rung") or {"exact": cached, "dense": len(asked.ids) - cached}
        return Served(
            ttft_ms=(first - began) * 1e3,
            reused_tokens=int(said.get("reused_tokens", cached)),
            tokens_by_rung={**dict.fromkeys(RUNGS, 0), **rungs},
            fallback=said.get("fallback"),
            answer=list(done.token_ids) if answer is None else list(answer),
            heard=_heard(done.logprobs[: self._positions]),
        )

    def _params(self, asked: Asked, answer: Sequence[int] | None, wish: Mapping[str, str]) -> Any:
        from vllm import SamplingParams

        options: dict[str, Any] = {"temperature": 0, "logprobs": LIKELIEST, "detokenize": False}
        extra: dict[str, Any] = {"kv_transfer_params": {"kvcomm": dict(wish)}}
        if answer is None:
            return SamplingParams(max_tokens=asked.new_tokens, extra_args=extra, **options)
        ids = list(answer)
        if self._traces and ids:
            options["trace_decode_token_ids"] = ids
        else:
            extra[FORCED] = ids
        return SamplingParams(max_tokens=max(len(ids), 1), ignore_eos=True, extra_args=extra, **options)


def start(model: str, dtype: str, context: int | None, positions: int, *, quiet: bool) -> VLLMPlayer:
    """An engine with the connector. Raises InputError where vLLM is missing or does not take the model."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)  # in this process, so that a call is timed and not its way between processes
    if quiet:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM
        from vllm.config import KVTransferConfig
    except ImportError as error:
        raise InputError(f"vLLM cannot be imported ({error}); kvcomm doctor says which version is wanted") from error
    transfer = KVTransferConfig(
        kv_connector="KVCommConnector",
        kv_connector_module_path="kvcomm.connectors.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
    )
    longer = {} if context is None else {"max_model_len": context, "hf_overrides": {"max_position_embeddings": context}}
    options: dict[str, Any] = {
        "model": model, "dtype": dtype, "seed": 0, "enforce_eager": True, "kv_transfer_config": transfer,
        "worker_extension_cls": "kvcomm.connectors.vllm.RunnerHandle", "async_scheduling": False, **longer,
    }  # fmt: skip
    for trace_replay in (True, False):
        more = {"enable_trace_replay": True} if trace_replay else {"logits_processors": [_forcing()]}
        try:
            return VLLMPlayer(LLM(**options, **more), positions, trace_replay=trace_replay)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            if not trace_replay or not re.search("trace.replay", str(error)):
                raise InputError(f"vLLM does not start with {model!r}: {str(error).strip().splitlines()[0]}") from error
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
