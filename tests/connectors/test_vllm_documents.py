"""Documents prefilled alone, on a real vLLM with the embedded model: against the tasks' right answers and the library."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvcomm.bench.drift import questions
from kvcomm.engine import KVComm
from kvcomm.tiny import FOLDER, tasks

pytest.importorskip("vllm")


def tick(engine: Any) -> None:
    """What is to be learned is learned, and a step tells the scheduler's side."""
    if engine.worker._adviser is not None:
        engine.worker._adviser.wait()
    engine.ask([3, 4, 5], mode="off", new=1)


@contextmanager
def running(engines: Iterator[Any]) -> Iterator[Any]:
    try:
        yield next(engines)
    finally:
        next(engines, None)


def test_answers_are_those_of_dense_and_of_the_library(start_engine: Callable[..., Iterator[Any]]) -> None:
    """Documents prefilled alone, asked about behind headers that their K/V does not know. The tasks' own answers, with anchors
    and without them (negative control); and the library on the same prompts.
    """
    comm = KVComm.from_pretrained(dtype="float32")
    tokenizer: Any = comm.backend.tokenizer
    stop = comm.backend.model.generation_config.eos_token_id
    asked = list(questions(20, 4, 6, random.Random(5)))
    right = {}
    for anchors in ("alone", "off"):
        with running(start_engine(model=FOLDER, extra={"anchors": anchors})) as engine:
            known: set[str] = set()
            right[anchors], served = 0, []
            for question in asked:
                for content in question.contents:
                    if content not in known:
                        engine.ask(
                            [tokenizer.bos_token_id, *tokenizer.encode(content, add_special_tokens=False)], new=1, prefill=True
                        )
                    known.add(content)
                tick(engine)
                ids = comm.encode(question.messages)
                (output,) = engine.ask(ids, new=32, stop=stop, agent=question.agent)
                answer = tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True).strip()
                right[anchors] += tasks.score([question.item], answer) == [True]
                served.append(output.kv_transfer_params["kvcomm"])
                if anchors == "alone":
                    for content in question.contents:
                        comm.prefill(content)
                    own = comm.generate(question.messages, agent=question.agent, max_new_tokens=32, do_sample=False)
                    assert (own.report.fallback, own.text) == (served[-1]["fallback"], answer)
                    more = served[-1]["reused_tokens"] - own.report.reused_tokens  # vLLM's own prefix cache helps
                    assert more > -0.05 * len(ids)
            if anchors == "alone":
                reused = [s["reused_tokens"] / s["prompt_tokens"] for s in served if s["fallback"] is None]
                assert len(reused) >= 10
                assert sum(reused) / len(reused) > 0.8
                assert sum(s["tokens_by_rung"]["anchor"] for s in served) > 0
                assert engine.desk.counters.total("faults") == 0
    assert right["alone"] >= 19
    assert right["off"] < 16
