"""The training script: data depend on seed and step alone, a killed run goes on where it stopped, the start is structured."""

from __future__ import annotations

from pathlib import Path

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
    assert torch.equal(ids, again) and not torch.equal(ids, other)
    assert ids.shape == weights.shape and ids.shape[1] == stage.length + 1
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
        back = weights[head].diagonal(-(head + 1))[50:]
        assert (back > weights[head].diagonal(-(head + 2))[49:]).float().mean() > 0.9
        assert (back > weights[head].diagonal(-head)[51:]).float().mean() > 0.9 if head else True


def test_a_killed_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two short runs in a row end with the weights of one run over the same steps."""
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 192)
    stage = train.Stage(192 * 6 / 1e6, 96, warm=0.5)

    def run(out: Path, tokens: float) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(train, "CURRICULUM", (train.Stage(tokens / 1e6, 96, warm=0.5), stage)[: 1 if tokens < 192 * 6 else 2])
        monkeypatch.setattr(train, "SCHEDULE_TOKENS", 192 * 6)
        train.main(["--out", str(out), "--threads", "1", "--no-compile"])
        return torch.load(out / "checkpoint.pt", weights_only=True)["model"]

    run(tmp_path / "a", 192 * 3)
    resumed = run(tmp_path / "a", 192 * 6)
    straight = run(tmp_path / "b", 192 * 6)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    assert model.dtype == torch.bfloat16
