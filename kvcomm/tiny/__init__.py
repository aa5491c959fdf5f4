"""The embedded model: a small trained Llama whose answers depend on context across segments, and the tasks it was trained on."""

from pathlib import Path

__all__ = ["FOLDER"]

FOLDER = Path(__file__).parent
"""A Hugging Face checkpoint: config.json, model.safetensors, tokenizer.json."""
