"""Loads a Hugging Face id or folder into a backend, with errors that say what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from kvcomm.backends.hf import HFBackend
from kvcomm.errors import InputError, UnsupportedModel

__all__ = ["dtype_named", "load"]

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def load(model_id: str, *, dtype: str | torch.dtype = "auto", **options: Any) -> HFBackend:
    """Raises InputError where there is no usable checkpoint and UnsupportedModel where its cache cannot be shared."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(model_id)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise InputError(f"{model_id} has no config.json; give a folder that save_pretrained wrote, or a Hugging Face id")
        if not any(p.is_file() for pattern in WEIGHTS for p in folder.glob(pattern)):
            raise InputError(f"{model_id} has a config.json but no weights ({', '.join(WEIGHTS)}); copy them there")
    elif not HUB_ID.fullmatch(model_id):  # "models/tiny" may be one, "/models/tiny" may not
        raise InputError(f"there is no folder {model_id}, and no Hugging Face id is written like that")
    try:
        config = AutoConfig.from_pretrained(model_id)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModel(f"{config.model_type} is an encoder-decoder model: its decoder has no prompt KV to share")
        model = AutoModelForCausalLM.from_pretrained(model_id, dtype=dtype, **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot load a causal language model from {model_id!r}: {_first_line(error)}") from error
    except Exception as error:
        if isinstance(error, UnsupportedModel):
            raise
        raise InputError(
            f"the checkpoint in {model_id!r} cannot be read: {_first_line(error)}; copy its files again"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id)
    except (OSError, ValueError, KeyError):
        tokenizer = None  # a model can be shared by token ids alone
    return HFBackend(model.eval(), tokenizer)


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of a flag's value. Raises InputError for anything else."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"--dtype is {name!r}; use float32, bfloat16 or float16")
    return dtype


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
