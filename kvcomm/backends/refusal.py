"""Why a call of generate must be left alone: its first forward is not the one that the pass replaces, or more is read of it
than the pass gives. What is not known to be safe is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

__all__ = ["refusal"]

# Arguments of generate that leave the first forward as it is, beside the fields of GenerationConfig.
HARMLESS = frozenset(
    "inputs input_ids attention_mask generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn synced_gpus "
    "assistant_model streamer negative_prompt_ids negative_prompt_attention_mask tokenizer assistant_tokenizer".split()
)
# Fields of GenerationConfig that change the first forward or read more of it than the last logits, and the reason they give.
HARMFUL = {
    "cache_implementation": "a cache implementation is chosen",
    "prefill_chunk_size": "the prefill is chunked",
    "output_attentions": "attentions are asked for",
    "output_hidden_states": "hidden states are asked for",
    "token_healing": "token healing changes the prompt",
    "use_mtp": "speculation needs hidden states",
    "speculation_type": "speculation needs hidden states",
    "assistant_early_exit": "the assistant is the model itself",
}
MODES = frozenset({"greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation"})


def refusal(
    model: PreTrainedModel,
    input_ids: Any,
    kwargs: Mapping[str, Any],
    generation_config: GenerationConfig | None,
    *,
    follows_length: bool,
) -> str | None:
    """A short reason, or None if the call can be served. `follows_length`: rotary tables depend on the sequence's length."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    config = _effective(model, given, generation_config if generation_config is not None else given.get("generation_config"))
    return (
        _of_inputs(model, input_ids, given, config)
        or _of_settings(model, given, config, follows_length)
        or _of_model(model, input_ids)
    )


def _effective(model: PreTrainedModel, given: Mapping[str, Any], config: GenerationConfig | None) -> GenerationConfig:
    """What generate will use: arguments, then the given configuration, then the model's own."""
    effective = copy.copy(model.generation_config)
    for settings in (vars(config) if config is not None else {}, given):
        for name in settings.keys() & vars(effective).keys():
            if settings[name] is not None:
                setattr(effective, name, settings[name])
    if effective.cache_implementation == "hybrid":  # of older checkpoints: generate unsets it, too
        effective.cache_implementation = None
    return effective


def _of_inputs(model: PreTrainedModel, ids: Any, given: Mapping[str, Any], config: GenerationConfig) -> str | None:
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] == 0:
        return "no prompt of token ids"
    if ids.shape[0] != 1:
        return f"a batch of {ids.shape[0]} prompts"
    unknown = sorted(set(given) - HARMLESS - set(vars(config)))
    if unknown:  # past_key_values, inputs_embeds, position_ids, pixel_values, ...
        return f"{unknown[0]} is given"
    mask = given.get("attention_mask")
    if mask is not None:
        return None if mask.shape == ids.shape and bool((mask == 1).all()) else "the attention mask hides something"
    return "the prompt holds the padding token and has no attention mask" if _mask_is_inferred(ids, config) else None


def _mask_is_inferred(ids: Tensor, config: GenerationConfig) -> bool:
    """Whether generate would take padding tokens of the prompt for padding."""
    if config.pad_token_id is None or not bool((ids == config.pad_token_id).any()):
        return False
    eos = config.eos_token_id
    return eos is None or config.pad_token_id not in (eos if isinstance(eos, list) else [eos])


def _of_settings(
    model: PreTrainedModel, given: Mapping[str, Any], config: GenerationConfig, follows_length: bool
) -> str | None:
    if config.use_cache is False:
        return "use_cache is off"
    for name, reason in HARMFUL.items():
        if getattr(config, name, None):
            return reason
    mode = str(config.get_generation_mode(given.get("assistant_model")).value)
    if mode not in MODES:
        return f"{mode.replace('_', ' ')} has a loop of its own"
    if given.get("assistant_model") is model:
        return "the assistant is the model itself"
    if mode == "assisted_generation" and follows_length:
        return "drafted tokens would change the rotary tables of the prompt"
    return None


def _of_model(model: PreTrainedModel, ids: Tensor) -> str | None:
    if model.training:
        return "the model is in training mode"
    if hasattr(model.forward, "_torchdynamo_orig_callable") or any(m._compiled_call_impl for m in model.modules()):
        return "the model is compiled"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if getattr(model.config.get_text_config(decoder=True), "original_max_position_embeddings", None) == ids.shape[1] - 1:
        return "the prompt ends at the longrope switch"  # there Phi-3 drops any cache
    return None
