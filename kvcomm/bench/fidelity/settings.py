"""What a row was measured under, and the axes along which one of these things changes while the others stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from kvcomm.bench.fidelity.cases import Base, Template
from kvcomm.codecs import codec
from kvcomm.errors import InputError
from kvcomm.tiny.words import DOMAINS

__all__ = ["AXES", "DISTRIBUTIONS", "Axis", "Setting", "along"]


def _other_words(template: Template) -> Template:
    names = list(DOMAINS)
    return replace(template, workload=names[(names.index(template.workload) + 1) % len(names)])


def _short(template: Template) -> Template:
    least, most = template.fillers
    return replace(template, fillers=(least // 4, most // 4))


DISTRIBUTIONS: Mapping[str, Callable[[Template], Template]] = MappingProxyType(
    {
        "same": lambda template: template,
        "short": _short,
        "few": lambda template: replace(template, documents=2),
        "words": _other_words,
    }
)
"""What is learned from, given what is asked: the same kind of request; documents of a quarter of the length; two documents,
so that later slots were never seen; the words of another workload (its attributes, values and kind of document)."""


@dataclass(frozen=True)
class Setting:
    """Everything but the methods."""

    base: Base
    documents: int
    fillers: tuple[int, int]  # sentences per document that hold no fact: least, most
    anchors: int  # requests that each template learns from
    distribution: str  # of DISTRIBUTIONS
    codec: str  # how anchors are stored

    def __post_init__(self) -> None:
        codec(self.codec)
        if self.distribution not in DISTRIBUTIONS:
            raise InputError(f"distribution {self.distribution!r} is unknown; use one of {', '.join(DISTRIBUTIONS)}")
        if self.documents < 2 or self.anchors < 0:
            raise InputError(f"{self.documents} documents and {self.anchors} anchors; at least two documents are needed")

    @property
    def asked(self) -> tuple[Base, int, tuple[int, int]]:
        """Settings with the same are asked the same requests."""
        return self.base, self.documents, self.fillers


@dataclass(frozen=True)
class Axis:
    """One thing that changes."""

    field: str  # of a row: where its value is found
    values: tuple[str, ...]  # used unless others are asked for
    at: Callable[[Setting, str], Setting]


def _length(setting: Setting, value: str) -> Setting:
    sentences = int(value)
    return replace(setting, fillers=(sentences - sentences // 5, sentences + sentences // 5))


AXES: Mapping[str, Axis] = MappingProxyType(
    {
        "documents": Axis("documents", ("2", "3", "4", "5"), lambda s, v: replace(s, documents=int(v))),
        "anchors": Axis("anchors", ("1", "2", "5", "10", "20", "50"), lambda s, v: replace(s, anchors=int(v))),
        "distribution": Axis("distribution", tuple(DISTRIBUTIONS), lambda s, v: replace(s, distribution=v)),
        "length": Axis("span_tokens", ("2", "5", "11", "22", "44"), _length),
        "codec": Axis("codec", ("raw", "int8", "lowrank:8+int8", "lowrank:6+int8"), lambda s, v: replace(s, codec=v)),
    }
)


def along(axis: str | None, values: tuple[str, ...], setting: Setting) -> list[Setting]:
    """`setting` at every value of the axis, or alone. Raises InputError for a value that the axis does not have."""
    if axis is None:
        return [setting]
    try:
        return [AXES[axis].at(setting, value) for value in values or AXES[axis].values]
    except ValueError as e:
        raise InputError(f"{' '.join(values)!r} cannot be values of the axis {axis}: {e}") from None
