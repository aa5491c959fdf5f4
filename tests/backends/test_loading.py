"""What is loaded from a folder, and what a folder that cannot be used is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcomm.backends.loading import load
from kvcomm.engine import KVComm
from kvcomm.errors import InputError, UnsupportedModel
from kvcomm.testing import tiny_random
from kvcomm.tiny import tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_random("llama", vocab_size=768).save_pretrained(tmp_path)
    tokenizer.build().save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_loads(folder: Path) -> None:
    backend = load(str(folder))
    assert backend.tokenizer is not None
    assert not backend.model.training


def test_without_a_tokenizer(folder: Path) -> None:
    """A model can be shared by token ids; texts need a tokenizer."""
    for file in folder.glob("*token*"):
        file.unlink()
    comm = KVComm(load(str(folder)))
    with pytest.raises(InputError, match="tokenizer"):
        comm.generate("bob")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        load(str(folder))


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        load(str(folder))


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot"):
        load(str(folder))


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot"):
        load(str(folder))


def test_unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "abacus", "architectures": ["Abacus"]}))
    with pytest.raises(InputError, match="cannot"):
        load(str(folder))


@pytest.mark.parametrize(("family", "why"), [("t5", "encoder-decoder"), ("deepseek_v3", "MLA"), ("mamba", "state")])
def test_refused_architectures(tmp_path: Path, family: str, why: str) -> None:
    tiny_random(family).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=why):
        load(str(tmp_path))


def test_another_model_under_the_same_name(folder: Path) -> None:
    """A folder whose model was replaced: nothing stored for the old one is used."""
    text = "report about bob : city is oslo . pet is dog . the old river waits slowly . color is red ."
    comm = KVComm(load(str(folder)))
    comm.generate(text, max_new_tokens=2, do_sample=False)
    tiny_random("qwen2", vocab_size=768).save_pretrained(folder)
    other = KVComm(load(str(folder)), store=comm.store)
    other.index = comm.index
    assert other.generate(text, max_new_tokens=2, do_sample=False).report.reused_tokens == 0
    assert comm.generate(text, max_new_tokens=2, do_sample=False).report.reused_tokens > 0


@pytest.mark.parametrize("name", ["/nope/model", "./nope", "~/nope", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=f"^there is no folder {name}, and no Hugging Face id"):
        load(name)


@pytest.mark.parametrize("name", ["nope", "some/nope"])
def test_a_name_that_may_be_an_id_is_asked_for(name: str) -> None:
    with pytest.raises(InputError, match=f"cannot load a causal language model from '{name}'"):
        load(name)
