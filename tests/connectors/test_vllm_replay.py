"""`kvcomm replay` on a real vLLM beside the same replay on Hugging Face, whose numbers have references of their own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kvcomm.cli import main
from kvcomm.connectors.local import LocalEngine
from kvcomm.demo.workloads import default_team, make_task
from kvcomm.engine import Output
from kvcomm.replay.player import Asked
from kvcomm.segments import ReuseReport
from kvcomm.tiny import FOLDER


class Scribe:
    """Answers the same to everybody, and keeps what was asked."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def generate(self, messages: Sequence[Mapping[str, str]], *, agent: str, **_: Any) -> Output:
        text = f"{agent} says : city of elsa is milan . color of iris is blue so note a is blue ."
        self.rows.append({"session_id": "one", "agent": agent, "messages": list(messages), "output": text})
        return Output(text, [], 0.0, ReuseReport(agent, 0, 0, 0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Results on vLLM and on Hugging Face."""
    pytest.importorskip("vllm")
    where, scribe = tmp_path_factory.mktemp("replay"), Scribe()
    team = default_team("retrieval", 4)
    team.run(scribe, make_task(random.Random(1), "retrieval", team.agents, 4).fields)
    trace = where / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in scribe.rows))
    options = [str(trace), "--policies", "prefix,rotate,boundary,auto", "--quiet"]
    command = [sys.executable, "-m", "kvcomm", "replay", *options, "--backend", "vllm", "--output", str(where / "vllm")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["replay", *options, "--output", str(where / "hf")]) == 0
    return where / "vllm", where / "hf"


def test_the_same_numbers_as_on_hugging_face(folders: tuple[Path, Path]) -> None:
    ours, theirs = ([json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()[1:]] for folder in folders)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert (a["agent"], a["hop"], a["skipped"]) == (b["agent"], b["hop"], None)
        for policy, wanted in b["policies"].items():
            found = a["policies"][policy]
            assert [found[n] for n in ("prompt_tokens", "answer_tokens", "positions", "top1", "top1_first")] == [
                wanted[n] for n in ("prompt_tokens", "answer_tokens", "positions", "top1", "top1_first")
            ]
            assert found["ttft_ms"] > 0
            if policy != "prefix":  # vLLM's own prefix cache works in blocks
                assert found["tokens_by_rung"] == wanted["tokens_by_rung"]
            if policy != "dense":  # from below: vLLM gives the likeliest tokens only
                assert found["kl"] == pytest.approx(wanted["kl"], rel=0.1, abs=1e-5)
                assert found["kl_first"] == pytest.approx(wanted["kl_first"], rel=0.1, abs=1e-5)
    rotated, repaired = (sum(row["policies"][p]["kl"] for row in ours) for p in ("rotate", "boundary"))
    assert rotated > 10 * repaired > 0
    assert sum(row["policies"]["boundary"]["reused_tokens"] for row in ours) > 0


def test_the_page_says_how_it_was_measured(folders: tuple[Path, Path]) -> None:
    assert "vLLM gives the likeliest tokens" in (folders[0] / "replay.html").read_text()
    assert "vLLM gives the likeliest tokens" not in (folders[1] / "replay.html").read_text()


def test_vllm_has_no_anchors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps({"session_id": "a", "messages": [{"role": "user", "content": "hi"}], "output": "yes"}) + "\n")
    assert main(["replay", str(trace), "--backend", "vllm", "--policies", "anchor", "-q"]) == 2
    assert "policy 'anchor' needs --backend hf: on vLLM, anchors are a setting of the whole engine" in capsys.readouterr().err


@pytest.mark.parametrize("traces", [True, False])
def test_how_an_answer_is_forced(traces: bool) -> None:
    """By vLLM's own trace replay where there is one. What takes its place lets one token through at each position."""
    pytest.importorskip("vllm")
    from vllm import SamplingParams

    from kvcomm.replay.vllm import FORCED, VLLMPlayer, _let_through

    core = SimpleNamespace(model_config=SimpleNamespace(max_model_len=100))
    llm = SimpleNamespace(get_tokenizer=lambda: AutoTokenizer.from_pretrained(FOLDER), llm_engine=core)
    player = VLLMPlayer(LocalEngine(llm, count(), True), 10, trace_replay=traces)
    given = player._sampling(Asked("s", "a", [], [1, 2], [5, 6, 7], 99), [5, 6, 7], {})
    params = SamplingParams(max_tokens=given.pop("new"), **given)
    assert (params.max_tokens, params.ignore_eos) == (3, True)
    assert params.trace_decode_token_ids == ([5, 6, 7] if traces else None)
    assert params.extra_args.get(FORCED) == (None if traces else [5, 6, 7])
    for said, wanted in ([], 5), ([5], 6), ([5, 6], 7):
        assert int(_let_through([5, 6, 7])(said, torch.randn(20)).argmax()) == wanted
    free = torch.randn(20)
    assert torch.equal(_let_through([5])([5], free.clone()), free)
