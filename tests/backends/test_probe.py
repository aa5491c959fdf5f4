"""What is refused at load, with which sentence, and that a model is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from kvcomm.backends import one_pass, probe
from kvcomm.backends.hf import HFBackend
from kvcomm.errors import UnsupportedModel
from kvcomm.testing import FAMILIES, REFUSED, tiny_random

SENTENCES = {
    "deepseek_v3": "it caches a compressed latent (MLA)",
    "mamba": "it keeps a recurrent state (state-space or hybrid)",
    "jamba": "it keeps a recurrent state (state-space or hybrid)",
    "t5": "it is an encoder-decoder",
    "gpt2": "its keys are not rotated by a module of their own (learned positions",
    "bloom": "its keys are not rotated by a module of their own (learned positions, ALiBi",
    "gptj": "its keys are not rotated by a module of their own",
}


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_refused_architectures(family: str) -> None:
    model = tiny_random(family)
    with pytest.raises(UnsupportedModel) as refused:
        HFBackend(model)
    text = str(refused.value)
    assert text.startswith(f"{type(model).__name__} cannot share its KV: {SENTENCES[family]}")
    assert "\n" not in text


def test_latent_caches_are_refused_by_what_they_do_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek without the setting that names its kind of cache."""
    monkeypatch.setattr(probe, "_unsuitable", lambda model: None)
    with pytest.raises(UnsupportedModel, match="cannot share its KV"):
        HFBackend(tiny_random("deepseek_v3"))


def test_alibi_is_refused_by_what_it_does_too() -> None:
    """Falcon has a rotary module that it does not use when it is given ALiBi: no layer's keys move."""
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    with pytest.raises(UnsupportedModel, match="cannot share its KV"):
        HFBackend(FalconForCausalLM(config).eval())


def test_layers_of_other_kinds_are_refused() -> None:
    model = tiny_random("llama")
    model.config.layer_types = ["full_attention"] * 3 + ["chunked_attention"]
    model.config.attention_chunk_size = 8
    with pytest.raises(
        UnsupportedModel, match=r"not all its layers are full or sliding-window attention \(.*chunked_attention"
    ):
        HFBackend(model)


def test_what_is_no_transformers_model_is_refused() -> None:
    for wrong in (nn.Linear(2, 2), nn.Sequential(tiny_random("llama")), object()):
        with pytest.raises(UnsupportedModel, match="give the PreTrainedModel itself"):
            HFBackend(wrong)  # type: ignore[arg-type]  # that is the point


def test_a_forward_that_fails_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_random("llama")
    monkeypatch.setattr(model.lm_head, "forward", lambda x: x / "nonsense")
    with pytest.raises(UnsupportedModel, match="trying its cache failed with TypeError"):
        HFBackend(model)


def see_everything(config: Any, at: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, 1, len(at), tokens, dtype=dtype)


def see_one_too_many(config: Any, at: Tensor, tokens: int, dtype: torch.dtype) -> Any:
    return one_pass.masks(config, at + 1, tokens, dtype)


@pytest.mark.parametrize("wrong", [see_everything, see_one_too_many])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_lets_the_future_in_is_found(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any], dtype: torch.dtype
) -> None:
    model: Any = tiny_random("llama").to(dtype)  # type: ignore[arg-type]  # transformers' annotation lost its first parameter
    HFBackend(model)
    right = one_pass.masks
    monkeypatch.setattr(one_pass, "masks", lambda *a: wrong(*a) if wrong is see_everything else right(a[0], a[1] + 1, *a[2:]))
    with pytest.raises(UnsupportedModel, match="recomputing one of its tokens differs from its dense forward"):
        HFBackend(model)


def test_a_rotation_that_is_not_the_models_own_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers rotate by one function, the module now shows another."""
    model = tiny_random("llama")
    right = modeling_llama.apply_rotary_pos_emb

    def shown(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return right(q, k, cos, -sin if k.shape[0] == 1 and q.shape[1] == 0 else sin, **options)  # type: ignore[no-any-return]  # untyped

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", shown)
    with pytest.raises(UnsupportedModel, match="not the rotated keys"):
        HFBackend(model)


def state_of(model: nn.Module) -> dict[str, Any]:
    rotary: Any = model.get_decoder().rotary_emb  # type: ignore[operator]  # a method of transformers models
    return {
        "training": {name for name, module in model.named_modules() if module.training},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "rotary": {name: copy.deepcopy(x) for name, x in vars(rotary).items() if name != "config"},
        "rotary module": id(rotary),
        "buffers": {name: (id(x), x.clone()) for name, x in model.named_buffers()},
        "grads": {name for name, x in model.named_parameters() if x.grad is not None},
        "attributes": sorted(vars(model)),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_model_is_left_as_it_was(family: str) -> None:
    """In training mode in part, with a frozen layer and, where tables follow the length, those of a long prompt before."""
    model = tiny_random(family)
    model.get_decoder().layers.train()
    model(input_ids=torch.arange(60)[None])
    before = state_of(model)
    HFBackend(model)
    assert same(before, state_of(model))


def test_dropout_does_not_disturb_the_trial() -> None:
    assert HFBackend(tiny_random("llama", attention_dropout=0.9).train()).rope.rotates == (True,) * 4


def test_it_is_left_as_it_was_when_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_random("llama").train()
    monkeypatch.setattr(model.lm_head, "forward", lambda x: x / "nonsense")
    before = state_of(model)
    with pytest.raises(UnsupportedModel):
        HFBackend(model)
    assert same(before, state_of(model))


def test_windows_are_the_models() -> None:
    assert [s.window for s in HFBackend(tiny_random("gemma3")).shapes] == [16, None, 16, None]
    assert [s.window for s in HFBackend(tiny_random("mistral-sliding")).shapes] == [16] * 4
    assert [s.window for s in HFBackend(tiny_random("llama")).shapes] == [None] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "glm", "cohere2", "phi3-longrope", "gpt_neox"])
def test_low_precision_models_are_accepted(family: str, dtype: torch.dtype) -> None:
    model: Any = tiny_random(family).to(dtype)  # type: ignore[arg-type]  # transformers' annotation lost its first parameter
    backend = HFBackend(model)
    assert backend.shapes[0].dtype == dtype
    assert backend.rope.rotates == HFBackend(tiny_random(family)).rope.rotates
