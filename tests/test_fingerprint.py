"""Model identity on small random Llamas: every change that KV depends on shows, and nothing else does."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from time import thread_time
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvcomm.backends.hf import HFBackend
from kvcomm.errors import UnsupportedModel
from kvcomm.fingerprint import Watch, fingerprint
from kvcomm.testing import tiny_random

Model = Any  # a LlamaForCausalLM; transformers' own annotations refuse `model.to(dtype)` and `model.generate`
SIZES: dict[str, Any] = {
    "hidden_size": 22,  # so that a weight in bfloat16 need not fill whole 64-bit words
    "intermediate_size": 35,
    "head_dim": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 51,
}


def llama(seed: int = 0, **options: Any) -> Model:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})).eval()


def tokenizer(*, words: tuple[str, ...] = ("a", "b", "ab"), merges: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(words)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")] if merges else []))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="a")


class Lora(nn.Module):
    """A wrapped linear layer with the attributes that PEFT's tuners have."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))
        self.active_adapters = ["first"]
        self.merged_adapters: list[str] = []
        self.scaling = {"first": 1.0}
        self.disable_adapters = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(x)
        return out if self.disable_adapters else out + x @ self.a.T @ self.b.T

    def merge(self) -> None:
        self.base_layer.weight.data += self.b @ self.a
        self.merged_adapters.append("first")


def with_adapter() -> Model:
    model = llama()
    attention = model.model.layers[1].self_attn
    attention.q_proj = Lora(attention.q_proj)
    return model


def adapter(model: Model) -> Any:
    return model.model.layers[1].self_attn.q_proj


def weights(model: Model) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


# --- what must not matter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_from_disk_is_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    model, tok = llama().to(dtype), tokenizer()
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    assert fingerprint(again, PreTrainedTokenizerFast.from_pretrained(tmp_path)) == fingerprint(model, tok)


def test_use_changes_nothing() -> None:
    """Generation, a padded call of the tokenizer, training mode and gradients on or off."""
    model, tok = llama(), tokenizer()
    before = fingerprint(model, tok)
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)
    tok(["a b", "ab"], padding=True, truncation=True, max_length=4)
    model.train().requires_grad_(False)
    assert fingerprint(model, tok) == before
    assert len(before) == 32
    assert int(before, 16) >= 0


def test_memory_layout_does_not_matter() -> None:
    """The same weights, transposed in memory or at an odd offset of a larger tensor."""
    model = llama().bfloat16()
    before = fingerprint(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert not layer.weight.is_contiguous()
    norm = model.model.norm
    shifted = torch.cat([torch.zeros(1, dtype=norm.weight.dtype), norm.weight.detach()])[1:]
    norm.weight = nn.Parameter(shifted)
    assert norm.weight.storage_offset() == 1
    assert fingerprint(model) == before


# --- what must matter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", range(len(weights(llama()))))
def test_one_changed_element_of_any_weight(at: int, dtype: torch.dtype) -> None:
    """The lowest bit of one element, at the start, in the middle and near and at the end of every parameter."""
    model = llama().to(dtype)
    before = fingerprint(model)
    weight = weights(model)[at][1].data.view(-1).view({4: torch.int32, 2: torch.int16}[dtype.itemsize])
    for element in (0, len(weight) // 2 + 1, len(weight) - 4, len(weight) - 1):
        weight[element] ^= 1
        assert fingerprint(model) != before
        weight[element] ^= 1
    assert fingerprint(model) == before


def swap_rows(model: Model) -> None:
    weight = model.model.layers[0].self_attn.o_proj.weight.data
    weight[[3, 7]] = weight[[7, 3]]


def rename(model: Model) -> None:
    layer = model.model.layers[0].mlp
    layer.gate_proj, layer.up_proj = layer.up_proj, layer.gate_proj


def lora_like_edit(model: Model) -> None:
    weight = model.model.layers[1].self_attn.v_proj.weight
    torch.manual_seed(1)
    weight.data += 1e-3 * torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])


