"""The team as processes: they say what one process says, prefill a text once over all of them, and leave nothing behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm import KVComm
from kvcomm.agents.team import TurnFailed
from kvcomm.cli import main
from kvcomm.config import Config
from kvcomm.demo import on_processes
from kvcomm.demo.on_processes import Child, ChildFailed, private_folder, running
from kvcomm.demo.page import apart, page, terminal
from kvcomm.demo.prefills import Passage, Reader
from kvcomm.demo.worker import Ask, EngineJob, Job, ServerJob
from kvcomm.demo.workloads import default_team, make_task
from kvcomm.segments import ReuseReport, SpanReport
from kvcomm.tiny import FOLDER, tasks, tokenizer
from kvcomm.wire import protocol
from kvcomm.wire.address import Address
from kvcomm.wire.client import ServerStore

pytestmark = pytest.mark.once

TOKENIZER = tokenizer.build()
SEED, AGENTS, DOCUMENTS, REQUESTS = 3, 3, 4, 3


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files, with a path that is short enough, empty before and after."""
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)
        assert not list(Path(name).iterdir())


def until(true: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `true` says, as soon as that is true."""
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)
    return value


def children(pid: int) -> set[int]:
    """Processes, also ended ones, whose parent is `pid`."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.add(int(stat.parent.name))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command has written. Nothing of it runs any more."""
    out, before = tmp_path_factory.mktemp("demo"), children(os.getpid())
    flags = f"demo --processes --requests {REQUESTS} --documents {DOCUMENTS} --agents {AGENTS} --seed {SEED}"
    assert main([*flags.split(), "-q", "--format", "json", "--output", str(out)]) == 0
    assert children(os.getpid()) == before
    return out


@pytest.fixture(scope="module")
def doc(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "demo.json").read_text())
    return loaded


def test_processes_say_what_one_process_says(doc: dict[str, Any]) -> None:
    assert doc["arms"] == ["dense", "shared", "processes"]
    for block in (doc["all"], *doc["workloads"].values()):
        found = block["processes"]
        assert block["accuracy_processes"] == block["accuracy_shared"]
        assert found["answers_equal_to_shared"] == 1.0
        assert found["answers_equal_to_dense"] == block["answers_equal_to_dense"]
        assert found["token_reuse_rate"] == pytest.approx(block["token_reuse_rate"], abs=0.01)
        assert found["token_reuse_rate_shared"] == block["token_reuse_rate"] > 0.5
        assert found["ttft_ratio"] == block["ttft_processes_ms"] / block["ttft_shared_ms"]
        assert all(found["parts_ms"][arm]["match_ms"] > 0 for arm in ("shared", "processes"))
        assert all(agent["ttft_processes_ms"] > 0 for agent in block["agents"])
        assert block["accuracy_rotate"] is block["ttft_prefix_cache_ms"] is None


def test_every_document_is_prefilled_once(doc: dict[str, Any]) -> None:
    """Of the documents that the same seed makes here."""
    rng, names = random.Random(SEED), list(doc["workloads"])
    made = [make_task(rng, name, default_team(name, AGENTS).agents, DOCUMENTS) for name in names]
    distinct = sum(len(task.bundles) for task in made)
    assert doc["all"]["processes"]["documents"] == {
        "distinct": distinct,
        "read": AGENTS * distinct,
        "prefilled": {"dense": AGENTS * distinct, "shared": distinct, "processes": distinct},
    }


def test_a_prompt_is_one_round_trip(doc: dict[str, Any]) -> None:
    tally = doc["processes"]
    assert (tally["agents"], tally["calls"]) == (AGENTS, AGENTS * REQUESTS)
    assert tally["finds_per_call"] == 1.0
    assert tally["requests"]["find"] == tally["calls"]
    assert "get" not in tally["requests"]
    assert tally["faults"] == {}
    assert tally["server"]["faults"] == tally["server"]["refused"] == tally["server"]["malformed"] == 0
    assert tally["server"]["memory"]["objects"] > 0
    assert 0 < tally["pipe_ms"] < doc["all"]["ttft_dense_ms"]


def test_page_and_table_show_it(doc: dict[str, Any], folder: Path) -> None:
    html = (folder / "demo.html").read_text()
    assert html == page(doc)
    assert apart(doc) in html
    *_, line = terminal(doc).splitlines()
    assert line == apart(doc)
    count = doc["all"]["processes"]["documents"]["distinct"]
    assert f"{count} documents, read {AGENTS * count} times, were prefilled {count} times" in line
    assert "processes ms" in terminal(doc)
    assert "prefix" not in terminal(doc)


def test_faults_are_told(doc: dict[str, Any]) -> None:
    other = {**doc, "processes": {**doc["processes"], "faults": {"store": 2, "learn": 1}, "server": None}}
    assert apart(other).endswith("faults: store 2, learn 1")


