"""Which calls of generate are left alone, and why. That the others are served rightly is shown in test_hf.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from kvcomm.testing import tiny_random

if TYPE_CHECKING:
    from tests.backends.conftest import Case

ONES = torch.ones(1, 72, dtype=torch.long)
HIDING = torch.cat([torch.zeros(1, 3), torch.ones(1, 69)], dim=1).long()

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "user cache": ({"past_key_values": DynamicCache()}, "past_key_values is given"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 72, 64)}, "inputs_embeds is given"),
    "positions": ({"position_ids": torch.arange(72)[None]}, "position_ids is given"),
    "image": ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "pixel_values is given"),
    "token types": ({"token_type_ids": ONES}, "token_type_ids is given"),
    "anything unknown": ({"some_new_input": 1}, "some_new_input is given"),
    "custom loop": ({"custom_generate": lambda *_: None}, "custom_generate is given"),
    "padding": ({"attention_mask": HIDING}, "the attention mask hides something"),
    "short mask": ({"attention_mask": ONES[:, 1:]}, "the attention mask hides something"),
    "static cache": ({"cache_implementation": "static"}, "a cache implementation is chosen"),
    "offloaded cache": ({"cache_implementation": "offloaded"}, "a cache implementation is chosen"),
    "chunks": ({"prefill_chunk_size": 16}, "the prefill is chunked"),
    "attentions": ({"output_attentions": True}, "attentions are asked for"),
    "hidden states": ({"output_hidden_states": True}, "hidden states are asked for"),
    "no cache": ({"use_cache": False}, "use_cache is off"),
    "healing": ({"token_healing": True}, "token healing changes the prompt"),
    "early exit": ({"assistant_early_exit": 2}, "the assistant is the model itself"),
    "mtp": ({"use_mtp": True}, "speculation needs hidden states"),
    "dflash": ({"speculation_type": "dflash"}, "speculation needs hidden states"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, "contrastive search has a loop of its own"),
    "groups": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group beam search has a loop of its own"),
    "constraints": ({"num_beams": 2, "force_words_ids": [[5]]}, "constrained beam search has a loop of its own"),
    "dola": ({"dola_layers": "low"}, "dola generation has a loop of its own"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_calls(llama: Case, name: str) -> None:
    kwargs, reason = REFUSED[name]
    assert llama.backend.refusal(llama.ids, {"max_new_tokens": 4, **kwargs}) == reason


SETTINGS = sorted(name for name, (kwargs, _) in REFUSED.items() if kwargs.keys() <= vars(GenerationConfig()).keys())


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_found_wherever_they_are(make: Callable[..., Case], name: str) -> None:
    """In a generation_config, as an argument of `refusal` or of generate, and in the model's own; arguments win."""
    kwargs, reason = REFUSED[name]
    case = make("llama")
    config = GenerationConfig(**kwargs)
    assert case.backend.refusal(case.ids, {}, config) == reason
    assert case.backend.refusal(case.ids, {"generation_config": config}) == reason
    case.model.generation_config = config
    assert case.backend.refusal(case.ids, {}) == reason
    if name == "no cache":
        assert case.backend.refusal(case.ids, {"use_cache": True}) is None


def test_refused_prompts(llama: Case) -> None:
    refusal = llama.backend.refusal
    assert refusal(llama.ids.repeat(2, 1), {}) == "a batch of 2 prompts"
    for nothing in (None, llama.ids[0], llama.ids[:, :0], llama.ids.float(), llama.ids.tolist()):
        assert refusal(nothing, {}) == "no prompt of token ids"


def test_padding_that_generate_would_infer(llama: Case) -> None:
    """generate takes padding tokens of a prompt without mask for padding, unless they are end tokens too."""
    pad, other = int(llama.ids[0, 5]), 1
    assert other not in llama.ids
    refusal = llama.backend.refusal
    reason = "the prompt holds the padding token and has no attention mask"
    assert refusal(llama.ids, {"pad_token_id": pad}) == reason
    assert refusal(llama.ids, {"pad_token_id": pad, "eos_token_id": other}) == reason
    assert refusal(llama.ids, {"pad_token_id": pad, "eos_token_id": [other, pad]}) is None
    assert refusal(llama.ids, {"pad_token_id": pad, "attention_mask": ONES}) is None
    assert refusal(llama.ids, {"pad_token_id": other}) is None


