"""Engines, one after the other, that share through a server: what the first computed, the second finds. Against answers that
reuse nothing, and against one engine that keeps for itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm")

from kvcomm.connectors.local import LocalEngine, Reply
from kvcomm.tiny import FOLDER
from kvcomm.wire.client import ServerStore


@pytest.fixture(scope="module")
def socket_path() -> Iterator[Path]:
    """Of a server process of its own."""
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as folder:
        path = Path(folder) / "s"
        command = [sys.executable, "-m", "kvcomm", "server", "--socket", str(path), "--memory", "512M"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            assert "listening" in server.stderr.readline()
            yield path
            server.terminate()


def started(path: Path | None) -> LocalEngine:
    extra = {"least_gain": 32} | ({} if path is None else {"server": str(path)})
    return LocalEngine.start(str(FOLDER), dtype="float32", tokens=2048, extra=extra, quiet=True)


def dense(engine: LocalEngine, ids: list[int], name: str) -> Reply:
    """With a cache salt of its own, and left alone by kvcomm."""
    return engine.ask(ids, tenant=f"dense {name}", words={"mode": "off"}, new=8)


def test_what_one_engine_computed_another_finds(socket_path: Path) -> None:
    rng = np.random.default_rng(5)
    document, answerless = rng.integers(20, 400, 400).tolist(), rng.integers(20, 400, 60).tolist()
    prompts = {"moved": [*answerless, *document, *answerless[:20]], "same": [*document, *answerless]}
    first = started(socket_path)
    try:
        said = first.ask(prompts["same"], words={"agent": "clerk"}, new=8)
        assert said.report is not None
        assert said.report.fallback is not None
        first.ask(answerless, new=1)  # a step for what was left to keep
    finally:
        first.close()
    second = started(socket_path)
    try:
        second.ask(answerless[:30], new=1)  # from now on it is ready
        again = second.ask(prompts["same"], words={"agent": "critic"}, new=8)
        assert again.report is not None
        assert [span.rung for span in again.report.spans] == ["exact"]
        assert again.report.spans[0].producer == "clerk"
        assert again.ids == dense(second, prompts["same"], "same").ids
        moved = second.ask(prompts["moved"], words={"agent": "critic"}, new=8)
        assert moved.report is not None
        assert moved.report.reused_tokens > 0.7 * len(document)
        stranger = second.ask(prompts["same"], tenant="other", words={"agent": "critic"}, new=8)
        assert stranger.report is not None
        assert stranger.report.reused_tokens == 0
    finally:
        second.close()
    alone = started(None)
    try:
        alone.ask(answerless[:30], new=1)
        alone.ask(prompts["same"], words={"agent": "clerk"}, new=8)
        alone.ask(answerless, new=1)
        by_itself = alone.ask(prompts["moved"], words={"agent": "critic"}, new=8)
        assert by_itself.report is not None
        assert (moved.ids, moved.report.spans) == (by_itself.ids, by_itself.report.spans)
    finally:
        alone.close()


def test_a_server_that_is_gone_costs_no_request(socket_path: Path) -> None:
    """The engine starts, and answers densely; the fault is counted and named."""
    engine = started(socket_path.with_name("nobody"))
    try:
        ids = np.random.default_rng(6).integers(20, 400, 300).tolist()
        engine.ask(ids[:40], new=1)
        replies = [engine.ask(ids, words={"agent": "a"}, new=8) for _ in range(3)]
        assert all(reply.ids == dense(engine, ids, "gone").ids for reply in replies)
        assert replies[-1].report is not None
        assert "fault" in str(replies[-1].report.fallback)
    finally:
        engine.close()


def test_engines_let_go_of_what_they_found(socket_path: Path) -> None:
    """No leases are left once requests have ended."""
    engine = started(socket_path)
    ids = np.random.default_rng(7).integers(20, 400, 300).tolist()
    store = ServerStore(str(socket_path))
    try:
        for tail in (1, 2, 3):
            engine.ask([*ids, tail], words={"agent": "a"}, new=2)
        engine.ask(ids[:20], new=1)
    finally:
        engine.close()
    from kvcomm.wire import protocol

    status, _ = store.call("", protocol.Stats())
    assert status["flights"] == 0
    store.close()


def test_a_reset_leaves_the_server_to_the_others(socket_path: Path) -> None:
    """The engine that was reset, for example for other weights, shares with itself alone from then on."""
    ids = np.random.default_rng(8).integers(20, 400, 300).tolist()
    engine = started(socket_path)
    try:
        engine.ask(ids, words={"agent": "a"}, new=2)
        engine.ask(ids[:20], new=1)
        with closing(ServerStore(str(socket_path))) as store:
            kept = {segment.key for segment in store.segments()}
            assert kept
            assert engine.llm.reset_prefix_cache(reset_connector=True)
            again = engine.ask([*ids, 3], words={"agent": "b"}, new=2)
            assert again.report is not None
            assert again.report.reused_tokens == 0
            engine.ask(ids[:20], new=1)
            assert kept < {segment.key for segment in store.segments()}
        third = engine.ask([4, *ids], words={"agent": "c"}, new=2)
        assert third.report is not None
        assert third.report.reused_tokens > 200
    finally:
        engine.close()


def test_a_reset_needs_no_server(socket_path: Path) -> None:
    engine = started(socket_path.with_name("nobody"))
    try:
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        assert len(engine.ask([*range(20, 60)], new=2).ids) == 2
    finally:
        engine.close()
