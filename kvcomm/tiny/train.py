"""Trains the embedded model: `python -m kvcomm.tiny.train --out DIR` on two CPU cores, resumable, reproducible from its seed.

Two things make so small a model learn to bind facts in minutes. A structured start: the heads of layer 0 begin as "attend
1, 2, 3, 4 tokens back" heads, written into a plain Llama checkpoint through one constant embedding channel and RoPE phases.
And a curriculum: repeat and re-ask lists, then short prompts, then longer ones up to 2,048 tokens.
Matrices are trained by Muon (Jordan et al. 2024: momentum, orthogonalised by Newton-Schulz), the rest by AdamW.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvcomm.tiny import tasks
from kvcomm.tiny.tokenizer import build
from kvcomm.tiny.words import DOMAINS, ROLES, STYLES

__all__ = ["CURRICULUM", "Stage", "main"]

CONTEXT_WEIGHT = 0.02  # loss weight of text that is not an answer


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum, until `until` tokens were seen."""

    until: float  # million tokens
    length: int  # tokens of a training sequence
    warm: float = 0.0  # share of repeat-and-re-ask sequences
    facts: tuple[int, int] = (1, 4)
    fillers: tuple[int, int] = (0, 2)
    other: float = 0.3
    two_hop: float = 0.2
    memos: float = 0.25  # share of questions that define or use a memo
    styles: tuple[str, ...] = STYLES
    items: tuple[int, int] = (2, 6)  # questions of one turn
    said: int = 2  # other agents heard, at most
    once: bool = True  # no fact is asked twice: an answer cannot be copied from an earlier one


OLD: dict[str, Any] = {"items": (1, 4), "said": 4, "once": False}
CURRICULUM = (
    Stage(1.5, 96, warm=0.8, facts=(1, 1), fillers=(0, 0), other=0.0, two_hop=0.0, memos=0.0, styles=("plain",), **OLD),
    Stage(3.5, 128, warm=0.2, facts=(1, 2), fillers=(0, 0), other=0.1, two_hop=0.0, memos=0.0, styles=("plain",), **OLD),
    Stage(7.0, 192, warm=0.05, facts=(1, 3), fillers=(0, 1), two_hop=0.1, memos=0.5, **OLD),
    Stage(12.5, 288, memos=0.5, **OLD),
    Stage(16.0, 512, memos=0.5, **OLD),
    Stage(21.0, 256),
    Stage(25.0, 512, said=4),
    Stage(30.0, 1024, fillers=(0, 3), said=4),
    Stage(31.0, 2048, fillers=(3, 9), said=4),
    Stage(32.5, 1024, fillers=(0, 3), said=4),
    Stage(47.0, 256, two_hop=0.3, memos=0.15, items=(3, 6)),
    Stage(49.2, 512, fillers=(1, 5), two_hop=0.3, memos=0.15, items=(3, 6), said=4),
    Stage(50.4, 1024, fillers=(5, 13), two_hop=0.3, memos=0.15, items=(2, 6), said=4),
    Stage(50.8, 2048, fillers=(12, 28), two_hop=0.3, memos=0.15, items=(2, 6), said=4),
    Stage(52.0, 512, fillers=(0, 5), two_hop=0.3, memos=0.15, items=(2, 4), said=4),
)
RATES = ((25.0, 1.0), (32.5, 0.2), (32.501, 0.6), (42.5, 0.32), (52.0, 0.01))
"""(million tokens, share of the learning rate), linear between."""
TOKENS_PER_STEP = 4096
CHECKPOINT_STEPS = 500