@pytest.mark.parametrize(
    "edit", [swap_rows, rename, lora_like_edit, lambda model: model.bfloat16(), lambda model: model.double()]
)
def test_edits_show(edit: Callable[[Model], object]) -> None:
    model = llama()
    before = fingerprint(model)
    edit(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize("pair", [((3, 3), (7, 3)), ((3, 3), (3, 9)), ((3, 3), (7, 9))], ids=["rows", "columns", "both"])
def test_exchanged_elements_of_a_large_tensor_show(pair: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Far from every sampled word, and with the sum of all words as it was."""
    model = llama(vocab_size=4000, hidden_size=32)
    before = fingerprint(model)
    words = model.lm_head.weight.data.view(torch.int64)
    words[pair[0]], words[pair[1]] = words[pair[1]].clone(), words[pair[0]].clone()
    assert fingerprint(model) != before


def test_quantisation_of_a_model_with_several_parts() -> None:
    """It stands in the outer configuration, the text model's own is inside."""

    class Outer:
        def __init__(self, method: str) -> None:
            self.quantization_config = {"quant_method": method}

        def get_text_config(self) -> LlamaConfig:
            return LlamaConfig(**SIZES)

    def of(method: str) -> str:
        model: Any = nn.Linear(2, 2)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        model.config = Outer(method)
        return fingerprint(model)

    assert of("fp8") == of("fp8") != of("awq")


def test_equal_bits_in_another_dtype_differ() -> None:
    zeros = [llama().half(), llama().bfloat16()]
    for model in zeros:
        for _, weight in weights(model):
            weight.data.zero_()
    assert fingerprint(zeros[0]) != fingerprint(zeros[1])


@pytest.mark.parametrize(
    "options",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
        {"rms_norm_eps": 1e-5},
        {"max_position_embeddings": 4096},
        {"quantization_config": {"quant_method": "fp8"}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_settings_over_equal_weights_differ(options: dict[str, Any]) -> None:
    assert fingerprint(llama(**options)) != fingerprint(llama())


def test_other_weights_differ_and_equal_ones_do_not() -> None:
    assert fingerprint(llama(1)) != fingerprint(llama(0)) == fingerprint(llama(0))


def test_tokenizers() -> None:
    """Another vocabulary, other merges, none at all."""
    model = llama()
    toks = [None, tokenizer(), tokenizer(words=("b", "a", "ab")), tokenizer(merges=False)]
    assert len({fingerprint(model, tok) for tok in toks}) == len(toks)
    assert fingerprint(model, tokenizer()) == fingerprint(model, tokenizer())


def test_a_tokenizer_without_a_backend() -> None:
    """Slow tokenizers are known by class and vocabulary."""

    class Slow:
        def __init__(self, vocabulary: dict[str, int]) -> None:
            self.vocabulary = vocabulary

        def get_vocab(self) -> dict[str, int]:
            return self.vocabulary

    def of(vocabulary: dict[str, int]) -> str:
        return fingerprint(llama(), Slow(vocabulary))  # type: ignore[arg-type]  # a double

    assert of({"a": 1, "b": 2}) == of({"b": 2, "a": 1}) != of({"a": 2, "b": 1})


def test_adapters_switched_merged_or_scaled_differ() -> None:
    def state(change: Callable[[Any], object]) -> str:
        model = with_adapter()
        change(adapter(model))
        return fingerprint(model)

    states = [
        state(lambda _: None),
        state(lambda layer: setattr(layer, "disable_adapters", True)),
        state(lambda layer: setattr(layer, "active_adapters", ["second"])),
        state(lambda layer: layer.scaling.update(first=2.0)),
        state(lambda layer: layer.merge()),
        fingerprint(llama()),
    ]
    assert len(set(states)) == len(states)


def test_a_model_that_is_not_in_memory_is_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(UnsupportedModel, match="meta"):
        fingerprint(model)


# --- the watch --------------------------------------------------------------------------------------------------------------


def write_in_place(model: Model) -> None:
    with torch.no_grad():
        model.lm_head.weight[5, 5] += 1


def replace_parameter(model: Model) -> None:
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach().clone())


def replace_module(model: Model) -> None:
    model.model.layers[0].mlp = deepcopy(model.model.layers[0].mlp)


def load_state(model: Model) -> None:
    model.load_state_dict(llama(1).state_dict())


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (write_in_place, "parameter 'weight' was written to"),
        (load_state, "was written to"),
        (lora_like_edit, r"written to through \.data"),
        (replace_parameter, "'weight' was replaced"),
        (replace_module, "module was replaced near 'self_attn'"),
        (lambda model: model.bfloat16(), "other memory"),
    ],
)
def test_watch_sees_changes(edit: Callable[[Model], object], says: str) -> None:
    model = llama()
    watch = Watch(model)
    before = fingerprint(model)
    assert watch.changed() is None
    edit(model)
    changed = watch.changed()
    assert changed is not None
    assert re.search(says, changed)
    assert Watch(model).changed() is None
    if edit not in (replace_parameter, replace_module):
        assert fingerprint(model) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "disable_adapters", True),
        lambda layer: layer.active_adapters.clear(),
        lambda layer: layer.scaling.update(first=2.0),
        lambda layer: layer.merged_adapters.append("first"),
    ],
)
def test_watch_sees_adapters(change: Callable[[Any], object]) -> None:
    model = with_adapter()
    watch = Watch(model)
    assert watch.changed() is None
    change(adapter(model))
    assert watch.changed() == "other adapters are active"


