"""Real clients, unmodified, against `kvcomm vllm`: they say what they say densely, and read each other's text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

EXAMPLES = Path(__file__).parents[2] / "examples" / "vllm"
DOCUMENTS = (
    "report about bob : city is oslo . pet is cat . food is rice . the old river waits slowly . "
    "report about carol : city is lima . boss is bob . the small market opens early . color is blue . "
    "report about dan : pet is owl . the busy train moves again . boss is carol . food is soup . "
    "report about erin : city is rome . color is red . the warm garden rests today . code is 4 2 ."
)


def run(example: str, server: Any, *options: str) -> list[str]:
    """What an example prints, run as a person runs it."""
    env = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{example}.py"), *options],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(("example", "needs"), [("openai_client", "openai"), ("langgraph_supervisor", "langgraph")])
def test_agents_behind_the_first_find_its_text(server: Any, example: str, needs: str) -> None:
    pytest.importorskip(needs)
    before = server.reused()
    assert "city of bob is oslo so note a is oslo ." in "\n".join(run(example, server))
    assert server.reused() > before + 60


@pytest.mark.parametrize("api", ["responses", "chat_completions"])
def test_openai_agents_hand_off_and_call_each_other(server: Any, api: str) -> None:
    """Planner, judge and clerk read the same documents behind different instructions: first densely, then shared. The judge
    got the conversation by a handoff; what the clerk says as its tool is in nobody's documents.
    """
    pytest.importorskip("agents")
    start = server.reused()
    dense = run("openai_agents", server, "--api", api, "--mode", "off", "--tenant", f"{api} off")
    assert server.reused() == start
    shared = run("openai_agents", server, "--api", api, "--tenant", f"{api} on")
    cached = r" +\((\d+) of (\d+) cached\)$"
    assert [re.sub(cached, "", line) for line in shared] == [re.sub(cached, "", line) for line in dense]
    assert [re.sub(cached, "", line) for line in shared] == [
        "planner  transfer_to_judge {}",
        'judge    ask_clerk {"question":" note a : city of bob ?"}',
        "clerk    city of bob is oslo so note a is oslo .",
        "judge    note a is oslo . color of erin is red .",
        "the judge's answer: note a is oslo . color of erin is red .",
    ]
    shares = {
        arm: [int(hit[1]) / int(hit[2]) for line in lines if (hit := re.search(cached, line))]
        for arm, lines in (("dense", dense), ("shared", shared))
    }
    assert shares["dense"][:3] == [0, 0, 0], "an exact prefix cache finds nothing in another agent's prompt"
    assert shares["shared"][0] == 0
    assert min(shares["shared"][1:3]) > 0.7
    assert server.reused() > start + 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", ["responses", "chat_completions"])
def test_openai_client(server: Any, api: str, stream: bool) -> None:
    """Two agents ask about the same documents, densely and shared: the same answers, and the second one finds them known."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def ask(mode: str, agent: str, question: str) -> tuple[str, int]:
        """The answer, and how much of the prompt was there already."""
        said = {"kvcomm": {"agent": agent, "mode": mode}}
        common: dict[str, Any] = {
            "model": "tiny", "temperature": 0, "stream": stream,
            "extra_body": {"kv_transfer_params": said, "cache_salt": f"{api} {stream} {mode}"},
        }  # fmt: skip
        role = f"you are the {agent} , a careful agent of the team . your style is plain . use only what is said below ."
        text = f"{DOCUMENTS} questions : {question} now write the final answer in the style of your role only ."
        if api == "responses":
            done = client.responses.create(instructions=role, input=text, max_output_tokens=32, **common)
            if stream:
                events = list(done)
                spoken = "".join(event.delta for event in events if event.type == "response.output_text.delta")
                done = events[-1].response
                assert spoken == done.output_text
            of_us = done.model_extra["kv_transfer_params"]["kvcomm"]
            assert (of_us["agent"], of_us["fallback"] == "mode-off") == (agent, mode == "off")
            return done.output_text.strip(), done.usage.input_tokens_details.cached_tokens
        messages: Any = [{"role": "system", "content": role}, {"role": "user", "content": text}]
        if not stream:
            done = client.chat.completions.create(messages=messages, max_tokens=32, **common)
            of_us = done.model_extra["kv_transfer_params"]["kvcomm"]
            assert (of_us["agent"], of_us["fallback"] == "mode-off") == (agent, mode == "off")
            return done.choices[0].message.content.strip(), done.usage.prompt_tokens_details.cached_tokens
        usage = {"include_usage": True}
        *chunks, last = client.chat.completions.create(messages=messages, max_tokens=32, stream_options=usage, **common)
        spoken = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return spoken.strip(), last.usage.prompt_tokens_details.cached_tokens

    team = {"scout": "note a : city of bob ?", "critic": "food of dan ? color of erin ?"}
    said = {mode: [ask(mode, agent, question) for agent, question in team.items()] for mode in ("off", "on")}
    answers = ["city of bob is oslo so note a is oslo .", "food of dan is soup . color of erin is red ."]
    assert [[answer for answer, _ in turns] for turns in said.values()] == [answers, answers]
    assert [cached for _, cached in said["off"]] == [0, 0]
    assert said["on"][0][1] == 0
    assert said["on"][1][1] > 100
