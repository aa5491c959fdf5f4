"""A replay on the embedded model: its numbers against independent ways to them, and what happens when it is cut."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from kvcomm.backends.hf import HFBackend
from kvcomm.backends.loading import load
from kvcomm.cli import main
from kvcomm.config import Config
from kvcomm.demo.workloads import ROLES, default_team, make_task
from kvcomm.engine import KVComm, Output
from kvcomm.replay.policies import POLICIES, named
from kvcomm.segments import ReuseReport
from kvcomm.tiny import FOLDER

SHORT = "prefix,boundary"


class Recorder:
    """A generator for `Team.run` that keeps what is asked and answered."""

    def __init__(self, comm: KVComm, session: str) -> None:
        self.comm, self.session = comm, session
        self.rows: list[dict[str, Any]] = []

    def generate(
        self, messages: Sequence[Mapping[str, str]], *, agent: str, rule: Any, max_new_tokens: int, **_: Any
    ) -> Output:
        out = self.comm.generate(messages, agent=agent, max_new_tokens=max_new_tokens, do_sample=False)
        self.rows.append({"session_id": self.session, "agent": agent, "messages": list(messages), "output": out.text})
        return out


@pytest.fixture(scope="session")
def backend() -> HFBackend:
    return load(str(FOLDER), dtype=torch.float32)


@pytest.fixture(scope="session")
def team_rows(backend: HFBackend) -> list[dict[str, Any]]:
    """Sessions of two teams of the demo, of five agents and of two, answered densely: JSONL as a person would write it."""
    rng, rows = random.Random(3), list[dict[str, Any]]()
    for name, agents in zip(ROLES, (5, 2), strict=False):
        team = default_team(name, agents)
        recorder = Recorder(KVComm(backend, config=Config(mode="off")), name)
        team.run(recorder, make_task(rng, name, team.agents, 4).fields)
        rows += recorder.rows
    return rows


@pytest.fixture
def trace(tmp_path: Path, team_rows: list[dict[str, Any]]) -> Path:
    return written(tmp_path / "team.jsonl", team_rows)


def written(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*args: object) -> int:
    return main(["replay", *map(str, args), "--quiet"])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()[1:]]


def untimed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "policies": {n: {**o, "ttft_ms": None} for n, o in row["policies"].items()}} for row in rows]


# -- numbers -----------------------------------------------------------------------------------------------------------


def in_life(backend: HFBackend, policy: str, rows: Sequence[dict[str, Any]]) -> list[tuple[Tensor, ReuseReport]]:
    """The same calls, one token at a time: generate's own loop, made to say the answer by a logits processor."""
    comm = KVComm(backend, config=Config(**POLICIES[policy].changes))
    tokenizer: Any = backend.tokenizer
    found = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
        said = [*row["messages"], {"role": "assistant", "content": row["output"]}]
        answer = tokenizer.apply_chat_template(said, return_dict=False)[len(prompt) :]
        scores: list[Tensor] = []

        def only(ids: Tensor, logits: Tensor, answer: list[int] = answer, scores: list[Tensor] = scores) -> Tensor:
            forced = torch.full_like(logits, float("-inf"))
            forced[0, answer[len(scores)]] = 0.0
            scores.append(logits[0].clone())
            return forced

        out = comm.generate(
            row["messages"], agent=row["agent"], tenant=row["session_id"], rule=POLICIES[policy].rule,
            max_new_tokens=len(answer), do_sample=False, logits_processor=LogitsProcessorList([only]),
        )  # fmt: skip
        assert out.token_ids == answer
        found.append((torch.stack(scores), out.report))
    return found


@torch.no_grad()
def plainly(row: dict[str, Any]) -> Tensor:
    """A forward of transformers over prompt and answer at once; logits [answer, vocabulary]."""
    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER)
    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(
        [*row["messages"], {"role": "assistant", "content": row["output"]}], return_dict=False
    )
    logits: Tensor = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1]
    return logits


