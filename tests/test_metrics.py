"""Counters against reports counted by hand, and the text they render."""

from __future__ import annotations

import re
import threading

import pytest

from kvcomm.metrics import Counters
from kvcomm.segments import ReuseReport, SpanReport

SPANS = (SpanReport(0, 40, "exact", 40, 0, "a", 0), SpanReport(50, 90, "boundary", 36, 4, "b", 10))
SHARED = ReuseReport("critic", prompt_tokens=100, reused_tokens=76, computed_tokens=24, spans=SPANS)
DENSE = ReuseReport("critic", prompt_tokens=30, reused_tokens=0, computed_tokens=30, fallback="fault: layer 3 holds NaN")


def test_render() -> None:
    counters = Counters()
    counters.record(SHARED)
    counters.record(DENSE)
    counters.fault("poisoned")
    counters.fault('odd "kind"\n\\')
    samples = [line for line in counters.render().splitlines() if not line.startswith("#")]
    assert samples == [
        "kvcomm_requests_total 2",
        "kvcomm_prompt_tokens_total 130",
        'kvcomm_reused_tokens_total{rung="boundary"} 36',
        'kvcomm_reused_tokens_total{rung="exact"} 40',
        'kvcomm_computed_tokens_total{rung="boundary"} 4',
        'kvcomm_computed_tokens_total{rung="dense"} 50',
        'kvcomm_computed_tokens_total{rung="exact"} 0',
        'kvcomm_fallbacks_total{reason="fault"} 1',
        r'kvcomm_faults_total{kind="odd \"kind\"\n\\"} 1',
        'kvcomm_faults_total{kind="poisoned"} 1',
    ]


def test_tokens_add_up_to_the_prompts() -> None:
    counters = Counters()
    for report in (SHARED, DENSE, SHARED):
        counters.record(report)
    tokens = re.findall(r"_(?:reused|computed)_tokens_total\{.*\} (\d+)", counters.render())
    assert sum(map(int, tokens)) == counters.value("prompt_tokens") == 230
    assert counters.value("fallbacks", "fault") == 1
    assert counters.value("faults", "never") == 0
    with pytest.raises(KeyError):
        counters.value("no such metric")


def test_every_sample_has_its_help_and_type_also_before_the_first_request() -> None:
    text = Counters().render()
    names = re.findall(r"^# HELP (\w+) \S.*\n# TYPE (\w+) counter$", text, re.MULTILINE)
    assert len(names) == 6
    assert all(a == b and a.startswith("kvcomm_") and a.endswith("_total") for a, b in names)
    assert text.endswith("\n")
    assert "kvcomm_requests_total 0\n" in text


def test_nothing_is_lost_between_threads() -> None:
    counters = Counters()

    def work() -> None:
        for _ in range(500):
            counters.record(SHARED)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.value("requests") == 2000
    assert counters.value("reused_tokens", "exact") == 80_000
