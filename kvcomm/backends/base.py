"""The contract of a backend: where a model runs, and how known K/V gets into one of its prompts.

One request: `cache` -> `fill` with known spans -> `arm` -> the model's own generate inside `hooked` -> `read` what is new ->
`release`. A request that reuses nothing leaves out `fill` and `arm`. Knows nothing of stores, plans or agents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from kvcomm.backends.span_cache import SpanCache
    from kvcomm.plain import PlainKV
    from kvcomm.segments import Ids, SegmentKV, Span

__all__ = ["Backend", "Look"]


@dataclass(frozen=True, eq=False)
class Look:
    """What a pass says besides the last token's logits."""

    logits: Tensor  # [last, vocabulary], of the tokens that were asked for
    attention: Tensor  # float32 [N]: what the last token attends to, mean over layers and heads


class Backend(Protocol):
    """One model. Calls for different caches may come from several threads, those for one cache from one thread."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def name(self) -> str:
        """What a person calls this model."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of everything that K/V depends on; K/V of another fingerprint must not be filled in. Computed once."""
        ...

    @property
    def context_limit(self) -> int | None:
        """Tokens that the model can read; None if it does not say."""
        ...

    def same_tables(self, length: int, other: int) -> bool:
        """Whether sequences of these two lengths share their rotary tables: only then can K/V of one be exact in the other."""
        ...

    def refusal(
        self, input_ids: Any, generate_kwargs: Mapping[str, Any], generation_config: GenerationConfig | None = None
    ) -> str | None:
        """Why this call of generate must be left alone, in a few words; None if it can be served. Changes nothing."""
        ...

    def cache(self, tokens: int) -> SpanCache:
        """An empty cache with room for `tokens`; it grows beyond them at the price of a copy."""
        ...

    def release(self, cache: SpanCache) -> None:
        """Takes the cache's buffers for later requests; the cache is empty afterwards. Only for a caller who knows that nobody
        else holds the cache or views of it: their contents will change.
        """
        ...

    def fill(self, cache: SpanCache, length: int, spans: Sequence[tuple[Span, SegmentKV]], *, rotate: bool = True) -> None:
        """Writes each span's K/V to its place in a prompt of `length` tokens, which must fit into the cache. `Span.offset`
        indexes into the SegmentKV. Keys are rotated from their old to their new position in float32; what did not move is
        copied bit for bit. `rotate=False` copies all keys as they are: wrong for moved spans, and there to be compared with.
        Raises CacheFault for K/V of other shapes than the model's.
        """
        ...

    def arm(self, cache: SpanCache, ids: Tensor, recompute: Tensor) -> None:
        """Makes the next forward with this cache, inside `hooked`, the one pass over positions `recompute` [r] (int64,
        ascending, the last being N - 1) of prompt `ids` [1, N]. Until then the cache says that it holds N - 1 tokens, so that
        generate asks for the last one alone. Raises CacheFault where cached tokens, filled spans and `recompute` leave a hole
        in 0 .. N - 1, or where what is cached carries rotary tables that do not fit N tokens.
        """
        ...

    def hooked(self, on_first_logits: Callable[[Tensor], None] | None = None) -> AbstractContextManager[None]:
        """Inside, forwards of the calling thread serve armed caches; other threads and other caches are not touched.
        `on_first_logits` gets the logits [vocabulary] of the last position of the first forward, whichever cache it has; what
        it raises goes through generate to the caller. On exit the hooks are gone, and a cache that is still armed is empty.
        """
        ...

    def run(self, cache: SpanCache, ids: Tensor, recompute: Tensor) -> Tensor:
        """`arm`, then the pass without generate: the last token's logits [vocabulary]. The cache then holds all N tokens."""
        ...

    def look(self, cache: SpanCache, ids: Tensor, recompute: Tensor, last: int = 1) -> Look:
        """As `run`, and tells more: the logits of the last `last` tokens, all of them in `recompute`, and what the last one
        attends to. `ids` may go on behind what was looked at before: so an answer is drafted; `arm` with the prompt alone
        takes that back. Raises CacheFault as `arm` does, and where this model's attention cannot be watched.
        """
        ...

    def read(self, cache: SpanCache, start: int, end: int, length: int) -> SegmentKV:
        """Copies K/V of tokens [start, end) out of row 0. `length`: tokens of the sequence that they were computed in. Raises
        CacheFault for tokens that are not there, or keys that do not share one set of rotary tables (decoded, dynamic rope).
        """
        ...

    def plain(self, kv: SegmentKV, start: int, end: int) -> PlainKV:
        """Tokens [start, end) of `kv` in pre-RoPE space: keys rotated to position 0, float32."""
        ...

    def correct(self, cache: SpanCache, length: int, start: int, deviation: PlainKV) -> None:
        """Adds a deviation to the K/V that `fill` wrote at `start` of a prompt of `length` tokens; keys are rotated there."""
        ...

    def context(self, ids: Ids) -> Tensor:
        """float32 [c]: features of a text in front of a span, from its last tokens alone; no forward is needed."""
        ...
