"""The embedded model: a small trained Llama whose answers depend on context across segments, and its training tasks."""

from pathlib import Path

__all__ = ["FOLDER"]

FOLDER = Path(__file__).parent
"""A Hugging Face checkpoint: config.json, model.safetensors, tokenizer.json."""
