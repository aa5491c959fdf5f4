"""The JSON envelope: plain types in, plain types out, atomic files, no number that was not measured."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kvcomm import report
from kvcomm._version import __version__


@dataclass(frozen=True)
class Row:
    ttft_ms: float | None
    names: tuple[str, ...]


def test_document_reads_back_as_plain_types() -> None:
    body = {
        "rows": [Row(1.5, ("a", "b")), Row(None, ())],
        "scalars": {"numpy": np.float32(0.5), "torch": torch.tensor(3), "bool": np.bool_(True), 7: "key"},
        "array": np.arange(4).reshape(2, 2),
        "path": Path("a/b"),
    }
    doc = report.document("kvcomm.test/1", **body)
    back = json.loads(report.dumps(doc))
    assert back == doc
    assert list(back)[:4] == ["schema", "kvcomm_version", "created_utc", "machine"]
    assert (back["schema"], back["kvcomm_version"]) == ("kvcomm.test/1", __version__)
    assert back["rows"] == [{"ttft_ms": 1.5, "names": ["a", "b"]}, {"ttft_ms": None, "names": []}]
    assert back["scalars"] == {"numpy": 0.5, "torch": 3, "bool": True, "7": "key"}
    assert (back["array"], back["path"]) == ([[0, 1], [2, 3]], "a/b")


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), torch.tensor(-math.inf)])
def test_unmeasured_numbers_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"rows\[1\]\.x is -?(nan|inf)"):
        report.document("kvcomm.test/1", rows=[1, {"x": value}])


def test_other_types_and_reserved_names_are_refused() -> None:
    with pytest.raises(TypeError, match=r"what\.x is a set"):
        report.document("kvcomm.test/1", what={"x": {1}})
    with pytest.raises(TypeError, match="machine"):
        report.document("kvcomm.test/1", machine={})


def test_machine_says_what_numbers_depend_on() -> None:
    facts = report.machine()
    assert facts["cpus"] >= 1
    assert facts["memory_bytes"] > 2**28
    assert (facts["torch"], facts["torch_threads"]) == (torch.__version__, 1)
    assert facts["cpu"]


def test_write_json(tmp_path: Path) -> None:
    path = report.write_json(tmp_path / "new" / "doc.json", {"a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "ü"\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        report.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}, "a failed write leaves the old file"
    assert [p.name for p in path.parent.iterdir()] == ["doc.json"], "and no part of the new one"


def test_facts_are_read_by_people() -> None:
    found = {"cpu": "abacus", "cpus": 2, "memory_bytes": 25276502016, "torch": None}
    assert report.facts(found) == "cpu abacus, cpus 2, memory 23.5 GiB"
    assert (report.gib(None), report.gib(1 << 30)) == ("unknown", "1.0 GiB")
    assert report.facts(report.machine()).endswith(f"torch_threads {torch.get_num_threads()}")
