"""What vLLM loads by name: `KVCommConnector` (--kv-transfer-config) and `RunnerHandle` (--worker-extension-cls).

Importing this module needs neither vLLM nor torch; asking it for one of the two does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet

if TYPE_CHECKING:
    from kvcomm.connectors._vllm import KVCommConnector
    from kvcomm.connectors.vllm_compat import RunnerHandle

__all__ = ["TESTED", "KVCommConnector", "RunnerHandle"]

TESTED = SpecifierSet(">=0.32,<0.33")  # versions of vLLM that `vllm_compat` was written for and tried with


def __getattr__(name: str) -> type:
    if name == "KVCommConnector":
        from kvcomm.connectors._vllm import KVCommConnector

        return KVCommConnector
    if name == "RunnerHandle":
        from kvcomm.connectors.vllm_compat import RunnerHandle

        return RunnerHandle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
