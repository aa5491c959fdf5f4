"""The training script: data depend on seed and step alone, a killed run goes on where it stopped, the start is structured."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kvcomm.tiny import sequences, start, tasks, train
from kvcomm.tiny.tokenizer import build
from kvcomm.tiny.words import DOMAINS

STAGES = [(stage, step) for stage in train.CURRICULUM for step in range(len(stage.lengths))]


@pytest.mark.parametrize(("stage", "step"), STAGES, ids=lambda x: str(x if isinstance(x, int) else x.until))
def test_batches_are_reproducible(stage: sequences.Stage, step: int) -> None:
    encode = sequences.Encoder(build())
    columns = sequences.batch(3, step, stage, encode, 0)
    again = sequences.batch(3, step, stage, encode, 0)
    other = sequences.batch(4, step, stage, encode, 0)
    assert all(torch.equal(a, b) for a, b in zip(columns, again, strict=True))
    assert not torch.equal(columns[0], other[0])
    assert {c.shape for c in columns} == {columns[0].shape}
    assert columns[0].shape[1] == stage.lengths[step] + 1
    assert (columns[1] >= 1).any()
    assert (columns[2] != sequences.NOTHING).any()


@pytest.mark.parametrize("name", DOMAINS)
def test_bindings_are_those_of_the_world(name: str) -> None:
    """The labels of the second loss, read from the words alone, name every fact of the world and nothing else."""
    for seed in range(40):
        rng = random.Random(seed)
        world = tasks.make_world(rng, DOMAINS[name], rng.randint(2, 12))
        words = " ".join(world.documents(rng)).split()
        found: dict[tuple[str, str], list[str]] = {}
        for word, key in zip(words, sequences.bindings(words), strict=True):
            if any(key):
                found.setdefault(key, []).append(word)
        assert {key: " ".join(value) for key, value in found.items()} == world.facts


def test_structured_start_attends_backwards() -> None:
    """Head h of layer 0 puts most of its weight h + 1 tokens back, at positions near and far."""
    torch.manual_seed(0)
    config = start.config(768)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    start.structured_start(model)
    with torch.no_grad():
        weights = model(torch.randint(7, 700, (1, 300)), output_attentions=True).attentions[0][0]
    for head in range(4):
        by_distance = [weights[head].diagonal(-back)[60:].mean().item() for back in range(12)]
        assert max(range(12), key=by_distance.__getitem__) == head + 1
        assert by_distance[head + 1] > 0.6


def test_a_killed_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies in step 5 and is started again ends with the weights of a run that was left alone."""
    monkeypatch.setattr(sequences, "TOKENS_PER_STEP", 192)
    monkeypatch.setattr(train, "CHECKPOINT_STEPS", 3)
    monkeypatch.setattr(train, "CURRICULUM", (sequences.Stage(192 * 6 / 1e6, (96,), warm=0.5),))
    made = sequences.batch

    def run(out: Path) -> dict[str, torch.Tensor]:
        train.main(["--out", str(out), "--threads", "1", "--no-compile"])
        state: dict[str, torch.Tensor] = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
        return state

    def die(seed: int, step: int, *rest: Any) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return made(seed, step, *rest)

    straight = run(tmp_path / "straight")
    monkeypatch.setattr(train, "batch", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    monkeypatch.setattr(train, "batch", made)
    resumed = run(tmp_path / "killed")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "killed" / "model").dtype == torch.bfloat16
