"""Trains the embedded model: `python -m kvcomm.tiny.train --out DIR` on two CPU cores, resumable, reproducible from its seed.

Three things make so small a model learn to bind facts in minutes. A structured start: the heads of layer 0 begin as "attend
1, 2, 3, 4 tokens back" heads, written into a plain Llama checkpoint through one constant embedding channel and RoPE phases.
A second loss: where a value stands, the hidden state in mid-model must name whom and what it is about (two linear maps that
are thrown away after training). And a curriculum: repeat and re-ask lists, then short prompts, then up to 2,048 tokens.
Matrices are trained by Muon, the rest by AdamW.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvcomm.tiny.muon import Muon
from kvcomm.tiny.sequences import NOTHING, Encoder, Stage, batch
from kvcomm.tiny.start import config, structured_start
from kvcomm.tiny.tokenizer import build

__all__ = ["CURRICULUM", "main"]

FIRST: dict[str, Any] = {"sums": 0.0, "two_hop": 0.0, "memos": 0.0, "styles": ("plain",), "items": (1, 4), "fillers": 0}
CURRICULUM = (
    Stage(1.5, (96,), warm=0.8, facts=(1, 1), other=0.0, **FIRST),
    Stage(3.0, (128,), warm=0.2, facts=(1, 2), other=0.1, **FIRST),
    Stage(5.0, (192,), warm=0.05, facts=(1, 3), fillers=1, two_hop=0.1, memos=0.5),
    Stage(11.0, (256,), memos=0.4),
    Stage(18.0, (256, 512), fillers=8, memos=0.3, said=4),
    Stage(26.0, (256, 512, 1024), fillers=24, two_hop=0.3, said=4),
    Stage(36.0, (256, 512, 1024, 2048), fillers=48, two_hop=0.3, said=4),
)
RATES = ((8.0, 1.0), (26.0, 0.2), (36.0, 0.01))
"""(million tokens, share of the learning rate), linear between."""
BINDING_WEIGHT = 0.3  # of the loss that names owner and attribute of every stated value
BINDING_LAYER = 3  # after this many layers
CHECKPOINT_STEPS = 500


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A bf16 checkpoint and its tokenizer, as any Hugging Face loader expects them."""
    final: Any = copy.deepcopy(model)  # transformers' annotation of `to` lost its first parameter
    final.to(torch.bfloat16)
    final.config.use_cache = True
    final.config.dtype = torch.bfloat16
    final.generation_config.do_sample, final.generation_config.use_cache = False, True
    final.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def steps() -> Iterator[tuple[int, Stage]]:
    """(tokens seen before, stage) of every step."""
    seen = step = 0
    for stage in CURRICULUM:
        while seen < stage.until * 1e6:
            yield seen, stage
            seen += stage.rows(step) * stage.length(step)
            step += 1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="train the embedded model")
    parser.add_argument("--out", type=Path, default=Path("train-out"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.01, help="of Muon")
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = build()
    encode = Encoder(tokenizer)
    pad = encode.ids["<pad>"]
    model = LlamaForCausalLM(config(768))
    structured_start(model)
    probes = torch.nn.ModuleList(torch.nn.Linear(c, c, bias=False) for c in [model.config.hidden_size] * 2)
    muon = Muon([p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n])
    adam = torch.optim.AdamW(
        [*(p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n), *probes.parameters()],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    checkpoint, step = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        probes.load_state_dict(state["probes"])
        adam.load_state_dict(state["adam"])
        muon.momentum, step = {tuple(k): v for k, v in state["muon"]}, state["step"]

    def loss_of(ids: Tensor, weights: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, share of right answer tokens, share of values whose owner mid-model knows."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(input_ids=ids[:, :-1], output_hidden_states=True)
            words = model.model.embed_tokens.weight
            named = [probe(out.hidden_states[BINDING_LAYER]) @ words.T for probe in probes]
        losses = F.cross_entropy(out.logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
            ids.shape[0], -1
        )
        loss = (losses * weights[:, 1:]).sum() / weights.sum()
        for scores, label in zip(named, labels, strict=True):
            wrong = F.cross_entropy(
                scores.float().flatten(0, 1), label[:, :-1].flatten(), ignore_index=NOTHING, reduction="sum"
            )
            loss = loss + BINDING_WEIGHT * wrong / (label != NOTHING).sum().clamp(min=1)
        answer, bound = weights[:, 1:] >= 1, labels[0][:, :-1] != NOTHING
        right = ((out.logits.argmax(-1) == ids[:, 1:]) & answer).sum() / answer.sum()
        known = ((named[0].argmax(-1) == labels[0][:, :-1]) & bound).sum() / bound.sum()
        return loss, right, known

    torch._dynamo.config.recompile_limit = 32
    run = loss_of if args.no_compile else torch.compile(loss_of, dynamic=False)
    args.out.mkdir(parents=True, exist_ok=True)
    began, smooth = time.time(), np.zeros(2)
    remaining = list(steps())[step:]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batch, args.seed, step, remaining[0][1], encode, pad) if remaining else None
        for i, (seen, _) in enumerate(remaining):
            assert ahead is not None
            rows = ahead.result()
            length = rows[0].shape[1] - 1
            if i + 1 < len(remaining):
                ahead = pool.submit(batch, args.seed, step + 1, remaining[i + 1][1], encode, pad)
            model.config._attn_implementation = "eager" if length <= 512 else "sdpa"  # whichever is faster on a CPU
            rate = float(np.interp(seen / 1e6, [at for at, _ in RATES], [share for _, share in RATES]))
            scale = min(1.0, (step + 1) / 60) * rate
            loss, *shares = run(*rows)
            model.zero_grad()
            probes.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in adam.param_groups:
                group["lr"] = args.adam_lr * scale
            adam.step()
            muon.step(args.lr * scale)
            step += 1
            smooth = 0.95 * smooth + 0.05 * np.array([share.item() for share in shares])
            if step % 50 == 0:
                print(
                    f"step {step} length {length} tokens {seen / 1e6:.2f}M loss {loss.item():.3f} "
                    f"answers right {smooth[0]:.3f} owners known {smooth[1]:.3f} {time.time() - began:.0f}s",
                    flush=True,
                )
            if step % CHECKPOINT_STEPS == 0 or i + 1 == len(remaining):
                state = {
                    "model": model.state_dict(),
                    "probes": probes.state_dict(),
                    "adam": adam.state_dict(),
                    "muon": list(muon.momentum.items()),
                    "step": step,
                }
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
                save(model, tokenizer, args.out / "model")


if __name__ == "__main__":
    main()