def test_numbers_are_those_of_two_other_ways(
    trace: Path, tmp_path: Path, backend: HFBackend, team_rows: list[dict[str, Any]]
) -> None:
    """Dense by a plain forward, policies by generate's own loop, KL by torch; reuse by the engine's reports."""
    assert run(trace, "--output", tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out")
    assert [row["agent"] for row in rows] == [row["agent"] for row in team_rows]
    dense = [plainly(row) for row in team_rows]
    for policy in list(POLICIES)[1:]:
        for row, want, (got, report) in zip(rows, dense, in_life(backend, policy, team_rows), strict=True):
            ours = row["policies"][policy]
            kl = kl_div(got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="none").sum(-1)
            assert ours["positions"] == ours["answer_tokens"] == len(want)
            assert (ours["kl"], ours["kl_first"]) == (
                pytest.approx(float(kl.mean()), rel=0.02, abs=1e-6),
                pytest.approx(float(kl[0]), rel=0.02, abs=1e-6),
            )
            assert ours["top1"] == pytest.approx(float((want.argmax(-1) == got.argmax(-1)).float().mean()))
            assert (ours["reused_tokens"], ours["prompt_tokens"], ours["fallback"]) == (
                report.reused_tokens,
                report.prompt_tokens,
                report.fallback,
            )
            assert ours["tokens_by_rung"] == report.tokens_by_rung
            assert ours["ttft_ms"] > 0
    by_policy = {name: sum(row["policies"][name]["reused_tokens"] for row in rows) for name in POLICIES}
    assert by_policy["dense"] == 0 < by_policy["anchor"] < by_policy["boundary"] < by_policy["rotate"]
    assert sum(row["policies"]["boundary"]["kl"] for row in rows) < sum(row["policies"]["rotate"]["kl"] for row in rows)


def test_document(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trace, "--output", tmp_path / "out", "--format", "json", "--policies", SHORT) == 0
    doc = json.loads(capsys.readouterr().out)
    assert doc == json.loads((tmp_path / "out" / "replay.json").read_text())
    rows = rows_of(tmp_path / "out")
    assert (doc["schema"], doc["calls"], doc["calls_served"], doc["sessions"], doc["live"]) == (
        "kvcomm.replay/1",
        7,
        7,
        2,
        False,
    )
    assert list(doc["policies"]) == ["dense", "prefix", "boundary"]
    for name, found in doc["policies"].items():
        mine = [row["policies"][name] for row in rows]
        assert found["prompt_tokens"] == sum(o["prompt_tokens"] for o in mine)
        assert found["token_reuse_rate"] == sum(o["reused_tokens"] for o in mine) / found["prompt_tokens"]
        assert found["ttft_sum_ms"] == pytest.approx(sum(o["ttft_ms"] for o in mine))
        if name != "dense":
            assert found["kl"] == pytest.approx(sum(o["kl"] for o in mine) / 7)
    assert [found["hop"] for found in doc["hops"]] == [0, 1, 2, 3, 4]
    assert sum(found["calls"] for found in doc["agents"]) == 7
    assert doc["policies"]["dense"]["kl"] is None
    table = (tmp_path / "out" / "calls.csv").read_text().splitlines()
    assert len(table) == 1 + 7 * 3


def test_what_a_person_sees(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    rows[0]["agent"] = "<script>alert(1)</script>"
    written(trace, rows)
    assert run(trace, "--output", tmp_path / "out", "--policies", "rotate,auto") == 0
    printed = capsys.readouterr().out
    assert "7 calls of 2 sessions" in printed
    assert "auto: " in printed
    assert "of prompt tokens not computed" in printed
    page = (tmp_path / "out" / "replay.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 3
    for text in ("Worst calls", "rotate", "auto", "prefers-color-scheme: dark", 'name="viewport"'):
        assert text in page
    for loaded in ("http://", "https://", "src="):
        assert loaded not in page


# -- outputs that flow -------------------------------------------------------------------------------------------------


def test_live(trace: Path, tmp_path: Path, backend: HFBackend, team_rows: list[dict[str, Any]]) -> None:
    """The trace was made densely: so dense says the same again, and each policy reads what it said itself."""
    rows = team_rows
    assert run(trace, "--live", "--max-new-tokens", 96, "--output", tmp_path / "out", "--policies", "rotate") == 0
    served = rows_of(tmp_path / "out")
    assert [row["policies"]["dense"]["text"].strip() for row in served] == [row["output"] for row in rows]
    said: dict[str, dict[str, str]] = {}
    comm = KVComm(backend, config=Config(**POLICIES["rotate"].changes))
    for row, done in zip(rows, served, strict=True):
        mine = said.setdefault(row["session_id"], {})
        messages = row["messages"]
        for recorded, new in mine.items():
            messages = [{**m, "content": m["content"].replace(recorded, new)} for m in messages]
        out = comm.generate(messages, agent=row["agent"], tenant=row["session_id"], max_new_tokens=96, do_sample=False)
        assert done["policies"]["rotate"]["text"].strip() == out.text
        assert done["policies"]["rotate"]["reused_tokens"] == out.report.reused_tokens
        assert done["policies"]["rotate"]["same_text"] == (out.text == row["output"])
        mine[row["output"]] = out.text
    page = (tmp_path / "out" / "replay.html").read_text()
    assert "Outputs flow" in page


# -- cut and continued -------------------------------------------------------------------------------------------------


def test_killed_and_resumed(trace: Path, tmp_path: Path, team_rows: list[dict[str, Any]]) -> None:
    """A real process, killed in the middle; what it left, continued, is what an uninterrupted run gives but for times."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("--policies", "rotate,anchor,auto")
    assert run(trace, *options, "--output", whole) == 0
    command = [sys.executable, "-m", "kvcomm", "replay", str(trace), *options, "--output", str(cut), "-q"]
    log = cut / "calls.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ}) as process:
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = rows_of(cut)
    assert 2 <= len(before) < len(team_rows)
    assert not (cut / "replay.html").exists()
    with log.open("ab") as file:
        file.write(b'{"number": 5, "sess')  # cut while it was written
    assert run(trace, *options, "--output", cut) == 0
    after = rows_of(cut)
    assert after[: len(before)] == before  # not served again, or at least not measured again
    assert untimed(after) == untimed(rows_of(whole))
    numbers = [json.loads((folder / "replay.json").read_text()) for folder in (whole, cut)]
    assert [doc["resumed_calls"] for doc in numbers] == [0, len(before)]
    assert numbers[0]["policies"]["auto"]["kl"] == numbers[1]["policies"]["auto"]["kl"]
    times = log.stat().st_mtime_ns
    assert run(trace, *options, "--output", cut) == 0  # nothing is left to do
    assert (rows_of(cut), log.stat().st_mtime_ns) == (after, times)


def test_two_replays_into_one_folder(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another process writes: this one is refused and touches nothing; when that one is killed, this one goes on."""
    out = tmp_path / "out"
    options = ("--policies", "rotate,auto", "--output", str(out))
    command = [sys.executable, "-m", "kvcomm", "replay", str(trace), *options, "-q"]
    log = out / "calls.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ}) as process:
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 2):
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        try:
            held = log.read_bytes()
            assert run(trace, *options) == 2
            assert re.search("calls.jsonl: another replay is writing here; .*give another --output", capsys.readouterr().err)
            assert log.read_bytes() == held
        finally:
            process.send_signal(signal.SIGKILL)
    assert run(trace, *options) == 0
    assert [row["number"] for row in rows_of(out)] == list(range(7))


@pytest.mark.parametrize("how", [("--live", "--max-new-tokens", 24), ("--across",)])
def test_cut_where_earlier_calls_matter(trace: Path, tmp_path: Path, how: tuple[object, ...]) -> None:
    options = (trace, *how, "--policies", "rotate", "--output", tmp_path)
    assert run(*options) == 0
    log = tmp_path / "calls.jsonl"
    whole, lines = rows_of(tmp_path), log.read_bytes().splitlines(keepends=True)
    for kept in (0, 1, 4):  # in the head, behind it, in the first session
        log.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        assert run(*options) == 0
        assert untimed(rows_of(tmp_path)) == untimed(whole)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--policies", "boundary"], "its policies are dense, and now dense, boundary"),
        (["--context", "4096"], "its context is None, and now 4096"),
        (["--positions", "3"], "its positions is 512, and now 3"),
        (["--seed", "1"], "its seed is 0, and now 1"),
        (["--live"], "its live is False, and now True"),
        (["--sessions", "1"], "its trace is '7 calls .*, and now '5 calls"),
        (["--dtype", "bfloat16"], "its dtype is 'float32', and now 'bfloat16'"),
    ],
)
def test_another_replay_in_the_folder(
    trace: Path, tmp_path: Path, changed: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", tmp_path / "out", "--policies", "dense"]
    assert run(trace, *options) == 0
    kept = (tmp_path / "out" / "calls.jsonl").read_bytes()
    capsys.readouterr()
    assert run(trace, *options, *changed) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(
        f"^kvcomm: InputError: .*calls.jsonl holds another replay: {says}.*give another --output$", said.err, re.MULTILINE
    )
    assert (tmp_path / "out" / "calls.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    "content", [b"something else\n", b"something else", b"[]\n", b'{"schema": 1}\nnot json\n', b"\xff\xfe\n"]
)
def test_no_log_at_all(trace: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "calls.jsonl").write_bytes(content)
    assert run(trace, "--output", tmp_path, "--policies", "dense") == 2
    assert "give another --output" in capsys.readouterr().err
    assert (tmp_path / "calls.jsonl").read_bytes() == content


# -- odd traces --------------------------------------------------------------------------------------------------------


def call(output: str = "city of elsa is milan .", text: str = "city of elsa ?", **more: Any) -> dict[str, Any]:
    return {"session_id": "s", "agent": "a", "messages": [{"role": "user", "content": text}], "output": output, **more}


def test_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(written(tmp_path / "one.jsonl", [call()]), "--output", tmp_path / "out") == 0
    assert "nothing" not in capsys.readouterr().err
    assert (tmp_path / "out" / "replay.html").read_text().count("<svg") == 2  # no hops


def test_calls_that_do_not_fit_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        call(),
        call(text="x" * 3000),
        call(output="y" * 3000),
        call(messages=[{"role": "wizard", "content": "hello"}]),
        call(""),
    ]
    path = written(tmp_path / "odd.jsonl", rows)
    assert run(path, "--output", tmp_path / "out", "--format", "json", "--policies", "auto") == 0
    doc = json.loads(capsys.readouterr().out)
    assert (doc["calls"], doc["calls_served"], doc["calls_skipped"]) == (5, 3, 2)
    assert doc["skipped"] == {"it needs # tokens, the model's context is # (--context N)": 2}
    assert doc["changes"] == {"role 'wizard' told as user": 1}
    reasons = [row["skipped"] for row in rows_of(tmp_path / "out")]
    assert reasons[0] is None
    assert "the model's context is 2048 (--context N)" in reasons[1]
    page = (tmp_path / "out" / "replay.html").read_text()
    assert "skipped, 2 calls" in page
    assert "told as user: 1 messages" in page
    assert run(path, "--context", 4096, "--format", "json", "--policies", "auto") == 0
    doc = json.loads(capsys.readouterr().out)
    assert (doc["calls_served"], doc["context_tokens"]) == (5, 4096)


