"""Which weights an engine has loaded, for K/V that leaves it: every byte of the model's files counts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

from kvcomm.errors import InputError

__all__ = ["weights"]

FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")  # tokenizers too
CHUNK = 1 << 24  # bytes


def weights(model: str, revision: str | None = None) -> str:
    """Of a folder, or of a hub id that has been downloaded: reads all of its files, seconds for gigabytes. Raises InputError
    where they cannot be found.
    """
    files = sorted({file for pattern in FILES for file in _folder(model, revision).glob(pattern)})
    if not files:
        raise InputError(f"{model!r} has no files that tell its weights from others'; without them its KV cannot be shared")
    return _hashed(files)


def _folder(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    try:
        from transformers.utils.hub import cached_file

        return Path(str(cached_file(model, "config.json", revision=revision, local_files_only=True))).parent
    except Exception as fault:  # it raises many kinds
        raise InputError(f"the files of {model!r} are not on this machine, so its KV cannot be shared: {fault}") from fault


def _hashed(files: Iterable[Path]) -> str:
    h = xxhash.xxh3_128()
    for path in files:
        h.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                h.update(piece)
    return h.hexdigest()
