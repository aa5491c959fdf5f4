"""The TTFT benchmark, small: its arms do what they say. Speed itself is not tested."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

import pytest
import torch

from kvcomm.backends.hf import HFBackend
from kvcomm.backends.span_cache import SpanLayer
from kvcomm.bench import ttft
from kvcomm.bench.ttft import Arms, Known, Prompt, add_arguments, random_model
from kvcomm.cli import main

SMALL = "bench ttft -q --model random:64x2x4x2 --dtype float32 --agents 3 --prefix 40 --input 60".split()


def test_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--output` is a number of tokens and a folder."""
    assert main([*SMALL, "--output", "50", "--output", str(tmp_path), "--format", "json", "--repetitions", "2"]) == 0
    doc = json.loads(capsys.readouterr().out)
    assert doc == json.loads((tmp_path / "ttft.json").read_text())
    assert doc["output_tokens"] == 50
    for i, agent in enumerate(doc["agents"]):
        assert agent["prompt_tokens"] == 40 + i + 60 + i * 54 + 12
        assert all(agent[f"{arm}_ms"] > 0 for arm in ("dense", "prefix_cache", "shared", "exact_hit"))
        assert all(len(times) == 2 for times in agent["all_ms"].values())
        assert agent["prefix_cache_ms"] == min(median(agent["all_ms"]["prefix_cache"]), agent["dense_ms"])
        assert agent["prefix_cache_block_tokens"] == agent["prompt_tokens"] - 40 - i, "too few for blocks"
        assert agent["tokens_by_rung"]["exact"] >= 40 + i, "its own prefix"
    first, second, third = doc["agents"]
    assert first["tokens_by_rung"]["boundary"] == 0, "nobody was asked before it"
    # closing (16 of 12 + 50 tokens before it), headers (4 each), two at the start of every moved span
    assert second["computed_tokens"] <= 16 + 4 + 2 * 2
    assert third["computed_tokens"] <= 16 + 8 + 3 * 2


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every forward with a SpanCache: both layers of the model write theirs."""
    sizes: list[int] = []
    update = SpanLayer.update

    def recorded(self: SpanLayer, key_states: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(key_states.shape[2])
        return update(self, key_states, *args, **kwargs)

    monkeypatch.setattr(SpanLayer, "update", recorded)
    return sizes


def arms_of_one_prompt() -> Arms:
    """The prompt is 30 + 90 tokens."""
    backend = random_model("random:64x2x4x2", torch.float32)
    ids = [i * i % 1000 + 10 for i in range(120)]
    place = backend.cache(120)
    with torch.no_grad():
        backend.model(input_ids=torch.tensor([ids]), past_key_values=place)
    known = Known(backend)
    known.keep(place, ids, 0, 30, "before")
    return Arms(known, Prompt(ids[:30], ids, []), place)


def test_what_each_arm_computes(forwards: list[int]) -> None:
    """All of them in a preallocated cache, the dense one too."""
    arms, computed = arms_of_one_prompt(), {}
    for arm in ("dense", "prefix_cache", "shared", "exact_hit"):
        forwards.clear()
        assert getattr(arms, arm)() > 0
        computed[arm] = forwards[::2]
    assert computed == {"dense": [120], "prefix_cache": [90], "shared": [90], "exact_hit": [1]}


@torch.no_grad()
def test_a_prefix_cache_may_prefill_in_blocks(forwards: list[int]) -> None:
    """Equal ones of at most 40 tokens; the KV left behind is that of one forward."""
    arms = arms_of_one_prompt()
    dense = [layer.keys.clone() for layer in arms.place.layers]
    arms.block = 40
    forwards.clear()
    arms.prefix_cache()
    assert forwards[::2] == [30, 30, 30]
    for a, b in zip(dense, arms.place.layers, strict=True):
        torch.testing.assert_close(a, b.keys)


def test_the_fastest_way_to_prefill_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    arms, tried = arms_of_one_prompt(), []

    def fake(backend: Any, ids: Any, cache: Any = None, block: int | None = None) -> float:
        tried.append(block)
        return {90: 3.0, 50: 1.0, 20: 2.0}.get(block or 0, 5.0)

    monkeypatch.setattr(ttft, "BLOCKS", (200, 50, 20))
    monkeypatch.setattr(ttft, "first_token", fake)
    monkeypatch.setattr(arms, "shared", lambda: 5.0)
    arms.warm_up()
    assert arms.block == 50
    assert [block for block in tried if block] == [90, 50, 20]


def test_shared_is_timed_from_where_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kvcomm does before its own clock starts is in its time."""
    arms, refusal = arms_of_one_prompt(), HFBackend.refusal

    def slow(self: HFBackend, *args: Any) -> str | None:
        sleep(0.2)
        return refusal(self, *args)

    arms.warm_up()
    monkeypatch.setattr(HFBackend, "refusal", slow)
    assert arms.shared() >= 200


def test_its_parser_is_told_once_how_flags_may_clash() -> None:
    """The command line lets commands give shared flags a meaning of their own; this one only does so."""
    parser = ArgumentParser(conflict_handler="resolve")
    parser.add_argument("--output", type=Path)
    plain = ArgumentParser()
    for p in (parser, plain):
        add_arguments(p)
    assert plain.conflict_handler == "error"
    assert parser.parse_args(["--output", "7"]).output == ["7"]


def test_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--output", "50", "--repetitions", "1"]) == 0
    assert "dense / shared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "random:64x2"], "random:<hidden>"),
        (["--model", "random:65x2x4x2"], "heads must divide"),
        (["--agents", "0"], "--agents is 0"),
        (["--dtype", "float99"], "float99"),
    ],
)
def test_unusable_flags(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *flags]) == 2
    assert said in capsys.readouterr().err