def test_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "long.jsonl", [call(text="x" * 3000)])
    assert run(path, "--output", tmp_path / "out") == 2
    assert "none of the 1 calls could be replayed; the first one: it needs" in capsys.readouterr().err
    assert "No call was served" in (tmp_path / "out" / "replay.html").read_text()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{", b"\xff" * 100, b'{"a": 1}\n', b"[" * 10_000])
def test_unusable_traces(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.jsonl").write_bytes(content)
    assert run(tmp_path / "trace.jsonl") == 2
    said = capsys.readouterr().err
    assert said.startswith("kvcomm: InputError: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--policies", "dense,magic"], "no policy 'magic'"),
        (["--sessions", "0"], "--sessions is 0"),
        (["--positions", "0"], "--positions is 0"),
        (["--context", "1"], "--context is 1"),
        (["--model", "/nowhere"], "there is no folder /nowhere, and no Hugging Face id is written like that"),
        (["--backend", "vllm", "--policies", "auto, anchor"], "policy 'anchor' needs --backend hf: on vLLM, anchors are"),
        (["--dtype", "int12"], "--dtype is 'int12'"),
    ],
)
def test_unusable_flags(trace: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trace, *flags) == 2
    assert says in capsys.readouterr().err


def test_output_that_is_no_folder(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before a model is loaded, which is not there either."""
    (tmp_path / "file").write_text("mine")
    for output, says in (("file", "it is a file; give a folder"), ("file/below", "Not a directory; give a folder")):
        assert run(trace, "--output", tmp_path / output, "--model", "/nowhere") == 2
        assert re.search(f"InputError: --output .*{output} cannot be made: {says}", capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "calls.jsonl").mkdir()
    assert run(trace, "--output", tmp_path, "--policies", "dense") == 2
    assert "calls.jsonl cannot be written: Is a directory; give another --output" in capsys.readouterr().err


def test_output_that_may_not_be_written(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvcomm.replay.command.os.access", lambda *_: False)  # root may write everywhere
    assert run(trace, "--output", tmp_path, "--model", "/nowhere") == 2
    assert f"--output {tmp_path} may not be written to; give another folder" in capsys.readouterr().err


def test_policies() -> None:
    assert [p.name for p in named(" boundary,,boundary, dense")] == ["dense", "boundary"]
    assert [p.name for p in named("")] == ["dense"]


def test_a_model_that_fails_is_said_and_tried_again(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvcomm.replay.hf import HFPlayer

    serve = HFPlayer.serve

    def failing(self: HFPlayer, policy: Any, asked: Any) -> Any:
        if asked.agent == "analyst":
            raise RuntimeError("no memory")
        return serve(self, policy, asked)

    options = (trace, "--output", tmp_path / "out", "--policies", "dense")
    monkeypatch.setattr(HFPlayer, "serve", failing)
    assert run(*options) == 1
    assert "skipped, 1 calls: failed: no memory" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(*options) == 0
    assert "skipped" not in capsys.readouterr().out
    rows = {row["number"]: row for row in rows_of(tmp_path / "out")}
    assert all(row["skipped"] is None for row in rows.values())
    assert len(rows) == 7


def test_headline_is_that_of_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times by hand: one long call, two short ones. The ratio of the sums in the table is the headline."""
    from kvcomm.replay.page import page, terminal
    from kvcomm.replay.results import Outcome, Row
    from kvcomm.replay.summary import summarise

    measured: dict[str, Any] = {"positions": 1, "kl_first": 0.0, "kl_early": 0.0, "kl": 0.0, "top1": 1.0, "top1_first": True}
    rows = [
        Row(i, "s", "a", "", "", 0, (), policies={
            "dense": Outcome(dense, 0, {}, 100, 1), "auto": Outcome(ours, 50, {}, 100, 1, **measured)
        })
        for i, (dense, ours) in enumerate([(6000.0, 1500.0), (90.0, 100.0), (110.0, 100.0)])
    ]  # fmt: skip
    assert run(written(tmp_path / "t.jsonl", [call()]), "--format", "json", "--policies", "auto") == 0
    doc = {**json.loads(capsys.readouterr().out), **summarise(rows, ["dense", "auto"])}
    auto = doc["policies"]["auto"]
    assert (auto["ttft_sum_ms"], auto["ttft_ms"]) == (1700, 100)
    assert (auto["dense_over_this_ttft_sum"], auto["dense_over_this_ttft"]) == (6200 / 1700, 1.1)
    printed = terminal(doc)
    assert "first token 3.65x as fast as dense (all calls' times together; 1.10x for the median call)" in printed
    head, _, line = printed.splitlines()[1:4]
    assert re.search(r"ttft sum ms +dense / it +median per call +reused", head)
    assert line.split()[:4] == ["auto", "1700.0", "3.65x", "1.10x"]
    html = page(doc, rows)
    assert "first token 3.65x as fast" in html
    assert "<th>TTFT sum ms</th><th>dense / it</th><th>TTFT median ms</th><th>median per call</th>" in html
    assert "<td>1700.0</td><td>3.65x</td><td>100.0</td><td>1.10x</td>" in html


def test_what_is_as_good_as_dense_is_drawn_as_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A KL of 0 stands at the bottom, whose tick says that it holds less as well; what is pointed at says 0."""
    assert run(written(tmp_path / "t.jsonl", [call()]), "--output", tmp_path, "--policies", "prefix") == 0
    html = (tmp_path / "replay.html").read_text()
    assert json.loads((tmp_path / "replay.json").read_text())["policies"]["prefix"]["kl"] == 0
    low, *higher = re.findall(r'text-anchor="end">(≤?1e-\d+)<', html)
    assert low == "≤1e-7"
    assert "≤1e-7" not in higher
    assert re.search(r"<title>prefix: [\d.]+ ms, KL 0</title>", html)


def test_page_says_what_is_hidden_and_how_much_memory_there_is(tmp_path: Path) -> None:
    from kvcomm.report import gib, machine

    assert run(written(tmp_path / "t.jsonl", [call()]), "--output", tmp_path, "--policies", "prefix") == 0
    html = (tmp_path / "replay.html").read_text()
    assert f"memory {gib(machine()['memory_bytes'])}, " in html
    assert "memory_bytes" not in html
    assert "background-attachment: local, local, scroll, scroll" in html  # the shadow at the edge of a wide table
