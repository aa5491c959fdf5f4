"""Small random checkpoints of real architectures, for tests and examples: seeded, float32, on the CPU, nothing downloaded.

Weights are drawn wide enough that attention is sharp and a wrongly rotated key changes the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FAMILIES", "REFUSED", "tiny_random"]

_BASE = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}


def _llama(rope_type: str, **rope: object) -> dict[str, Any]:
    return {"model_type": "llama", "rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **rope}}


# Family -> model type and what it adds to _BASE (None removes). Window 16, length-following ropes switch at 40 tokens.
FAMILIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": {"model_type": "llama"},
        "llama-linear": _llama("linear", factor=4.0),
        "llama-llama3": _llama(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
        "llama-yarn": _llama("yarn", factor=4.0, original_max_position_embeddings=128),
        "llama-dynamic": {**_llama("dynamic", factor=4.0), "max_position_embeddings": 40},
        "qwen2": {"model_type": "qwen2"},
        "qwen2-sliding": {"model_type": "qwen2", "use_sliding_window": True, **_WINDOW},
        "qwen3": {"model_type": "qwen3", "head_dim": 16},
        "mistral": {"model_type": "mistral", "sliding_window": None},
        "mistral-sliding": {"model_type": "mistral", "sliding_window": 16},
        "phi3": {"model_type": "phi3", "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "phi3-longrope": {
            "model_type": "phi3",
            "original_max_position_embeddings": 40,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "factor": 12.8,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0 + i / 16 for i in range(8)],
                "long_factor": [1.5 + i / 2 for i in range(8)],
            },
        },
        "phi": {"model_type": "phi", "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "gemma2": {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16, **_WINDOW},
        "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, **_WINDOW},
        "gpt_neox": {"model_type": "gpt_neox"},
        "glm": {"model_type": "glm", "head_dim": 16},
        "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0]},
        "cohere2": {"model_type": "cohere2", "logit_scale": 1.0, **_WINDOW},
        "gpt_oss": {
            "model_type": "gpt_oss",
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_theta": 10000.0},
            **_WINDOW,
        },
    }
)

# Architectures whose cache cannot be moved by rotating keys.
REFUSED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "deepseek_v3": {
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 2,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
        "mamba": {"model_type": "mamba"},
        "jamba": {"model_type": "jamba", "attn_layer_period": 2, "attn_layer_offset": 1},
        "t5": {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 4, "decoder_start_token_id": 0},
        "gpt2": {"model_type": "gpt2", "n_positions": 512},
        "bloom": {"model_type": "bloom"},
        "gptj": {"model_type": "gptj", "rotary_dim": 8},
    }
)


def tiny_random(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A 4-layer random model of `family` (a key of FAMILIES or REFUSED) in eval mode, the same for the same arguments.

    `overrides` replace entries of its configuration; None removes one. Raises KeyError for an unknown family. Leaves torch's
    random state as it was.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    described = {**_BASE, **{**FAMILIES, **REFUSED}[family], **overrides}
    model_type = described.pop("model_type")
    config = CONFIG_MAPPING[model_type](**described)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        for name, weight in model.named_parameters():
            if name.endswith("bias"):  # initialised to zero, which would hide a bias applied at the wrong place
                weight.normal_(0.0, 0.1)
    model.eval()
    return model
