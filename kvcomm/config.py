"""One frozen configuration, validated once. Environment variables are read here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from kvcomm.errors import InputError

__all__ = ["Anchors", "Config", "Mode"]

Mode = Literal["on", "off"]
Anchors = Literal["off", "alone", "all"]


@dataclass(frozen=True)
class Config:
    """Knobs of the engine; the defaults are what the measurements in docs/log.md support."""

    mode: Mode = "on"
    rung: Literal["boundary", "rotate", "naive"] = "boundary"  # for moved spans; the last two exist to be compared with
    min_run: int = 16  # tokens; shorter matches are not worth a seam
    boundary: int = 2  # tokens recomputed at the start of every moved span
    closing: int = 16  # tokens recomputed at the end of the prompt
    max_recompute: float = 0.8  # share of the prompt; above it the request goes dense
    anchors: Anchors = "alone"  # moved text waits for anchors: of tenants that prefill texts alone, or always (all), or never
    doubt: float = 4.0  # under rung anchor, tokens doubted by more than this many times the lower decile are computed again
    explore: float = 0.02  # share of requests with text that waits which are computed densely, to learn from
    draft_check: float = (
        0.0  # nats; a request whose drafted answer changes by more goes dense (kvcomm.draft_check); 0: unchecked
    )
    estimator: str = "select"  # one of kvcomm.estimators.catalogue
    anchor_codec: str = "lowrank:6+int8"  # how anchors are stored: a name of kvcomm.codecs
    anchor_bytes: int = 256 << 20
    anchors_per_slot: int = 100  # a slot is an agent
    store_bytes: int = 4 << 30
    index_windows: int = 1 << 20  # bound of the index of known text, in windows (one per 8 stored tokens)
    variants: int = 8  # contexts kept per known run

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(f"mode is {self.mode!r}; use one of {', '.join(get_args(Mode))}")
        if self.rung not in ("boundary", "rotate", "naive"):
            raise InputError(f"rung is {self.rung!r}; use boundary, rotate or naive")
        if self.anchors not in get_args(Anchors):
            raise InputError(f"anchors is {self.anchors!r}; use one of {', '.join(get_args(Anchors))}")
        for name, least in {
            "min_run": 16,
            "boundary": 0,
            "closing": 1,
            "anchor_bytes": 0,
            "anchors_per_slot": 1,
            "store_bytes": 0,
            "index_windows": 1,
            "variants": 1,
        }.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("doubt", "draft_check"):
            if not getattr(self, name) >= 0.0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("max_recompute", "explore"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, 0 to 1")

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ, **given: object) -> Config:
        """Defaults, then `KVCOMM_<FIELD>` variables, then `given`. Raises InputError naming a variable that does not parse."""
        values: dict[str, object] = {}
        for field in fields(cls):
            text = env.get(f"KVCOMM_{field.name.upper()}")
            if text is None:
                continue
            kind: Callable[[str], object] = type(field.default)
            try:
                values[field.name] = kind(text)
            except ValueError as e:
                raise InputError(f"KVCOMM_{field.name.upper()} is {text!r}; it must be a {kind.__name__}") from e
        return cls(**{**values, **given})  # type: ignore[arg-type]  # names are fields; __post_init__ checks the values
