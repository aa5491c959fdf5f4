"""One dense run per family, and references made with plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvcomm.backends.hf import HFBackend
from kvcomm.backends.span_cache import SpanCache
from kvcomm.segments import Segment, SegmentKV, Span
from kvcomm.testing import FAMILIES, tiny_random

Known = list[tuple[Span, SegmentKV]]
N = 72  # tokens of a prompt: over the sliding windows (16) and the switch of ropes that follow the length (40)


@dataclass(frozen=True)
class Case:
    """A family's model, and what it does densely with one prompt."""

    family: str
    backend: HFBackend
    ids: Tensor  # [1, N]
    kv: SegmentKV
    logits: Tensor  # [N, vocabulary]

    @classmethod
    def of(cls, family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Case:
        model = tiny_random(family, **overrides)
        model.to(dtype)  # type: ignore[arg-type]  # transformers' annotation lost its first parameter
        backend = HFBackend(model)
        return cls(family, backend, cls.prompt(1), *cls.dense_of(model, cls.prompt(1)))

    @property
    def model(self) -> PreTrainedModel:
        return self.backend.model

    @staticmethod
    def prompt(seed: int, tokens: int = N) -> Tensor:
        """Random ids [1, tokens]."""
        return torch.randint(3, 200, (1, tokens), generator=torch.Generator().manual_seed(seed))

    @staticmethod
    def span(start: int, end: int, offset: int = 0) -> Span:
        """Tokens [start, end) from `offset` of a segment, of which the backend reads nothing else."""
        return Span(start, end, "rotate", Segment(np.zeros(0, np.int32), np.zeros(0, np.int32), ""), offset)

    @classmethod
    def dense_of(cls, model: PreTrainedModel, ids: Tensor) -> tuple[SegmentKV, Tensor]:
        """K/V of all tokens and logits [tokens, vocabulary] from one plain forward over `ids` [1, tokens]."""
        cls.reset(model)
        cache = DynamicCache()  # without a configuration: it keeps everything, on sliding layers too
        with torch.no_grad():
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
        layers: Any = cache.layers
        return SegmentKV(tuple(x.keys[0] for x in layers), tuple(x.values[0] for x in layers), 0, ids.shape[1]), logits

    def dense(self, ids: Tensor) -> tuple[SegmentKV, Tensor]:
        return self.dense_of(self.model, ids)

    @staticmethod
    def reset(model: PreTrainedModel) -> None:
        """Ropes that follow the length remember the longest sequence; one token makes them as new."""
        with torch.no_grad():
            model.get_decoder()(input_ids=torch.tensor([[5]]))  # not the model itself: no hook sees it

    def same_place(self, *places: tuple[int, int]) -> Known:
        """Spans of the dense run's own K/V where they were."""
        return [(self.span(a, b, a), self.kv) for a, b in places]

    def cache(self, spans: Known, tokens: int = N) -> SpanCache:
        """A cache with these spans, and NaN everywhere else."""
        cache = self.backend.cache(tokens)
        for layer in cache.layers:
            layer.k.fill_(torch.nan)
            layer.v.fill_(torch.nan)
        self.backend.fill(cache, tokens, spans)
        return cache

    def generate(self, cache: SpanCache | None = None, **options: Any) -> Any:
        """The model's own generate on the prompt, seeded."""
        self.reset(self.model)
        torch.manual_seed(11)
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(self.ids), **options}
        generate: Any = self.model.generate
        return generate(self.ids, past_key_values=cache, **options)


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def case(request: pytest.FixtureRequest) -> Case:
    """Every family in turn; its model must be left as it was."""
    return Case.of(request.param)


@pytest.fixture(scope="session")
def llama() -> Case:
    return Case.of("llama")


@pytest.fixture(scope="session")
def make() -> Callable[..., Case]:
    """A case of one's own, to be changed."""
    return Case.of
