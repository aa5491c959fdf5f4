"""The demo's arms on a real vLLM: one engine with prefix caching and the connector, asked by each arm in its own way.

    dense         kvcomm leaves the request alone, and its cache salt is its own: nothing at all is cached
    prefix_cache  kvcomm leaves it alone; one cache salt for all of them: what vLLM does by itself
    shared        kvcomm, as a tenant of its own, above vLLM's prefix cache

There is no arm `rotate`: which rung moved text gets is set once per engine. Texts are encoded by the engine's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count

from kvcomm.connectors.local import LocalEngine
from kvcomm.demo.runner import STORE_BYTES
from kvcomm.engine import Output, Rule

__all__ = ["Arm", "arms"]


@dataclass(frozen=True)
class Arm:
    """A generator for `Team.run`."""

    engine: LocalEngine
    name: str
    calls: count[int] = field(default_factory=count)

    def generate(self, messages: Sequence[Mapping[str, str]], *, agent: str, rule: Rule, max_new_tokens: int) -> Output:
        tenant = f"dense {next(self.calls)}" if self.name == "dense" else self.name
        words = {"agent": agent, "rule": rule, "mode": "on" if self.name == "shared" else "off"}
        reply = self.engine.ask(self.engine.chat(messages), tenant=tenant, words=words, new=max_new_tokens)
        assert reply.report is not None, "the connector reports on every request"
        return Output(reply.text.strip(), reply.ids, reply.first_ms, replace(reply.report, ttft_ms=reply.first_ms))


@contextmanager
def arms(model: str, dtype: str, *, quiet: bool) -> Iterator[dict[str, Arm]]:
    """As long as the engine is open. Raises InputError where there is no vLLM, or it cannot load the model."""
    # Not measured: what is shared is the same on every machine.
    extra = {"store_bytes": STORE_BYTES, "least_gain": 32}
    engine = LocalEngine.start(model, dtype=dtype, extra=extra, tokenizer=True, quiet=quiet)
    try:
        yield {name: Arm(engine, name) for name in ("dense", "prefix_cache", "shared")}
    finally:
        engine.close()
