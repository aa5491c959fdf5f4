"""Increments of counters on their way to Prometheus."""

from __future__ import annotations

import json

import pytest

from kvcomm.connectors.stats import METRICS, Exporter, Stats, reported, summary
from kvcomm.metrics import Counters
from kvcomm.segments import ReuseReport, SpanReport

REPORT = ReuseReport("critic", 100, 60, 40, (SpanReport(10, 80, "boundary", 60, 10, "clerk", 5),))


def test_increments_add_up_to_the_counters() -> None:
    counters, taken, total = Counters(), Stats(), Stats()
    assert taken.since(counters) is None
    for _ in range(3):
        counters.record(REPORT)
        counters.fault("load")
        fresh = taken.since(counters)
        assert fresh is not None
        assert not fresh.is_empty()
        total.aggregate(Stats(fresh.to_dict()))
    assert taken.since(counters) is None
    assert total.data == {name: labels for name, labels in counters.counts().items() if labels}
    assert total.data["reused_tokens"] == {"boundary": 180}
    assert total.data["computed_tokens"] == {"boundary": 30, "dense": 90}
    assert total.data["faults"] == {"load": 3}
    assert total.reduce() == {
        "kvcomm_requests": 3,
        "kvcomm_prompt_tokens": 300,
        "kvcomm_reused_tokens": 180,
        "kvcomm_faults": 3,
    }


def test_every_metric_of_ours_is_exported() -> None:
    counters = Counters()
    assert counters.counts().keys() == METRICS.keys()


def test_exporter() -> None:
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()

    def counter(**given: object) -> object:
        return prometheus.Counter(registry=registry, **given)

    exporter = Exporter({prometheus.Counter: counter}, ["engine"], {0: ["0"], 1: ["1"]})
    exporter.observe({"requests": {"": 2}, "reused_tokens": {"exact": 5, "boundary": 7}}, 1)
    exporter.observe({"reused_tokens": {"exact": 1}})
    assert registry.get_sample_value("kvcomm:requests_total", {"engine": "1"}) == 2
    assert registry.get_sample_value("kvcomm:requests_total", {"engine": "0"}) == 0
    assert registry.get_sample_value("kvcomm:reused_tokens_total", {"engine": "1", "rung": "boundary"}) == 7
    assert registry.get_sample_value("kvcomm:reused_tokens_total", {"engine": "0", "rung": "exact"}) == 1


def test_summary() -> None:
    said = summary(REPORT)
    assert (said["agent"], said["prompt_tokens"], said["reused_tokens"], said["computed_tokens"]) == ("critic", 100, 60, 40)
    assert said["tokens_by_rung"]["boundary"] == 60
    assert said["producers"] == ["clerk"]
    assert said["fallback"] is None


def test_a_response_tells_all_of_the_report() -> None:
    """As it comes over the wire, clocks of the workers' side apart: nobody measures those."""
    assert reported(json.loads(json.dumps({"kvcomm": summary(REPORT)}))) == REPORT
    assert reported({}) is None
    assert reported(None) is None
