"""Where models run: `base` is the contract, `hf` serves Hugging Face models."""

__all__: list[str] = []
