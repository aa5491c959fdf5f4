"""What is refused at start, and untested versions; with a configuration made by hand in place of vLLM's."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvcomm.connectors import vllm_compat
from kvcomm.errors import UnsupportedModel


class FullAttentionSpec(SimpleNamespace):
    """Named as vLLM's."""


class SlidingWindowSpec(SimpleNamespace):
    """Named as vLLM's."""


def refusal(spec: Any = None, groups: int = 1, **changes: Any) -> str | None:
    """Of an engine that could be served but for these fields, `<part>__<field>`."""
    parts: dict[str, Any] = {
        "model_config": SimpleNamespace(
            dtype=torch.bfloat16, use_mla=False, is_hybrid=False, is_attention_free=False, is_encoder_decoder=False,
            uses_mrope=False,
        ),
        "parallel_config": SimpleNamespace(
            pipeline_parallel_size=1, data_parallel_size=1, decode_context_parallel_size=1, tensor_parallel_size=2
        ),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "speculative_config": None,
        "lora_config": None,
    }  # fmt: skip
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            setattr(parts[part], field, value)
        else:
            parts[part] = value
    spec = spec or FullAttentionSpec(sliding_window=None, attention_chunk_size=None, non_causal=False)
    cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)] * groups)
    return vllm_compat.engine_refusal(SimpleNamespace(**parts), cache)


def test_what_can_be_served() -> None:
    assert refusal() is None
    assert refusal(cache_config__cache_dtype="bfloat16") is None


@pytest.mark.parametrize(
    ("says", "changes"),
    [
        ("MLA", {"model_config__use_mla": True}),
        ("recurrent", {"model_config__is_hybrid": True}),
        ("recurrent", {"model_config__is_attention_free": True}),
        ("encoder-decoder", {"model_config__is_encoder_decoder": True}),
        ("M-RoPE", {"model_config__uses_mrope": True}),
        ("several ways", {"groups": 2}),
        ("several ways", {"spec": SlidingWindowSpec()}),
        ("several ways", {"spec": FullAttentionSpec(sliding_window=64, attention_chunk_size=None, non_causal=False)}),
        ("draft", {"speculative_config": object()}),
        ("fp8", {"cache_config__cache_dtype": "fp8"}),
        ("pipeline", {"parallel_config__pipeline_parallel_size": 2}),
        ("data-parallel", {"parallel_config__data_parallel_size": 2}),
        ("context", {"parallel_config__decode_context_parallel_size": 2}),
        ("context", {"parallel_config__prefill_context_parallel_size": 2}),
    ],
)
def test_refused_at_start(says: str, changes: dict[str, Any]) -> None:
    reason = refusal(**changes)
    assert reason is not None
    assert says in reason


def test_untested_versions(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Refused with a sentence; with the override, a warning that cannot be missed."""
    other = ModuleType("vllm")
    monkeypatch.setitem(sys.modules, "vllm", other)
    other.__dict__["__version__"] = "0.32.7"
    vllm_compat.check_version(untested=False)
    other.__dict__["__version__"] = "0.33.0"
    with pytest.raises(UnsupportedModel, match=r"tested with vLLM <0\.33,>=0\.32, this is 0\.33\.0; install a tested version"):
        vllm_compat.check_version(untested=False)
    monkeypatch.setattr(vllm_compat.log, "propagate", True)
    with caplog.at_level(logging.WARNING, "vllm.kvcomm"):
        vllm_compat.check_version(untested=True)
    assert "may be WRONG" in caplog.text


def test_the_handle_knows_living_runners_only() -> None:
    class Worker(vllm_compat.RunnerHandle):
        """A worker that sets the attribute as vLLM's does."""

        def start(self, runner: object) -> None:
            self.model_runner = runner

    class Runner:
        """Can be referred to weakly."""

    worker, runner = Worker(), Runner()
    worker.start(runner)
    assert worker.model_runner is runner
    assert vllm_compat._RUNNERS[-1]() is runner
    worker.start(None)
    del runner
    other = Runner()
    worker.start(other)
    assert [r() for r in vllm_compat._RUNNERS if r() is not None] == [other]
    worker.start(None)