def test_not_on_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-q", "--processes", "--backend", "vllm"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


# -- what ends ------------------------------------------------------------------------------------------------------------


def test_who_dies(temporary: Path) -> None:
    """Without the server every answer is dense and the fault is counted; without an agent its name is said."""
    team = default_team("math", 2)
    comm = KVComm.from_pretrained(dtype="float32")
    task = make_task(random.Random(0), "math", team.agents, 3)
    before = children(os.getpid())
    with on_processes.arms(comm.backend, str(FOLDER), "float32", {"math": team}) as generators:
        apart = generators["processes"]
        assert isinstance(apart, on_processes.Processes)
        dense = [turn.output.text for turn in team.run(generators["dense"], task.fields).turns]
        server, *agents = sorted(children(os.getpid()) - before)
        assert len(agents) == 2
        assert [turn.output.text for turn in team.run(apart, task.fields).turns] == dense
        assert apart.tally().faults == {}
        os.kill(server, signal.SIGKILL)
        done = team.run(apart, task.fields)
        assert [turn.output.text for turn in done.turns] == dense
        assert all(turn.output.report.reused_tokens == 0 for turn in done.turns)
        tally = apart.tally()
        assert tally.faults["store"] >= 2
        assert (tally.requests, tally.server, tally.finds_per_call) == (None, None, None)
        os.kill(agents[1], signal.SIGKILL)
        with pytest.raises(TurnFailed, match=r"agent 'worker' failed .* agent 2 \(worker\) .* was ended by signal 9") as failed:
            team.run(apart, task.fields)
        assert isinstance(failed.value.__cause__, ChildFailed)
        assert [turn.agent for turn in failed.value.turns] == ["teacher"]
    assert children(os.getpid()) == before


def test_who_dies_in_the_middle_of_a_call(temporary: Path) -> None:
    """A question that cannot be answered ends nobody."""
    with pair() as (first, _, server), ThreadPoolExecutor() as pool:
        with pytest.raises(ChildFailed, match=r"first .*: InputError: max_new_tokens is 0"):
            first.ask(replace(asked("scout", "plain"), options={"max_new_tokens": 0}))
        call = pool.submit(first.ask, asked("scout", "plain"))
        until(lambda: flights(server) == 1)
        first.process.kill()
        with pytest.raises(ChildFailed, match=r"first .* was ended by signal 9"):
            call.result()
        until(lambda: flights(server) == 0)


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (EngineJob("/nowhere/at-all", "float32", 1, Path("/nowhere/s")), "InputError: there is no folder /nowhere/at-all"),
        (ServerJob(Path("/proc/nowhere/s"), 1 << 20), "/proc/nowhere"),
    ],
)
def test_who_cannot_begin(job: EngineJob | ServerJob, said: str) -> None:
    before = children(os.getpid())
    with pytest.raises(ChildFailed, match=rf"somebody \(process \d+\): .*{said}"), running({"somebody": job}):
        raise AssertionError("it has begun")
    assert children(os.getpid()) == before


PARENT = """
import signal
from pathlib import Path
from kvcomm.demo.on_processes import private_folder, running
from kvcomm.demo.worker import EngineJob, ServerJob
from kvcomm.tiny import FOLDER

with private_folder() as folder:
    jobs = {"server": ServerJob(folder / "s", 1 << 24), "engine": EngineJob(str(FOLDER), "float32", 1, folder / "s")}
    with running(jobs) as children:
        print(*(child.process.pid for child in children), "", end="\\n", flush=True)
        signal.pause()
"""


def test_when_the_parent_ends_all_end(temporary: Path) -> None:
    """Interrupted, or killed."""
    environ = {**os.environ, "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", PARENT]
    with (
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as one,
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as other,
    ):
        assert one.stdout is not None
        assert other.stdout is not None
        pids = {int(pid) for pid in (one.stdout.readline() + other.stdout.readline()).split()}
        assert len(pids) == 4
        assert len(list(temporary.glob("*/s"))) == 2
        one.send_signal(signal.SIGINT)
        other.send_signal(signal.SIGKILL)
        one.wait(30)
        other.wait(30)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30)
    until(lambda: not list(temporary.iterdir()), 30)


# -- two at once ----------------------------------------------------------------------------------------------------------

RNG = random.Random(5)
LONG = "report about bob : city is oslo . " + " ".join(tasks.filler(RNG) for _ in range(180)) + " pet of bob is cat ."


def asked(role: str, style: str) -> Ask:
    """One agent's call about a long document."""
    question = f"{LONG} questions : city of bob ? pet of bob ? {tasks.CLOSING}"
    messages = ({"role": "system", "content": tasks.role_text(role, style)}, {"role": "user", "content": question})
    return Ask(messages, {"agent": role, "max_new_tokens": 24, "do_sample": False})


