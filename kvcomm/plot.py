"""Geometry of plots: numbers become places on a canvas, and labels are put where they cover nothing. Draws nothing itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Canvas", "Label", "Mark", "Scale", "Tick", "scale_x", "scale_y"]

WIDTH, HEIGHT = 540, 400  # pixels
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 44  # margins
LETTER, LINE, RADIUS = 6.3, 13.0, 4.0  # width of a letter, height of a line, radius of a mark

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to pixels, by logarithm if asked for; what is outside is put on the border."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (self._plain(x) for x in (self.low, self.high, min(max(value, self.low), self.high)))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def _plain(self, value: float) -> float:
        return math.log(value) if self.log else value

    def ticks(self) -> list[Tick]:
        """Logarithmic at 1, 2 and 5 times powers of ten (over many decades at these alone), else at about six values."""
        if self.log:
            steps = (1, 2, 5) if self.high / self.low < 1e3 else (1,)
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [step * 10.0**power for power in powers for step in steps]
        else:
            rough = (self.high - self.low) / 5
            unit = 10 ** math.floor(math.log10(rough))
            step = min((m * unit for m in (1, 2, 5, 10)), key=lambda x: abs(x - rough))
            values = [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        return [Tick(self(v), f"{v:.6g}") for v in values if self.low * 0.999 <= v <= self.high * 1.001]


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Label:
    text: str
    x: float  # of its left end
    y: float  # of its base line
    colour: str


@dataclass(frozen=True)
class Mark:
    """One result. `low` and `high` are the ends of its interval, in pixels."""

    x: float
    y: float
    colour: str
    title: str
    low: float | None = None
    high: float | None = None


@dataclass
class Canvas:
    """A plot being made. Mutable."""

    x: Scale
    y: Scale
    x_name: str
    y_name: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark] = field(default_factory=list)
    lines: list[tuple[str, str, bool]] = field(default_factory=list)  # points of a polyline, colour, dashed
    labels: list[Label] = field(default_factory=list)

    def line(self, points: Iterable[tuple[float, float]], colour: str, *, dashed: bool = False) -> None:
        """Through pixels."""
        self.lines.append((" ".join(f"{x:.1f},{y:.1f}" for x, y in points), colour, dashed))

    def name_marks(self, texts: Sequence[tuple[Mark, str]]) -> None:
        """A label beside each mark, the first ones first; one that would cover a mark or another label is left out."""
        taken = [_around(mark) for mark in self.marks]
        for mark, text in texts:
            for label in _places(mark, text):
                box = _box(label)
                inside = box[0] > LEFT and box[2] < WIDTH and box[1] > 0 and box[3] < HEIGHT - BOTTOM
                if inside and not any(_overlap(box, other) for other in taken):
                    self.labels.append(label)
                    taken.append(box)
                    break

    def name_ends(self, texts: Sequence[tuple[float, float, str, str]]) -> None:
        """Labels at (x, y) with their colours, one below the other where they would overlap."""
        free = 0.0
        for x, y, text, colour in sorted(texts, key=lambda t: t[1]):
            free = max(free + LINE, y + LINE / 3)
            self.labels.append(Label(text, x, free, colour))


def scale_x(low: float, high: float, *, log: bool = False, right: float = RIGHT) -> Scale:
    return Scale(low, high, LEFT, WIDTH - right, log)


def scale_y(low: float, high: float, *, log: bool = False) -> Scale:
    return Scale(low, high, HEIGHT - BOTTOM, TOP, log)


def _places(mark: Mark, text: str) -> Iterable[Label]:
    """Right, left, above, below, and farther off above and below; in the colour of the mark."""
    width = LETTER * len(text)
    yield Label(text, mark.x + 7, mark.y + 4, mark.colour)
    yield Label(text, mark.x - 7 - width, mark.y + 4, mark.colour)
    for rise in (8, 18):
        for shift in (-0.5, 0.0, -1.0):
            yield Label(text, mark.x + shift * width, mark.y - rise, mark.colour)
            yield Label(text, mark.x + shift * width, mark.y + rise + 9, mark.colour)


def _around(mark: Mark) -> Box:
    return mark.x - RADIUS, mark.y - RADIUS, mark.x + RADIUS, mark.y + RADIUS


def _box(label: Label) -> Box:
    return label.x, label.y - LINE + 3, label.x + LETTER * len(label.text), label.y + 3


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
