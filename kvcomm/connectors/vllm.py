"""What vLLM loads by name: `KVCommConnector` (--kv-transfer-config) and `RunnerHandle` (--worker-extension-cls).

Importing this module needs no vLLM; asking it for one of the two does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcomm.connectors._vllm import KVCommConnector
    from kvcomm.connectors.vllm_compat import RunnerHandle

__all__ = ["KVCommConnector", "RunnerHandle"]


def __getattr__(name: str) -> type:
    if name == "KVCommConnector":
        from kvcomm.connectors._vllm import KVCommConnector

        return KVCommConnector
    if name == "RunnerHandle":
        from kvcomm.connectors.vllm_compat import RunnerHandle

        return RunnerHandle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
