"""The embedded model: it loads as any checkpoint does, and tells a good way of reusing KV from a bad one."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcomm.backends.loading import load
from kvcomm.tiny import FOLDER, evaluate


def test_it_is_a_plain_llama() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 2048
    assert (FOLDER / "model.safetensors").stat().st_size < 5 << 20
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def scores() -> evaluate.Scores:
    found, _ = evaluate.held_out(load(str(FOLDER), dtype="float32"), 30, 5, seed=777)
    return found


def rate(scores: evaluate.Scores, method: str) -> float:
    right = [r for (m, _, _), rs in scores.items() if m == method for r in rs]
    return sum(right) / len(right)


@pytest.mark.once
def test_dense_answers_are_right(scores: evaluate.Scores) -> None:
    """A guess among the values of an attribute is right in about one case of twenty."""
    assert rate(scores, "dense") >= 0.97


def test_long_prompts_are_answered_too() -> None:
    """Prompts of about 1,800 tokens, up to the context limit of 2,048."""
    found, length = evaluate.held_out(load(str(FOLDER), dtype="float32"), 12, 6, seed=778, fillers=(42, 48), methods=False)
    assert length > 1700
    assert rate(found, "dense") >= 0.94


@pytest.mark.once
def test_boundary_keeps_them_and_naive_reuse_does_not(scores: evaluate.Scores) -> None:
    assert rate(scores, "producer boundary") >= rate(scores, "dense") - 0.02
    assert rate(scores, "producer naive") < rate(scores, "dense") - 0.3
    assert rate(scores, "producer rotate") < rate(scores, "dense") - 0.1
