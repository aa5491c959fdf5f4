"""`kvcomm vllm` as a user runs it: the embedded model behind the OpenAI API, in processes of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.request import Request, urlopen

import pytest

from kvcomm.agents.team import Team
from kvcomm.demo.workloads import ROLES, default_team, make_task
from kvcomm.engine import Output
from kvcomm.segments import ReuseReport
from kvcomm.tiny import tasks

pytest.importorskip("vllm")


@dataclass
class Client:
    """Plain HTTP; an agent's words to kvcomm go into `kv_transfer_params`. Clients of different tenants find nothing of each
    other, not in vLLM's own cache either.
    """

    url: str
    said: Mapping[str, Any]
    tenant: str = "a"

    def post(self, path: str, **body: Any) -> Any:
        request = Request(
            f"{self.url}{path}", json.dumps({"model": "tiny", "temperature": 0, "cache_salt": self.tenant, **body}).encode()
        )
        request.add_header("Content-Type", "application/json")
        with urlopen(request, timeout=120) as response:
            text = response.read().decode()
        if not body.get("stream"):
            return json.loads(text)
        return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]

    def generate(
        self, messages: Sequence[Mapping[str, str]], *, agent: str, rule: str, max_new_tokens: int, **options: Any
    ) -> Output:
        """What `Team.run` asks for."""
        words = {"agent": agent, "rule": rule, **self.said}
        done = self.post(
            "/v1/chat/completions", messages=list(messages), max_tokens=max_new_tokens,
            kv_transfer_params={"kvcomm": words},
        )  # fmt: skip
        of_us = done["kv_transfer_params"]["kvcomm"]
        report = ReuseReport(
            agent, of_us["prompt_tokens"], of_us["reused_tokens"], of_us["computed_tokens"], fallback=of_us["fallback"]
        )
        return Output(done["choices"][0]["message"]["content"].strip(), [], 0.0, report)


def team(workload: str) -> Team:
    return default_team(workload, 4)


def test_teams_answer_as_they_do_densely(server: Any) -> None:
    """Three teams, each once with mode off and once shared: as many right answers but for noise, at high reuse."""
    right = {"off": 0, "on": 0}
    reused = total = same = calls = 0
    for number, workload in enumerate(ROLES):
        task = make_task(random.Random(number), workload, team(workload).agents, documents=5)
        done = {mode: team(workload).run(Client(server.url, {"mode": mode}, mode), task.fields) for mode in right}
        for mode, run in done.items():
            right[mode] += sum(sum(tasks.score(task.items[turn.agent], turn.output.text)) for turn in run.turns)
        for i, (dense, shared) in enumerate(zip(done["off"].turns, done["on"].turns, strict=True)):
            assert dense.output.report.fallback == "mode-off"
            same += dense.output.text == shared.output.text
            calls += 1
            if i:
                reused += shared.output.report.reused_tokens
                total += shared.output.report.prompt_tokens
    assert right["off"] >= 34  # of 36
    assert right["on"] >= right["off"] - 1
    assert same >= calls - 1
    assert reused > 0.7 * total


def test_every_way_to_ask(server: Any) -> None:
    """Completions, chat and responses, streamed and not, read each other's text; the answer is always the same."""
    client, text = (
        Client(server.url, {}),
        " ".join(f"the price of {w} is {i} ." for i, w in enumerate("pears plums figs nuts".split() * 12)),
    )
    ask = {"messages": [{"role": "system", "content": "you are a clerk ."}, {"role": "user", "content": text}]}
    chat = client.post("/v1/chat/completions", max_tokens=8, **ask)
    streamed = client.post("/v1/chat/completions", max_tokens=8, stream=True, **ask)
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in streamed if chunk["choices"])
    assert said == chat["choices"][0]["message"]["content"]
    moved = [{"role": "user", "content": f"well . {text}"}]
    response = client.post("/v1/responses", max_output_tokens=16, input=moved)
    of_us = response["kv_transfer_params"]["kvcomm"]
    assert of_us["reused_tokens"] > 0.8 * of_us["prompt_tokens"]
    assert response["usage"]["input_tokens_details"]["cached_tokens"] >= of_us["reused_tokens"]
    again = client.post("/v1/chat/completions", max_tokens=16, messages=moved, vllm_xargs={"kvcomm_mode": "off"})
    assert again["kv_transfer_params"]["kvcomm"]["fallback"] == "mode-off"
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    completed = client.post("/v1/completions", prompt=f"so {text}", max_tokens=4)
    assert completed["kv_transfer_params"]["kvcomm"]["reused_tokens"] > 0
    other = client.post("/v1/completions", prompt=f"so {text}", max_tokens=4, cache_salt="another tenant")
    assert other["kv_transfer_params"]["kvcomm"]["reused_tokens"] == 0


def test_texts_prefilled_alone(server: Any) -> None:
    """By either way of saying so; whoever reads them next is computed, and learned from."""
    client = Client(server.url, {}, "prefills")
    texts = [
        "".join(f" the {what} of {w} is {i} ." for i, w in enumerate("pears plums figs nuts".split() * 5))
        for what in ("size", "age")
    ]
    done = client.post("/v1/completions", prompt=texts[0], max_tokens=1, kv_transfer_params={"kvcomm": {"prefill": True}})
    assert done["kv_transfer_params"]["kvcomm"]["fallback"] == "prefill"
    done = client.post("/v1/completions", prompt=texts[1], max_tokens=1, vllm_xargs={"kvcomm_prefill": 1})
    assert done["kv_transfer_params"]["kvcomm"]["fallback"] == "prefill"
    for text in texts:
        done = client.post("/v1/completions", prompt=f"report about bob :{text} so", max_tokens=4)
        assert done["kv_transfer_params"]["kvcomm"]["fallback"] == "learning"


def test_counters_beside_vllms_own(server: Any) -> None:
    client = Client(server.url, {})
    text = " ".join(f"the weight of {w} is {i} ." for i, w in enumerate("pears plums figs nuts".split() * 12))
    before = server.counters()
    for start in ("well", "so"):
        client.post("/v1/completions", prompt=f"{start} . {text}", max_tokens=4)
    after = server.counters()
    assert after["kvcomm:requests_total"] == before.get("kvcomm:requests_total", 0) + 2
    rungs = {name: count for name, count in after.items() if name.startswith("kvcomm:reused_tokens_total")}
    assert sum(rungs.values()) > 0
    assert "vllm:prompt_tokens_total" in after
