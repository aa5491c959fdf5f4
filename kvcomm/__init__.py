"""kvcomm: a team of language-model agents shares its KV-cache.

`import kvcomm` loads neither torch nor transformers; each name below is imported from its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kvcomm._version import __version__

if TYPE_CHECKING:
    from kvcomm.config import Config
    from kvcomm.engine import KVComm, Output
    from kvcomm.errors import CacheFault, InputError, KVCommError, TeamError, UnsupportedModel
    from kvcomm.segments import ReuseReport

__all__ = [
    "CacheFault",
    "Config",
    "InputError",
    "KVComm",
    "KVCommError",
    "Output",
    "ReuseReport",
    "TeamError",
    "UnsupportedModel",
    "__version__",
]

if not TYPE_CHECKING:  # type checkers see the imports above, and a misspelt name

    def __getattr__(name: str) -> object:
        """PEP 562: find the module that defines `name`; raises AttributeError for names outside `__all__`."""
        match name:
            case "KVComm" | "Output":
                module = "kvcomm.engine"
            case "Config":
                module = "kvcomm.config"
            case "ReuseReport":
                module = "kvcomm.segments"
            case "CacheFault" | "InputError" | "KVCommError" | "TeamError" | "UnsupportedModel":
                module = "kvcomm.errors"
            case _:
                raise AttributeError(f"module 'kvcomm' has no attribute {name!r}")
        return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
