"""One setting, run: each template's estimators learn, one request at a time, then every method serves the same requests.

What is asked depends on the seed and on `Setting.asked` alone, so that settings can be compared request by request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from kvcomm.anchors.anchor import Anchor
from kvcomm.backends.hf import HFBackend
from kvcomm.bench.fidelity.cases import Base, Template, case, templates
from kvcomm.bench.fidelity.early import Early
from kvcomm.bench.fidelity.methods import Method, Outcome, deviation, serve
from kvcomm.bench.fidelity.settings import DISTRIBUTIONS, Setting
from kvcomm.codecs import codec
from kvcomm.codecs.base import Codec, pack, unpack
from kvcomm.estimators.base import Estimator
from kvcomm.estimators.catalogue import make
from kvcomm.segments import Ids
from kvcomm.tiny import tasks

__all__ = ["CLASSES", "Asked", "Size", "Trial", "learn", "run"]

CLASSES: tuple[tasks.Binding, ...] = ("self", "header", "other", "two-hop")


@dataclass(frozen=True, eq=False)
class Asked:
    """What is kept of a request once it is served."""

    ids: Ids
    binding: tasks.Binding
    dense_right: bool
    span_tokens: float  # mean over its pieces


@dataclass(frozen=True)
class Size:
    """Bytes of one anchor."""

    stored: int  # all of it: base, deviation, token ids, context
    deviation: int  # stored
    bf16: int  # of the deviation in bf16 at full rank


@dataclass(frozen=True, eq=False)
class Trial:
    """The outcomes of one setting."""

    setting: Setting
    asked: tuple[Asked, ...]
    outcomes: Mapping[str, Sequence[Outcome]]  # by method's name, one per request
    sizes: Sequence[Size]


def run(
    backend: HFBackend,
    setting: Setting,
    methods: Sequence[Method],
    count: int,
    each: int,
    seed: int,
    tick: Callable[[int], object] = lambda _: None,
) -> Trial:
    """`count` templates, `each` requests to every one of them. `tick` is told of requests that are done."""
    early = Early(backend)
    asked: list[Asked] = []
    outcomes: dict[str, list[Outcome]] = {m.name: [] for m in methods}
    sizes: list[Size] = []
    for template in templates(count, setting.documents, setting.fillers, seed):
        estimators = make({m.estimator for m in methods if m.estimator})
        taught, rng, order = (random.Random(f"{seed} {template.name} {what}") for what in ("learned", "asked", "order"))
        if estimators:
            source, store = DISTRIBUTIONS[setting.distribution](template), codec(setting.codec)
            sizes += learn(backend, source, setting.base, estimators, store, setting.anchors, taught)
        tick(setting.anchors)
        for i in range(each):
            now = case(backend, template, setting.base, rng, CLASSES[i % len(CLASSES)])
            asked.append(Asked(now.ids, now.binding, now.dense_right, fmean(p.span.tokens for p in now.pieces)))
            for method in order.sample(methods, len(methods)):
                outcomes[method.name].append(serve(backend, now, method, estimators, early))
            tick(1)
    return Trial(setting, tuple(asked), outcomes, sizes)


def learn(
    backend: HFBackend,
    template: Template,
    base: Base,
    estimators: Mapping[str, Estimator],
    store: Codec,
    count: int,
    rng: random.Random,
) -> list[Size]:
    """Feeds the estimators the anchors of `count` requests, as they would come back from storage."""
    sizes = []
    for i in range(count):
        seen = case(backend, template, base, rng, CLASSES[i % len(CLASSES)])
        for number, piece in enumerate(seen.pieces):
            span = piece.span
            kv, change = deviation(backend, seen, number)
            anchor = Anchor(
                piece.slot, seen.ids[span.start : span.end], pack(store, kv), pack(store, change),
                backend.context(seen.ids[: span.start]), span.segment.context, seen.ids[: span.start], backend.fingerprint,
            )  # fmt: skip
            sizes.append(Size(anchor.nbytes, anchor.deviation.nbytes, change.nbytes // 2))
            kept = unpack(store, anchor.base), unpack(store, anchor.deviation)
            for estimator in estimators.values():
                estimator.learn(anchor, *kept)
    return sizes
