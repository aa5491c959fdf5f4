"""How the fidelity benchmark's results are judged and shown, from numbers made up here."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from kvcomm.bench.fidelity.page import page
from kvcomm.bench.fidelity.proportions import paired, wilson
from kvcomm.bench.fidelity.table import table
from kvcomm.bench.fidelity.views import along, family, pareto
from kvcomm.plot import Canvas, Mark, scale_x, scale_y
from kvcomm.report import document


def test_intervals_are_wilsons() -> None:
    """Against the published example of 0 of 10 and the symmetry of the interval."""
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)
    low, high = wilson(3, 10)
    assert wilson(7, 10) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (0, 6), (2, 5), (4, 4), (9, 1)])
def test_the_paired_test_is_exact(lost: int, gained: int) -> None:
    """Against all outcomes of as many fair coins: how many are at least as lopsided."""
    before = [True] * lost + [False] * gained + [True, False] * 5
    now = [False] * lost + [True] * gained + [True, False] * 5
    found = paired(before, now)
    flips = [abs(2 * sum(c) - lost - gained) for c in product((0, 1), repeat=lost + gained)]
    assert found.p_value == pytest.approx(sum(f >= abs(lost - gained) for f in flips) / len(flips))
    assert (found.requests, found.lost, found.gained) == (lost + gained + 10, lost, gained)
    assert found.lost_high == wilson(lost, lost + gained + 10)[1]


def test_scales_and_ticks() -> None:
    linear, log = scale_y(0.0, 1.0), scale_x(2, 210, log=True)
    assert [t.text for t in linear.ticks()] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert linear(0.25) - linear(0.0) == pytest.approx(linear(0.75) - linear(0.5))
    assert [t.text for t in log.ticks()] == ["2", "5", "10", "20", "50", "100", "200"]
    assert log(20) - log(2) == pytest.approx(log(200) - log(20))
    assert linear(7.0) == linear(1.0), "what is outside is put on the border"
    assert [t.text for t in scale_y(1e-5, 2.0, log=True).ticks()][::2] == ["1e-05", "0.001", "0.1"]


def test_labels_cover_nothing() -> None:
    """A crowd of marks: some get labels, no label covers a mark or another label, and all are inside."""
    x, y = scale_x(0, 10), scale_y(0, 1)
    canvas = Canvas(x, y, "", "", [], [])
    canvas.marks += [Mark(x(i % 10), y(i % 7 / 10), "red", "") for i in range(40)]
    canvas.name_marks([(mark, "knn+refresh:0.05") for mark in canvas.marks])
    assert 5 < len(canvas.labels) < 40
    boxes = [(one.x, one.y - 9, one.x + 6 * len(one.text), one.y) for one in canvas.labels]
    for i, a in enumerate(boxes):
        assert 0 < a[0] < a[2] < 540
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])
        assert not any(a[0] < m.x < a[2] and a[1] < m.y < a[3] for m in canvas.marks)


def row(name: str, **values: Any) -> dict[str, Any]:
    learns = family(name) in ("chosen by anchors", "corrected from anchors", "the paper")
    return {
        "name": name, "base": "isolated", "binding": "all", "documents": 5, "fillers": [2, 4], "span_tokens": 30.0,
        "anchors": 9 if learns else 0, "distribution": "same" if learns else None, "codec": "int8" if learns else None,
        "requests": 10, "accuracy": 0.5, "accuracy_low": 0.2, "accuracy_high": 0.8, "dense_accuracy": 1.0, "kl": 0.1,
        "top1": 0.9, "token_reuse_rate": 0.9, "compute_share": 0.1, "declined_rate": 0.0, "ttft_ms": 10.0,
        "split_ms": {"rotate": 1.0}, "dense_ms": None, "bytes_per_anchor": 1.0 if learns else None,
        "deviation_bytes_per_anchor": 1.0, "bf16_deviation_bytes_per_anchor": 9.0, **values,
    }  # fmt: skip


def test_the_line_joins_what_none_beats() -> None:
    rows = [
        row("dense", accuracy=1.0, kl=0.0, ttft_ms=50.0),
        row("rotate", accuracy=0.4, kl=0.5, ttft_ms=5.0),
        row("paper", accuracy=0.4, kl=0.6, ttft_ms=30.0),  # beaten in both
        row("select+refresh:0.05", accuracy=0.9, kl=0.01, ttft_ms=20.0),
        row("rotate+oracle:0.05", accuracy=1.0, kl=0.0, ttft_ms=4.0),  # a control: nobody could use it
    ]
    for quality in ("accuracy", "kl"):
        canvas = pareto(rows, quality, "ttft_ms")
        (line,) = canvas.lines
        assert line[0] == " ".join(f"{canvas.marks[i].x:.1f},{canvas.marks[i].y:.1f}" for i in (1, 3, 0))
        assert {label.text for label in canvas.labels} == {r["name"] for r in rows}
        best, worst = canvas.marks[0].y, canvas.marks[1].y
        assert best < worst if quality == "accuracy" else best > worst, "less divergence is lower"


def test_what_learns_nothing_is_the_same_all_along() -> None:
    rows = [row("rotate", accuracy=0.3), *(row("mean", anchors=n, accuracy=0.1 * n) for n in (1, 5, 9))]
    found = along("anchors", rows)
    assert found.ticks == ["1", "5", "9"]
    assert [r and r["accuracy"] for r in found.rows["rotate"]] == [0.3] * 3
    assert [r and r["anchors"] for r in found.rows["mean"]] == [1, 5, 9]
    assert [dashed for *_, dashed in found.plot.lines] == [True, False]


def made(axis: str | None, rows: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    return document(
        "kvcomm.bench.fidelity/1", axis=axis, model="<tiny>", templates=1, requests=10, documents=5, fillers=[2, 4],
        anchors=9, codec="int8", seed=0, methods=rows, pairs=pairs,
    )  # fmt: skip


def test_the_page_shows_every_document() -> None:
    pair = {
        "name": "mean", "base": "isolated", "codec": "raw", "against": "mean", "against_codec": "int8", "requests": 10,
        "lost": 3, "gained": 1, "p_value": 0.625, "lost_high": 0.6,
    }  # fmt: skip
    docs = [
        made(None, [row("dense", accuracy=1.0), row("boundary:2"), row("boundary:2", binding="other", accuracy=0.123)], []),
        made("codec", [row("dense", accuracy=1.0), row("mean"), row("mean", codec="raw")], [pair]),
        made("length", [row("rotate", span_tokens=n, fillers=[n, n], accuracy=n / 100) for n in (20, 40)], []),
    ]
    html = page(docs)
    assert "http" not in html, "nothing is loaded from elsewhere"
    assert "&lt;tiny&gt;" in html
    assert all(f"<h2>{title}" in html for title in ("Base: isolated", "Along codec", "Along length"))
    for shown in ("boundary:2", "0.123", "0.625", "9.0 times", "0.400"):
        assert shown in html
    assert page(docs[2:]).count("<svg") == 1
    assert "base: isolated, length 40" in table(docs[2])
