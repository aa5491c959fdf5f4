"""`kvcomm bench fidelity` as a command, small: its document adds up, axes change what they name and nothing else."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import pytest

from kvcomm.anchors.anchor import Anchor
from kvcomm.backends.hf import HFBackend
from kvcomm.backends.loading import load
from kvcomm.bench.fidelity import command, trial
from kvcomm.bench.fidelity.cases import Template, templates
from kvcomm.bench.fidelity.methods import Method
from kvcomm.bench.fidelity.rows import pairs, value_of
from kvcomm.bench.fidelity.settings import AXES, DISTRIBUTIONS, Setting, along
from kvcomm.codecs import Raw
from kvcomm.errors import InputError
from kvcomm.estimators.mean import Mean
from kvcomm.plain import PlainKV
from kvcomm.tiny import FOLDER
from kvcomm.tiny.words import DOMAINS

SIZES = "--templates 2 --requests 8 --anchors 4 --documents 3 --fillers 2 6 --bases isolated".split()
ASKED_FOR = {  # the fields that whoever reads the document counts on
    "name", "binding", "base", "anchors", "accuracy", "dense_accuracy", "kl", "top1", "token_reuse_rate", "compute_share",
    "ttft_ms", "dense_ms", "bytes_per_anchor", "documents", "distribution", "span_tokens", "codec",
}  # fmt: skip
SETTING = Setting("isolated", 3, (8, 12), 2, "same", "int8")


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for name, default in (("--format", "terminal"), ("--output", None)):
        parser.add_argument(name, default=default)
    return parser.parse_args([*flags], argparse.Namespace(quiet=True))


def whole(doc: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in doc["methods"] if r["binding"] == "all"]


def test_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["dense", "rotate", "rotate+random:1", "select+refresh:0.1"]
    args = arguments(*SIZES, "--methods", *methods)
    args.output = tmp_path
    assert command.run(args) == 0
    assert "select+refresh:0.1" in capsys.readouterr().out
    assert "select+refresh:0.1" in (tmp_path / "fidelity.html").read_text()
    doc: dict[str, Any] = command.measure(args)
    rows = {r["name"]: r for r in whole(doc)}
    assert list(rows) == methods
    assert all(r.keys() >= ASKED_FOR for r in doc["methods"])
    assert rows["dense"]["accuracy"] == rows["dense"]["dense_accuracy"] == rows["rotate+random:1"]["accuracy"] >= 0.9
    assert rows["rotate"]["accuracy"] < rows["dense"]["accuracy"]
    assert rows["select+refresh:0.1"]["bytes_per_anchor"] > 0
    assert all(r["accuracy_low"] <= r["accuracy"] <= r["accuracy_high"] for r in rows.values())
    assert all(r["dense_ms"] == rows["dense"]["ttft_ms"] > 0 for r in rows.values())
    (lost,) = [p["lost"] for p in doc["pairs"] if p["name"] == "rotate"]
    assert lost == round(8 * (rows["dense"]["accuracy"] - rows["rotate"]["accuracy"])), "dense was right wherever rotation was"
    assert (tmp_path / "fidelity.json").exists()


def test_along_an_axis(tmp_path: Path) -> None:
    """Codecs: the same requests under each; what learns nothing is served once; the page holds this beside other results."""
    args = arguments(*SIZES, "--axis", "codec", "--at", "raw", "lowrank:4+int8", "--methods", "dense", "rotate", "mean")
    doc = command.measure(args)
    assert [(r["name"], r["codec"]) for r in whole(doc)] == [
        ("dense", None), ("rotate", None), ("mean", "raw"), ("mean", "lowrank:4+int8")
    ]  # fmt: skip
    raw, small = whole(doc)[2:]
    assert raw["deviation_bytes_per_anchor"] == 2 * raw["bf16_deviation_bytes_per_anchor"], "raw is float32"
    assert small["bytes_per_anchor"] < raw["bytes_per_anchor"] / 4
    assert small["bf16_deviation_bytes_per_anchor"] == raw["bf16_deviation_bytes_per_anchor"]
    assert raw["dense_ms"] == small["dense_ms"] == whole(doc)[0]["ttft_ms"]
    (pair,) = [p for p in doc["pairs"] if p["against_codec"]]
    assert (pair["codec"], pair["against"], pair["against_codec"]) == ("lowrank:4+int8", "mean", "raw")
    assert (pair["gained"] - pair["lost"]) / 8 == pytest.approx(small["accuracy"] - raw["accuracy"])


@pytest.mark.parametrize(("axis", "values"), [(axis, AXES[axis].values) for axis in AXES])
def test_an_axis_changes_what_it_names(axis: str, values: tuple[str, ...]) -> None:
    settings = along(axis, (), SETTING)
    assert len({*settings}) == len(values) >= 4
    same = axis in ("anchors", "distribution", "codec")
    assert len({s.asked for s in settings}) == (1 if same else len(values))
    row = {"documents": 3, "span_tokens": 20.4, "anchors": 7, "distribution": "few", "codec": "int8"}
    assert value_of(axis, row) == {"documents": "3", "length": "20", "anchors": "7", "distribution": "few"}.get(axis, "int8")
    assert value_of(axis, {**row, "codec": None}) is None or not same


@pytest.mark.parametrize(
    ("axis", "value", "message"),
    [
        ("documents", "many", "axis documents"),
        ("documents", "1", "at least two documents"),
        ("distribution", "odd", "distribution 'odd'"),
        ("codec", "odd", "no codec"),
    ],
)
def test_values_that_an_axis_does_not_have(axis: str, value: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        along(axis, (value,), SETTING)


def test_too_few_requests_are_refused() -> None:
    with pytest.raises(InputError, match="at least one request per template"):
        command.measure(arguments("--templates", "4", "--requests", "3"))


def test_controls_and_the_variant_without_recompute_are_run_by_default() -> None:
    assert {"rotate", "rotate+random:0.05", "rotate+oracle:0.05", "edges"} <= {*command.METHODS}


@pytest.fixture(scope="module")
def backend() -> HFBackend:
    made = load(str(FOLDER), dtype="float32")
    assert isinstance(made, HFBackend)
    return made


class Listener(Mean):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Anchor] = []

    def learn(self, anchor: Anchor, base: PlainKV, deviation: PlainKV) -> None:
        self.heard.append(anchor)


@pytest.fixture(scope="module")
def heard(backend: HFBackend) -> dict[str, list[Anchor]]:
    """The anchors of every distribution, one template, two requests."""
    out = {}
    for name in DISTRIBUTIONS:
        listener = Listener()
        source, rng = DISTRIBUTIONS[name](template()), random.Random(0)
        sizes = trial.learn(backend, source, "isolated", {"listener": listener}, Raw(), 2, rng)
        assert [s.stored for s in sizes] == [a.nbytes for a in listener.heard]
        out[name] = listener.heard
    return out


def template() -> Template:
    return templates(1, 3, (8, 12), 0)[0]


def test_distributions_differ_from_what_is_asked(backend: HFBackend, heard: dict[str, list[Anchor]]) -> None:
    assert backend.tokenizer is not None
    text = {name: {str(backend.tokenizer.decode(a.ids)).split()[0] for a in anchors} for name, anchors in heard.items()}
    own = {*DOMAINS[template().workload].values, DOMAINS[template().workload].link}
    words = {w for name in heard for a in heard[name] for w in str(backend.tokenizer.decode(a.ids)).split() if name == "words"}
    assert not own & words
    assert own & {w for a in heard["same"] for w in str(backend.tokenizer.decode(a.ids)).split()}
    assert text["same"]
    slots = {name: {a.slot for a in anchors} for name, anchors in heard.items()}
    assert slots["same"] == slots["short"] == slots["words"] == {f"{template().name}/{i}" for i in range(3)}
    assert slots["few"] == {f"{template().name}/{i}" for i in range(2)}
    assert max(a.tokens for a in heard["short"]) < min(a.tokens for a in heard["same"])


def test_settings_that_ask_the_same_ask_the_same(backend: HFBackend) -> None:
    """Whatever was learned: request by request the same ids, and so pairs over codecs."""
    settings = [SETTING, Setting("isolated", 3, (8, 12), 1, "words", "raw")]
    trials = [trial.run(backend, s, [Method.parse("mean")], 2, 2, seed=3) for s in settings]
    asked = [[a.ids.tolist() for a in t.asked] for t in trials]
    assert asked[0] == asked[1]
    assert len({tuple(ids) for ids in asked[0]}) == 4
    assert [p["against"] for p in pairs(trials)] == ["dense", "dense", "mean"]
