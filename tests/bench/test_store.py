"""`kvcomm bench store`, small: its numbers belong together, and name their units. No time is judged here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvcomm import cli

pytestmark = pytest.mark.once

SMALL = ["--sizes", "1,2", "--total", "2", "--keys", "64,200", "--lookups", "20", "--clients", "2", "--seconds", "0.2"]


@pytest.fixture(scope="module")
def doc(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    assert cli.main(["bench", "store", "-q", "--format", "json", "--output", str(folder), "--repetitions", "2", *SMALL]) == 0
    found: dict[str, Any] = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    return found


def test_objects(doc: dict[str, Any]) -> None:
    """Every size in every tier, over the same bytes, with ratios that are those of the bandwidths."""
    assert [(row["tier"], row["objects"]) for row in doc["objects"]] == [("memory", 2), ("disk", 2), ("memory", 1), ("disk", 1)]
    for row in doc["objects"]:
        assert row["object_bytes"] * row["objects"] == pytest.approx(doc["batch_bytes"], rel=0.02)
        for kind in ("put", "get"):
            assert row[f"{kind}_over_copy"] == pytest.approx(row[f"{kind}_gb_per_s"] / row["copy_gb_per_s"])


def test_lookups_and_clients(doc: dict[str, Any]) -> None:
    assert [row["objects"] for row in doc["lookups"]] == [64, 200]
    assert all(0 < row["lookup_p50_ms"] <= row["lookup_p99_ms"] for row in doc["lookups"])
    few, many = (row["lookup_p50_ms"] for row in doc["lookups"])
    assert doc["most_keys_over_fewest"] == pytest.approx(many / few)
    clients = doc["clients"]
    assert len(clients["gets_by_client"]) == clients["clients"] == 2
    assert clients["fewest_over_most"] == min(clients["gets_by_client"]) / max(clients["gets_by_client"])
    assert 0.5 <= clients["jain_index"] <= 1


def test_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "store", "-q", "--repetitions", "1", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "2 clients at once" in out
    assert "64 keys looked up in" in out


@pytest.mark.parametrize("flags", [["--sizes", "1,x"], ["--keys", "63"], ["--clients", "0"]])
def test_unusable_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "store", "-q", *flags]) == 2
    assert flags[0] in capsys.readouterr().err
