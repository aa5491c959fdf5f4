"""Model identity: what KV depends on, in one string. KV never crosses it.

Two models share a fingerprint only if every weight, every number that positions and attention depend on, the quantisation,
the tokenizer and the active adapters agree. Knows nothing of KV or stores; reads models, never changes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import copy
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvcomm.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Watch", "fingerprint"]

SAMPLE = 64  # words of a tensor that enter the hash as they are

VOLATILE = frozenset(  # settings that differ between equal models: where they came from, how they are run, what they return
    "_attn_implementation _commit_hash _experts_implementation _name_or_path dtype id2label label2id name_or_path "
    "output_attentions output_hidden_states problem_type return_dict torch_dtype transformers_version use_cache".split()
)

HARMLESS = ("kvcomm.", "transformers.utils.output_capturing")  # hooks from here change no K/V: they serve a pass, or record


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """32 hex digits. Reads every weight once: some tenths of a second per GB; call it when a model is loaded.

    A tensor enters with name, shape, dtype, sums of bits over rows and over columns (so one changed element always shows, and
    so do exchanged ones) and a strided sample. Raises UnsupportedModel where weights are not in memory.
    """
    h = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            h.update(_line(name, list(tensor.shape), str(tensor.dtype)))
            h.update(_digest(name, tensor))
    h.update(_line("class", type(model).__name__))
    h.update(_line("config", _settings(model)))
    h.update(_line("adapters", _adapters(_tuner_layers(model))))
    h.update(_line("tokenizer", _tokenizer(tokenizer)))
    return h.hexdigest()


class Watch:
    """Tells whether a model is still what it was when the watch was made, at a cost that fits into every request.

    Sees replaced modules, parameters and buffers, moves to another dtype or device, in-place writes that torch counts, adapters
    switched, merged or scaled, and forward hooks of any module added or removed (adapters per request, steering; what a hook
    does cannot be told, so one that only looks counts too). Writes behind torch's back (`weight.data += ...`) are seen where
    the memory is the CPU's and they change one of two words per tensor: a merge of adapters does, an edit of a few elements
    may not. Buffers of a rope that follows the length change in use and are left out. Holds the weights alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(m._modules, tuple(m._modules.items())) for m in model.modules() if m._modules]
        self._hooks = [
            (name, hooks, _hooks(hooks))
            for name, m in model.named_modules()
            for hooks in (m._forward_pre_hooks, m._forward_hooks)
        ]
        owners: list[tuple[str, Mapping[str, Tensor | None]]] = []
        owners += [("parameter", m._parameters) for m in model.modules() if m._parameters]
        owners += [("buffer", m._buffers) for m in model.modules() if m._buffers and not _follows_length(m)]
        self._tensors = [
            (kind, o, name, t, _version(t), t.data_ptr()) for kind, o in owners for name, t in o.items() if t is not None
        ]
        self._words = [(words, i, words.item(i)) for *_, t, _, _ in self._tensors for words, i in _samples(t)]
        self._tuners = _tuner_layers(model)
        self._adapters = _adapters(self._tuners)

    def changed(self) -> str | None:
        """What has changed since, in words; None when nothing seen has."""
        for now, then in self._modules:
            if tuple(now.items()) != then:
                return f"a module was replaced near {next(iter(then))[0]!r}"
        for name, hooks, known in self._hooks:
            if (hooks or known) and _hooks(hooks) != known:
                return f"forward hooks of {name or 'the model itself'!r} were added or removed"
        for kind, owner, name, tensor, version, pointer in self._tensors:
            if owner.get(name) is not tensor:
                return f"{kind} {name!r} was replaced"
            if tensor.data_ptr() != pointer:
                return f"{kind} {name!r} has other memory"
            if version is not None and tensor._version != version:
                return f"{kind} {name!r} was written to"
        if any(words.item(i) != then for words, i, then in self._words):
            return "a parameter or buffer was written to through .data"
        if self._tuners and _adapters(self._tuners) != self._adapters:
            return "other adapters are active"
        return None


def _line(*parts: Any) -> bytes:
    return json.dumps(parts, sort_keys=True, default=str).encode() + b"\n"


def _digest(name: str, tensor: Tensor) -> bytes:
    """Sums and sample of a tensor's bits, taken as 64-bit words; sums wrap around, so order on the device does not matter."""
    if tensor.is_meta:
        raise UnsupportedModel(f"{name} is not in memory (meta device); load the whole model to share its KV")
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = len(bits) // 8 * 8
    words = bits[:whole].clone().view(torch.int64) if bits.storage_offset() % 8 else bits[:whole].view(torch.int64)
    columns = max(len(words) // max(tensor.shape[0] if tensor.dim() else 1, 1), 1)
    rows = len(words) // columns
    table = words[: rows * columns].view(rows, columns)
    sample = words[:: max(len(words) // SAMPLE, 1)]
    parts = (table.sum(1), table.sum(0), words[rows * columns :], sample, bits[whole:])
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


def _settings(model: PreTrainedModel) -> Mapping[str, Any]:
    """The text model's configuration and the quantisation, without what is volatile."""
    text = model.config.get_text_config().to_dict()
    quantised: Any = getattr(model.config, "quantization_config", None)
    if hasattr(quantised, "to_dict"):
        quantised = quantised.to_dict()
    return {"quantization": quantised, **{k: v for k, v in text.items() if k not in VOLATILE}}


def _tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> object:
    """Everything that decides the ids of a text. Padding and truncation are left out: calls change them."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}


def _tuner_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers that PEFT wrapped, by the attributes that all its tuners have; PEFT itself need not be installed."""
    return [(name, m) for name, m in model.named_modules() if isinstance(getattr(m, "disable_adapters", None), bool)]


def _adapters(tuners: list[tuple[str, nn.Module]]) -> list[tuple[object, ...]]:
    """Per wrapped layer: which adapters act on it, which are merged into its weight, and how strongly."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return [(layer, *(copy(getattr(m, name, None)) for name in names)) for layer, m in tuners]


def _hooks(hooks: Mapping[int, object]) -> tuple[int, ...]:
    """The ids of those that may change K/V. Taken at once: other threads' requests add kvcomm's own and take them away."""
    found = tuple(hooks.items())
    return tuple(number for number, hook in found if not str(getattr(hook, "__module__", "")).startswith(HARMLESS))


def _follows_length(module: nn.Module) -> bool:
    """A rotary module that writes its frequencies anew for longer prompts, by the names that transformers has for those."""
    kinds: Any = getattr(module, "rope_type", None)
    return any("dynamic" in str(k) or k == "longrope" for k in (kinds.values() if isinstance(kinds, dict) else [kinds]))


def _version(tensor: Tensor) -> int | None:
    """Counts in-place writes; torch does not count them for tensors made under inference mode."""
    return None if tensor.is_inference() else tensor._version


def _samples(tensor: Tensor) -> Iterator[tuple[Any, int]]:
    """(words, i) of two 64-bit words of a tensor in the CPU's memory, read without torch: numpy, or it costs too much."""
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes >= 16:
        words = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        words = words[: len(words) // 8 * 8].view("int64")
        yield from ((words, i) for i in (len(words) // 3, len(words) // 2 + 1) if i < len(words))