@contextmanager
def pair() -> Iterator[tuple[Child, Child, ServerStore]]:
    """Two engines, and a way to ask their server."""
    with private_folder() as folder:
        socket = folder / "s"
        engine = EngineJob(str(FOLDER), "float32", 1, socket, wait_ms=60_000.0)
        jobs: dict[str, Job] = {"server": ServerJob(socket, 1 << 28), "first": engine, "second": engine}
        with running(jobs) as (_, first, second), closing(ServerStore(Address(path=socket))) as server:
            yield first, second, server


def flights(server: ServerStore) -> int:
    """Prompts that are being served."""
    return int(server.call("", protocol.Stats())[0]["flights"])


def test_a_text_that_two_need_at_once_is_prefilled_once(temporary: Path) -> None:
    """The first is stopped for as long as the second needs to ask: it waits, and gets what the first computes."""
    asks = asked("scout", "plain"), asked("critic", "loud")
    alone = KVComm.from_pretrained(dtype="float32", config=Config(mode="off"))
    dense = [alone.generate(ask.messages, **ask.options).text for ask in asks]
    with pair() as (first, second, server), ThreadPoolExecutor() as pool:
        calls = [pool.submit(first.ask, asks[0])]
        until(lambda: flights(server) == 1)
        first.process.send_signal(signal.SIGSTOP)
        try:
            assert flights(server) == 1, "it was done already"
            calls.append(pool.submit(second.ask, asks[1]))
            until(lambda: flights(server) == 2)
        finally:
            first.process.send_signal(signal.SIGCONT)
        outputs = [call.result().output for call in calls]
        assert server.call("", protocol.Stats())[0]["counters"]["waited"] == 1
    assert [output.text for output in outputs] == dense
    reader = Reader(alone.backend.tokenizer)
    read = [reader.passages(ask.messages, [LONG], output.report) for ask, output in zip(asks, outputs, strict=True)]
    assert [passage.tokens > 1000 for (passage,) in read] == [True, True]
    assert [passage.prefilled for (passage,) in read] == [True, False]
    assert outputs[0].report.waited_ms is None
    assert (outputs[1].report.waited_ms or 0) > 0
    assert outputs[1].report.reused_tokens > 1000


# -- counting -------------------------------------------------------------------------------------------------------------


def spans_of(length: int, cuts: list[int], again: list[int]) -> list[tuple[int, int, int]]:
    """Every second piece between these cuts is a span, of which so many tokens are computed again."""
    edges = sorted({min(cut, length) for cut in cuts})
    pairs = zip(edges[::2], edges[1::2], strict=False)
    return [(a, b, min(n, b - a)) for (a, b), n in zip(pairs, again, strict=False)]


@given(
    cuts=st.lists(st.integers(0, 300), max_size=8),
    again=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=60, deadline=None)
def test_documents_in_prompts(cuts: list[int], again: list[int], seed: int) -> None:
    """Against a search for the document's token ids, and against tokens computed again wherever in their spans."""
    rng = random.Random(seed)
    team = default_team("code", 2)
    task = make_task(rng, "code", team.agents, 3)
    messages = team.agents[1].messages(task.fields, "nobody says anything .")
    ids = TOKENIZER.apply_chat_template([dict(message) for message in messages], add_generation_prompt=True, return_dict=False)
    spans = spans_of(len(ids), cuts, again)
    computed = set(range(len(ids))) - {i for a, b, _ in spans for i in range(a, b)}
    for a, b, n in spans:
        computed |= set(rng.sample(range(a, b), n))
    reports = tuple(SpanReport(a, b, "boundary", b - a - n, n, "", 0) for a, b, n in spans)
    report = ReuseReport("", len(ids), len(ids) - len(computed), len(computed), reports)
    found = Reader(TOKENIZER).passages(messages, [*task.bundles, "no such document ."], report)
    assert [passage.document for passage in found] == list(range(len(task.bundles)))
    for passage, document in zip(found, task.bundles, strict=True):
        text = TOKENIZER.encode(" " + document, add_special_tokens=False)
        (start,) = [i for i in range(len(ids)) if ids[i : i + len(text)] == text]
        really = len(computed & set(range(start, start + len(text))))
        assert passage.tokens == len(text)
        assert really <= passage.computed <= len(text)
        if not any(again):
            assert passage.computed == really


def test_another_prompts_report() -> None:
    with pytest.raises(ValueError, match="7 were served"):
        Reader(TOKENIZER).passages([{"role": "user", "content": "city of bob ?"}], [], ReuseReport("", 7, 0, 7))


def test_more_than_half_is_prefilled() -> None:
    assert [Passage(0, 10, computed).prefilled for computed in (0, 5, 6, 10)] == [False, False, True, True]