def test_generate_does_infer_it(llama: Case) -> None:
    """The reason for that refusal: generate alone answers differently with a mask than without."""
    generate: Any = llama.model.generate
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": int(llama.ids[0, 70])}
    assert not torch.equal(generate(llama.ids, **options), generate(llama.ids, attention_mask=ONES, **options))


SERVED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "empty values": {"inputs_embeds": None, "position_ids": None, "cache_implementation": None, "custom_generate": None},
    "mask": {"attention_mask": ONES},
    "bool mask": {"attention_mask": ONES.bool()},
    "sampling": {"do_sample": True, "top_k": 5, "temperature": 0.7},
    "beams": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "record": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "stopping": {"stop_strings": ["a"], "tokenizer": object(), "streamer": object(), "max_time": 3.0},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "as keyword": {"input_ids": ONES},
}


@pytest.mark.parametrize("name", sorted(SERVED))
def test_served_calls(llama: Case, name: str) -> None:
    assert llama.backend.refusal(llama.ids, {"max_new_tokens": 4, **SERVED[name]}) is None


def test_a_model_that_assists_itself(llama: Case) -> None:
    assert llama.backend.refusal(llama.ids, {"assistant_model": llama.model}) == "the assistant is the model itself"


def test_assisted_decoding_is_refused_where_tables_follow_the_length(llama: Case, make: Callable[..., Case]) -> None:
    assistant = {"assistant_model": tiny_random("llama")}
    assert llama.backend.refusal(llama.ids, assistant) is None
    case = make("llama-dynamic")
    assert case.backend.refusal(case.ids, assistant) == "drafted tokens would change the rotary tables of the prompt"
    assert case.backend.refusal(case.ids, {"prompt_lookup_num_tokens": 3}) is not None


def test_prompts_that_end_at_the_longrope_switch(make: Callable[..., Case]) -> None:
    case = make("phi3-longrope")
    reasons = [case.backend.refusal(case.prompt(1, tokens), {}) for tokens in (40, 41, 42)]
    assert reasons == [None, "the prompt ends at the longrope switch", None]


def test_models_that_do_not_run_as_they_were_tried(make: Callable[..., Case]) -> None:
    case = make("llama")
    case.model.train()
    assert case.backend.refusal(case.ids, {}) == "the model is in training mode"
    case.model.eval()
    assert case.backend.refusal(case.ids, {}) is None
    case.model.forward = torch.compile(case.model.forward, backend="eager")
    assert case.backend.refusal(case.ids, {}) == "the model is compiled"
    del case.model.forward
    assert case.backend.refusal(case.ids, {}) is None
    case.model.get_decoder().layers[1].compile(backend="eager")
    assert case.backend.refusal(case.ids, {}) == "the model is compiled"


def test_autocast(llama: Case) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert llama.backend.refusal(llama.ids, {}) == "autocast is on"
    assert llama.backend.refusal(llama.ids, {}) is None


def test_a_model_that_is_changed_after_loading(make: Callable[..., Case]) -> None:
    """Another dtype, and a trained weight; both in place, so the same object."""
    changes: list[Callable[[Any], Any]] = [lambda m: m.to(torch.bfloat16), lambda m: m.lm_head.weight.data.add_(0.1)]
    for change in changes:
        case = make("llama")
        assert case.backend.refusal(case.ids, {}) is None
        change(case.model)
        assert str(case.backend.refusal(case.ids, {})).startswith("the model is not what was loaded: ")


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_hybrid_is_no_choice(make: Callable[..., Case], family: str) -> None:
    """Checkpoints of Gemma carry it; generate unsets exactly this value wherever it is from, and takes our cache."""
    case = make(family)
    plain = case.generate()
    case.model.generation_config.cache_implementation = "hybrid"
    assert case.backend.refusal(case.ids, {}) is None
    assert case.backend.refusal(case.ids, {"cache_implementation": "hybrid"}) is None
    with case.backend.hooked():
        assert torch.equal(case.generate(case.backend.cache(100)), plain)


def test_nothing_is_changed(llama: Case) -> None:
    before = llama.model.generation_config.to_dict()
    config = GenerationConfig(num_beams=3)
    as_given = config.to_dict()
    llama.backend.refusal(llama.ids, {"do_sample": True}, config)
    assert llama.model.generation_config.to_dict() == before
    assert config.to_dict() == as_given
