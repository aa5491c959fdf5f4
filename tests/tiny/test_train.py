"""The training script: data depend on seed and step alone, a killed run goes on where it stopped, the start is structured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kvcomm.tiny import train
from kvcomm.tiny.tokenizer import build


@pytest.mark.parametrize("stage", train.CURRICULUM, ids=lambda s: f"{s.length}-{s.until}")
def test_batches_are_reproducible(stage: train.Stage) -> None:
    encode = train.Encoder(build())
    ids, weights = train.batch(3, 7, stage, encode, 0)
    again, _ = train.batch(3, 7, stage, encode, 0)
    other, _ = train.batch(3, 8, stage, encode, 0)
    assert torch.equal(ids, again)
    assert not torch.equal(ids, other)
    assert ids.shape == weights.shape
    assert ids.shape[1] == stage.length + 1
    assert (weights >= 1).any()


def test_structured_start_attends_backwards() -> None:
    """Head h of layer 0 puts most of its weight h + 1 tokens back, at positions near and far."""
    torch.manual_seed(0)
    config = train.config(768)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    train.structured_start(model)
    with torch.no_grad():
        weights = model(torch.randint(7, 700, (1, 300)), output_attentions=True).attentions[0][0]
    for head in range(4):
        by_distance = [weights[head].diagonal(-back)[60:].mean().item() for back in range(12)]
        assert max(range(12), key=by_distance.__getitem__) == head + 1
        assert by_distance[head + 1] > 0.6


def test_a_killed_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies in step 5 and is started again ends with the weights of a run that was left alone."""
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 192)
    monkeypatch.setattr(train, "CHECKPOINT_STEPS", 3)
    monkeypatch.setattr(train, "CURRICULUM", (train.Stage(192 * 6 / 1e6, 96, warm=0.5),))
    made = train.batch

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