def edit_frequencies(model: Model) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def edit_frequencies_through_data(model: Model) -> None:
    model.model.rotary_emb.inv_freq.data.mul_(0.5)


def replace_frequencies(model: Model) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq / 2


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (edit_frequencies, "buffer 'inv_freq' was written to"),
        (edit_frequencies_through_data, r"buffer was written to through \.data"),
        (replace_frequencies, "buffer 'inv_freq' was replaced"),
    ],
)
def test_watch_sees_edited_buffers(edit: Callable[[Model], object], says: str) -> None:
    model = llama(head_dim=16)
    watch = Watch(model)
    assert watch.changed() is None
    edit(model)
    assert re.search(says, watch.changed() or "nothing")


@pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope"])
def test_watch_is_quiet_while_frequencies_follow_the_length(family: str) -> None:
    """Longer than the model was made for, then short again: its rotary module has written new buffers."""
    model: Model = tiny_random(family)
    watch, frequencies = Watch(model), model.model.rotary_emb.inv_freq
    model(torch.arange(60)[None] + 3)
    assert model.model.rotary_emb.inv_freq is not frequencies
    model(torch.arange(5)[None] + 3)
    assert watch.changed() is None


def steer(model: Model, *, before: bool, name: str = "model.layers.1.self_attn.q_proj") -> Any:
    """What PEFT does for `adapter_names`, and steering too: a hook that changes what a layer gets or gives."""
    module = model.get_submodule(name)
    return (
        module.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
        if before
        else module.register_forward_hook(lambda _, args, out: out + 1)
    )


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj", ""])
def test_watch_sees_forward_hooks(name: str, before: bool) -> None:
    """Of any module, the whole model included, for as long as they are there; others in their place are others."""
    model = llama()
    watch = Watch(model)
    assert watch.changed() is None
    hook = steer(model, before=before, name=name)
    assert watch.changed() == f"forward hooks of {name or 'the model itself'!r} were added or removed"
    hooked = Watch(model)
    hook.remove()
    assert watch.changed() is None
    assert hooked.changed() is not None
    steer(model, before=before, name=name)
    assert hooked.changed() is not None


def test_a_request_under_other_hooks_is_refused() -> None:
    """And served again when they are gone."""
    model: Model = tiny_random("llama")
    backend, ids = HFBackend(model), torch.tensor([[3, 4, 5]])
    hook = steer(model, before=True)
    assert "forward hooks of 'model.layers.1.self_attn.q_proj'" in str(backend.refusal(ids, {}))
    hook.remove()
    assert backend.refusal(ids, {}) is None


def test_hooks_that_serve_or_record_do_not_count() -> None:
    """kvcomm's own, which another thread's request may have there; transformers', which stay once outputs were asked for."""
    model: Model = tiny_random("llama")
    backend, ids = HFBackend(model), torch.tensor([[3, 4, 5]])
    with backend.hooked():
        assert model._forward_hooks
        assert backend.refusal(ids, {}) is None
    model(ids, output_hidden_states=True)
    assert any(m._forward_hooks for m in model.modules())
    assert backend.refusal(ids, {}) is None


def test_watch_sees_an_adapter_being_added() -> None:
    model = llama()
    watch = Watch(model)
    attention = model.model.layers[1].self_attn
    attention.q_proj = Lora(attention.q_proj)
    assert watch.changed() == "a module was replaced near 'q_proj'"


def test_watch_is_quiet_while_the_model_is_used() -> None:
    model = llama()
    watch = Watch(model)
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)
    model.train()
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert watch.changed() is None


def test_watch_on_weights_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = llama()
    watch = Watch(model)
    assert watch.changed() is None
    model.model.norm.weight = nn.Parameter(torch.zeros(22))
    assert watch.changed() is not None


def test_watch_is_cheap() -> None:
    """300 parameters, processor time of the best of 20 calls; one core was measured to need 0.14 ms."""
    model = llama(num_hidden_layers=33)
    assert len(weights(model)) == 300
    watch = Watch(model)

    def once() -> float:
        started = thread_time()
        assert watch.changed() is None
        return thread_time() - started

    assert min(once() for _ in range(20)) < 1e-3
