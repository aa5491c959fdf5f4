"""Estimators by name, as benchmarks and configuration ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from kvcomm.errors import InputError
from kvcomm.estimators.base import Estimator
from kvcomm.estimators.edges import Edges
from kvcomm.estimators.fallback import Fallback
from kvcomm.estimators.knn import Knn
from kvcomm.estimators.mean import Mean
from kvcomm.estimators.paper import Paper
from kvcomm.estimators.ridge import Ridge
from kvcomm.estimators.select import Select

__all__ = ["ESTIMATORS", "make"]


def _best() -> Estimator:
    return Fallback(Ridge(share=True), Knn())


ESTIMATORS: Mapping[str, Callable[[], Estimator]] = MappingProxyType(
    {
        "paper": lambda: Paper(gamma=None),
        "mean": Mean,
        "knn": Knn,
        "ridge": Ridge,
        "ridge-shared": _best,
        "select": Select,
        "edges": lambda: Edges(Mean()),
    }
)
"""Fresh estimators. `paper` is without its gate and serves every request; in `ridge-shared` slots lean on each other."""


def make(names: Iterable[str]) -> dict[str, Estimator]:
    """Raises InputError for an unknown name."""
    names = list(names)
    if unknown := sorted(set(names) - set(ESTIMATORS)):
        raise InputError(f"estimator {unknown[0]!r} is unknown; use one of {', '.join(ESTIMATORS)}")
    return {name: ESTIMATORS[name]() for name in names}