class Encoder:
    """Words to ids without the tokenizer's overhead; the tests check that both agree."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids: dict[str, int] = {
            w.removeprefix("Ġ"): i for w, i in tokenizer.get_vocab().items() if w[0] in "Ġ<" and len(w) > 1
        }

    def __call__(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]


class Sequence:
    """Token ids and loss weights under construction."""

    def __init__(self, encode: Encoder) -> None:
        self.encode = encode
        self.ids: list[int] = []
        self.weights: list[float] = []

    def add(self, text: str, weight: float) -> None:
        new = self.encode(text)
        self.ids += new
        self.weights += [weight] * len(new)

    def cut(self, length: int, pad: int) -> tuple[list[int], list[float]]:
        missing = length - len(self.ids)
        return (self.ids + [pad] * missing)[:length], (self.weights + [0.0] * missing)[:length]


def questions(rng: random.Random, world: tasks.World, style: str, stage: Stage, n: int) -> list[tasks.Item]:
    items = []
    for _ in range(n):
        step = tasks.next_step(world)
        if rng.random() < stage.memos and (step or world.memos):
            if world.memos and (not step or rng.random() < 0.4):
                items.append(tasks.recall(rng, world, style))
            else:
                items.append(tasks.ask(rng, world, style, step=step, two_hop=stage.two_hop, fresh=stage.once))
        else:
            items.append(tasks.ask(rng, world, style, two_hop=stage.two_hop, fresh=stage.once))
    return items


def team_sequence(rng: random.Random, stage: Stage, encode: Encoder) -> Sequence:
    """One agent's prompt with its answer, then further questions and answers until the sequence is full."""
    out, domain = Sequence(encode), rng.choice(list(DOMAINS.values()))
    per_doc = 7 + 5 * sum(stage.facts) / 2 + 3 * sum(stage.fillers)
    most = max(2, min(24, int(stage.length / per_doc * (0.6 if stage.once else 0.75))))
    style = rng.choice(stage.styles)
    world = tasks.make_world(
        rng,
        domain,
        rng.randint(max(2, most // 2) if stage.once else 2, most),
        facts=stage.facts,
        fillers=stage.fillers,
        other=stage.other,
    )
    roles = rng.sample(ROLES, 5)
    said = []
    if stage.memos:
        for role in roles[: rng.randint(0, stage.said)]:
            said.append(
                tasks.say(role, tasks.answer_text(questions(rng, world, rng.choice(stage.styles), stage, rng.randint(1, 3))))
            )
    items = questions(rng, world, style, stage, rng.randint(*stage.items))
    out.add(f"<bos> <|system|> {tasks.role_text(roles[-1], style)} <|end|>", CONTEXT_WEIGHT)
    out.add(f"<|user|> {tasks.user_text(world.documents(), said, items)} <|end|> <|assistant|>", CONTEXT_WEIGHT)
    out.add(f"{tasks.answer_text(items)} <|end|>", 1.0)
    while len(out.ids) < stage.length and not (stage.once and world.exhausted):
        items = questions(rng, world, style, stage, rng.randint(*stage.items))
        out.add(f"<|user|> {tasks.user_text([], [], items)} <|end|> <|assistant|>", CONTEXT_WEIGHT)
        out.add(f"{tasks.answer_text(items)} <|end|>", 1.0)
    return out


def warm_sequence(rng: random.Random, stage: Stage, encode: Encoder) -> Sequence:
    """A list repeated word by word, or facts re-asked in random order: later copies are predictable by induction."""
    out = Sequence(encode)
    out.add("<bos>", 0.0)
    domain = rng.choice(list(DOMAINS.values()))
    if rng.random() < 0.4:
        words = [
            rng.choice(rng.choice([*domain.values.values(), domain.owners])) for _ in range(rng.randint(8, stage.length // 4))
        ]
        out.add(" ".join(words), 0.0)
        while len(out.ids) < stage.length:
            out.add(words[0], 0.0)
            out.add(" ".join(words[1:]), 1.0)
        return out
    attributes = rng.sample(list(domain.values), rng.choice((1, 1, 3)))
    facts = [(o, a) for o in rng.sample(domain.owners, rng.randint(3, 8)) for a in attributes]
    rng.shuffle(facts)
    values = {f: rng.choice(domain.values[f[1]]) for f in facts[:10]}
    out.add(" ".join(f"{a} of {o} is {v} ." for (o, a), v in values.items()), CONTEXT_WEIGHT)
    while len(out.ids) < stage.length:
        owner, attribute = rng.choice(list(values))
        out.add(f"{attribute} of {owner} is", CONTEXT_WEIGHT)
        out.add(values[owner, attribute], 1.0)
        out.add(".", 0.1)
    return out


def batch(seed: int, step: int, stage: Stage, encode: Encoder, pad: int) -> tuple[Tensor, Tensor]:
    """The training data of one step, [sequences, length]: a function of seed and step only, so that a resumed run continues."""
    rng = random.Random(seed * 1_000_003 + step)
    rows = []
    for _ in range(max(2, TOKENS_PER_STEP // stage.length)):
        make = warm_sequence if rng.random() < stage.warm else team_sequence
        rows.append(make(rng, stage, encode).cut(stage.length + 1, pad))
    return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])


def config(vocab_size: int) -> LlamaConfig:
    attention: dict[str, Any] = {"attn_implementation": "sdpa"}  # an option of every configuration, named in no signature
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=320, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=1, eos_token_id=6, pad_token_id=0,
        use_cache=False, **attention,
    )  # fmt: skip


@torch.no_grad()
def structured_start(model: LlamaForCausalLM, constant: float = 0.1, gain: float = 1.3, frequencies: int = 8) -> None:
    """Scales the random start and turns head h of layer 0 into an "attend h + 1 tokens back" head."""
    c: Any = model.config  # all of what is read here is set in `config`
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.normal_(std=0.02 if "embed" in name else p.shape[1] ** -0.5)
            if "o_proj" in name or "down_proj" in name:
                p.mul_((2 * c.num_hidden_layers) ** -0.5)
    model.model.embed_tokens.weight[:, 0] = constant
    attention, d = model.model.layers[0].self_attn, c.head_dim
    attention.q_proj.weight *= 0.3
    attention.k_proj.weight *= 0.3
    attention.o_proj.weight *= (2 * c.num_hidden_layers) ** 0.5
    angle = 10000.0 ** (-torch.arange(0, d, 2).float() / d)[:frequencies]
    for head in range(c.num_key_value_heads):
        rows = attention.k_proj.weight[head * d : (head + 1) * d, 0]
        rows.zero_()[:frequencies] = gain
    for head in range(c.num_attention_heads):
        rows = attention.q_proj.weight[head * d : (head + 1) * d, 0]
        rows.zero_()[:frequencies] = gain * torch.cos(angle * (head + 1))
        rows[d // 2 : d // 2 + frequencies] = -gain * torch.sin(angle * (head + 1))


class Muon:
    """Momentum whose update is orthogonalised; matrices of one shape are stepped together."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.groups: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for p in parameters:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.momentum = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.groups.items()}

    @staticmethod
    def orthogonalise(g: Tensor) -> Tensor:
        x = g.bfloat16()
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        out: Tensor = (x.mT if tall else x).float()
        return out

    @torch.no_grad()
    def step(self, lr: float, beta: float = 0.95, decay: float = 0.01) -> None:
        for shape, ps in self.groups.items():
            g = torch.stack([p.grad for p in ps if p.grad is not None])
            self.momentum[shape].lerp_(g, 1 - beta)
            update = self.orthogonalise(g.lerp(self.momentum[shape], beta)) * max(1.0, shape[0] / shape[1]) ** 0.5
            for p, u in zip(ps, update, strict=True):
                p.mul_(1 - lr * decay).add_(u, alpha=-lr)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A bf16 checkpoint and its tokenizer, as any Hugging Face loader expects them."""
    import copy

    final: Any = copy.deepcopy(model)  # transformers' annotation of `to` lost its first parameter
    final.to(torch.bfloat16)
    final.config.use_cache = True
    final.config.dtype = torch.bfloat16
    final.generation_config.do_sample, final.generation_config.use_cache = False, True
    final.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def steps(seen: int) -> Iterator[tuple[int, Stage]]:
    """(tokens seen, stage) of every remaining step."""
    for stage in CURRICULUM:
        while seen < stage.until * 1e6:
            yield seen, stage
            seen += max(2, TOKENS_PER_STEP // stage.length) * stage.length


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
    muon = Muon([p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n])
    adam = torch.optim.AdamW(
        [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n], betas=(0.9, 0.95), weight_decay=0.0
    )
    checkpoint, step, seen = args.out / "checkpoint.pt", 0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.momentum, step, seen = {tuple(k): v for k, v in state["muon"]}, state["step"], state["seen"]

    def loss_of(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1]).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)
        answer = weights[:, 1:] >= 1
        right = ((logits.argmax(-1) == ids[:, 1:]) & answer).sum() / answer.sum()
        return (losses * weights[:, 1:]).sum() / weights.sum(), right

    torch._dynamo.config.recompile_limit = 32
    run = loss_of if args.no_compile else torch.compile(loss_of, dynamic=False)
    args.out.mkdir(parents=True, exist_ok=True)
    began, smooth = time.time(), 0.0
    remaining = list(steps(seen))
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batch, args.seed, step, remaining[0][1], encode, pad) if remaining else None
        for i, (seen, stage) in enumerate(remaining):
            assert ahead is not None
            ids, weights = ahead.result()
            if i + 1 < len(remaining):
                ahead = pool.submit(batch, args.seed, step + 1, remaining[i + 1][1], encode, pad)
            model.config._attn_implementation = "eager" if stage.length <= 512 else "sdpa"  # whichever is faster on a CPU
            rate = float(np.interp(seen / 1e6, [at for at, _ in RATES], [share for _, share in RATES]))
            scale = min(1.0, (step + 1) / 60) * rate
            loss, right = run(ids, weights)
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in adam.param_groups:
                group["lr"] = args.adam_lr * scale
            adam.step()
            muon.step(args.lr * scale)
            step += 1
            smooth = 0.95 * smooth + 0.05 * right.item()
            if step % 50 == 0:
                print(
                    f"step {step} length {stage.length} tokens {seen / 1e6:.2f}M "
                    f"loss {loss.item():.3f} right {smooth:.3f} {time.time() - began:.0f}s",
                    flush=True,
                )
            if step % CHECKPOINT_STEPS == 0 or i + 1 == len(remaining):
                state = {
                    "model": model.state_dict(),
                    "adam": adam.state_dict(),
                    "muon": list(muon.momentum.items()),
                    "step": step,
                    "seen": seen + ids.shape[0] * stage.length,
                }
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
                save(model, tokenizer, args.out / "model")


if __name__ == "__main__":
    main()
