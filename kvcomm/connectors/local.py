"""A vLLM engine in this process, with the connector or without: what the demo and the benchmarks run on. They time single
requests, and no way between processes belongs into that. Uses what vLLM offers to everybody.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from time import perf_counter
from typing import Any

from kvcomm.connectors.stats import reported
from kvcomm.errors import InputError
from kvcomm.segments import ReuseReport

__all__ = ["LocalEngine", "Reply", "need_vllm"]

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the connector knows the other one
}


@dataclass(frozen=True)
class Reply:
    """One request's end."""

    output: Any  # vLLM's
    first_ms: float  # from the call to the first token, everything included

    @property
    def ids(self) -> list[int]:
        """What was generated."""
        return list(self.output.outputs[0].token_ids)

    @property
    def text(self) -> str:
        """The same; empty where the engine has no tokenizer."""
        return str(self.output.outputs[0].text)

    @property
    def report(self) -> ReuseReport | None:
        """None: the engine has no connector."""
        return reported(self.output.kv_transfer_params)


@dataclass(eq=False)
class LocalEngine:
    """Close it before another one is started: vLLM keeps state per process."""

    llm: Any
    names: count[int]
    has_tokenizer: bool

    @classmethod
    def start(
        cls,
        model: str,
        *,
        dtype: str,
        tokens: int | None = None,
        seed: int = 0,
        share: bool = True,
        extra: Mapping[str, Any] | None = None,
        policy: str = "recompute",
        tokenizer: bool = False,
        quiet: bool = False,
        **options: Any,
    ) -> LocalEngine:
        """For prompts and answers of up to `tokens`, None: as many as the model and the memory allow. `share`: with the
        connector, whose settings are `extra` and which loses a load as `policy` says; `options` are vLLM's. Raises InputError
        where vLLM is missing or cannot load the model.
        """
        need_vllm()
        for name, value in {**SETTINGS, **({"VLLM_LOGGING_LEVEL": "ERROR"} if quiet else {})}.items():
            os.environ.setdefault(name, value)
        from vllm import LLM
        from vllm.config import KVTransferConfig

        if tokens is not None:
            options = {"max_num_batched_tokens": tokens, **options}
        if share:
            options["worker_extension_cls"] = "kvcomm.connectors.vllm.RunnerHandle"
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector="KVCommConnector",
                kv_connector_module_path="kvcomm.connectors.vllm",
                kv_role="kv_both",
                kv_load_failure_policy=policy,
                kv_connector_extra_config=dict(extra or {}),
            )
        options = {"max_num_seqs": 32, "enforce_eager": True, "skip_tokenizer_init": not tokenizer, "seed": seed, **options}
        try:
            llm = LLM(model=model, dtype=dtype, max_model_len=-1 if tokens is None else tokens, **options)
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"vLLM cannot load {model!r}: {' '.join(str(error).split())[:300]}") from error
        return cls(llm, count(), tokenizer)

    @property
    def vocabulary(self) -> int:
        return int(self.llm.llm_engine.model_config.get_vocab_size())

    @property
    def version(self) -> str:
        import vllm

        return str(vllm.__version__)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's own template, an answer to follow."""
        ids: list[int] = self.llm.get_tokenizer().apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
        return ids

    def send(
        self, ids: Sequence[int], *, tenant: str = "", words: Mapping[str, Any] | None = None, new: int = 1, **sampling: Any
    ) -> str:
        """Puts a greedy request for `new` tokens (fewer where the engine has a tokenizer and the answer ends) into the queue;
        `words` are what it says to kvcomm. Its name.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        said = {"extra_args": {"kv_transfer_params": {"kvcomm": dict(words)}}} if words else {}
        ends = {"ignore_eos": not self.has_tokenizer, "detokenize": self.has_tokenizer}
        prompt = TokensPrompt(prompt_token_ids=list(ids))
        if tenant:
            prompt["cache_salt"] = tenant
        name = str(next(self.names))
        params = SamplingParams(temperature=0, max_tokens=new, **{**ends, **said, **sampling})
        self.llm.llm_engine.add_request(name, prompt, params)
        return name

    def ask(
        self, ids: Sequence[int], *, tenant: str = "", words: Mapping[str, Any] | None = None, new: int = 1, **sampling: Any
    ) -> Reply:
        """One request, alone, as `send` makes it. What it leaves behind is kept when this returns."""
        core, first, last = self.llm.llm_engine, None, None
        began = perf_counter()
        self.send(ids, tenant=tenant, words=words, new=new, **sampling)
        while core.has_unfinished_requests():
            for output in core.step():
                first, last = perf_counter() if first is None else first, output
        core.step()  # the connector keeps an answer in the step after its last; a server takes that step by itself
        assert first is not None
        return Reply(last, (first - began) * 1e3)

    def drain(self) -> dict[str, Any]:
        """What comes of all requests that were sent and have not ended, by name."""
        core = self.llm.llm_engine
        done: dict[str, Any] = {}
        while core.has_unfinished_requests():
            done |= {output.request_id: output for output in core.step() if output.finished}
        core.step()
        return done

    def counted(self, metric: str) -> int:
        """A counter of /metrics, over all labels; engines started with `disable_log_stats=False` have them."""
        from prometheus_client import REGISTRY

        samples = (sample for family in REGISTRY.collect() for sample in family.samples)
        return int(sum(sample.value for sample in samples if sample.name == f"{metric}_total"))

    def close(self) -> None:
        """Ends the engine; the process can start another one."""
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

        self.llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


def need_vllm() -> None:
    """Raises InputError where vLLM is missing."""
    if find_spec("vllm") is None:
        raise InputError("vLLM is not installed here; kvcomm doctor says which version is wanted and how to add it")
