"""What is made of the bytes that went by: both APIs and completions, streamed and not, names, failures, any shape at all."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.replay.calls import Message
from kvcomm.replay.readers import read_trace
from kvcomm.replay.recording.exchange import Exchange, is_call
from kvcomm.replay.recording.recorder import Recorder
from kvcomm.replay.recording.span import PROBLEM, Record

SECOND = 10**9
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def exchange(
    path: str,
    asked: object,
    said: object = None,
    events: list[Any] | None = None,
    headers: dict[str, str] | None = None,
    status: int = 200,
) -> Exchange:
    made = Exchange(
        "https://model.example:8443", path, headers or {}, started_ns=SECOND, ended_ns=3 * SECOND, first_ns=2 * SECOND
    )
    made.request.add(asked if isinstance(asked, bytes) else json.dumps(asked).encode())
    made.status = status
    if events is None:
        made.answer.add(said if isinstance(said, bytes) else json.dumps(said).encode())
    else:
        made.answer_headers = {"content-type": "text/event-stream"}
        made.answer.add(
            "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events).encode("utf-8", "surrogatepass")
        )
    return made


def only(made: Exchange) -> Record:
    (record,) = made.records("default", None)
    return record


def text(content: str) -> dict[str, str]:
    return {"type": "text", "content": content}


# -- what was asked ---------------------------------------------------------------------------------------------------------

CALLS: list[dict[str, Any]] = [
    {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a":  1}'}},
    {"id": "c2", "type": "custom", "custom": {"name": "run", "input": "x = 1"}},
]
TOOL_CALLS: list[dict[str, Any]] = [
    {"type": "tool_call", "id": "c1", "name": "look", "arguments": '{"a":  1}'},
    {"type": "tool_call", "id": "c2", "name": "run", "arguments": "x = 1"},
]


def test_messages_of_chat() -> None:
    asked = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "name": "clerk",
            "content": [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {}}],
        },
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "c1", "content": "found"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]},
    ]
    record = only(exchange(CHAT, {"model": "m", "messages": asked}, {}))
    assert record.messages == [
        {"role": "system", "parts": [text("Be brief.")]},
        {"role": "user", "parts": [text("Look:"), {"type": "image_url"}], "name": "clerk"},
        {"role": "assistant", "parts": [{"type": "reasoning", "content": "Hm."}, *TOOL_CALLS]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "found"}]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c2", "response": "12"}]},
    ]


def test_messages_of_responses() -> None:
    asked = [
        {"role": "user", "content": "Who?"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Me."}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"a":  1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "found"},
        {"type": "item_reference", "id": "x"},
    ]
    record = only(exchange(RESPONSES, {"model": "m", "instructions": "Be brief.", "input": asked}, {}))
    assert record.instructions == [text("Be brief.")]
    assert record.messages == [
        {"role": "user", "parts": [text("Who?")]},
        {"role": "assistant", "parts": [text("Me.")]},
        {"role": "assistant", "parts": [{"type": "reasoning", "content": "Hm."}]},
        {"role": "assistant", "parts": TOOL_CALLS[:1]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "found"}]},
        {"role": "assistant", "parts": [{"type": "item_reference"}]},
    ]
    assert only(exchange(RESPONSES, {"input": "Who?"}, {})).messages == [{"role": "user", "parts": [text("Who?")]}]


def test_a_batch_of_prompts_is_as_many_calls() -> None:
    said = {
        "choices": [{"index": i, "text": t, "finish_reason": "stop"} for i, t in enumerate("abcd")],
        "usage": {"prompt_tokens": 9},
    }
    first, second = exchange(COMPLETIONS, {"prompt": ["one", "two"], "n": 2}, said).records("default", None)
    assert [m["parts"] for m in first.messages] == [[text("one")]]
    assert [m["parts"] for m in first.answers] == [[text("a")], [text("b")]]
    assert [m["parts"] for m in second.messages] == [[text("two")]]
    assert [m["parts"] for m in second.answers] == [[text("c")], [text("d")]]
    assert "gen_ai.usage.input_tokens" not in first.attributes, "the batch's"
    assert first.operation == "text_completion"
    assert only(exchange(COMPLETIONS, {"prompt": [1, 2, 3]}, {})).messages[0]["parts"] == [{"type": "token_ids"}]
    assert only(exchange(COMPLETIONS, {"prompt": []}, {"choices": [{"text": "a"}]})).answers[0]["parts"] == [text("a")]


# -- what was answered: streamed is as not streamed ---------------------------------------------------------------------------


def pieces(choice: dict[str, Any], *deltas: dict[str, Any], last: dict[str, Any]) -> list[Any]:
    """Chunks of one choice, and one with its end."""
    chunks: list[Any] = [{"id": "a", "model": "m", "choices": [{**choice, "delta": d, "finish_reason": None}]} for d in deltas]
    return [*chunks, {"id": "a", "model": "m", "choices": [{**choice, "delta": {}, **last}]}]


def test_a_streamed_chat_answer_is_the_whole_one() -> None:
    message = {"role": "assistant", "reasoning_content": "Hm so.", "content": "Café 🍵.", "tool_calls": CALLS}
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    other = {"message": {"role": "assistant", "refusal": "No."}, "finish_reason": "stop"}
    whole = {"id": "a", "model": "m", "usage": usage, "choices": [{"message": message, "finish_reason": "tool_calls"}, other]}
    cut: list[dict[str, Any]] = [
        {"index": i, **{k: {**v, "arguments": ""} if k == "function" else v for k, v in c.items()}} for i, c in enumerate(CALLS)
    ]
    cut[1]["custom"] = {"name": "run", "input": ""}
    events = [
        *pieces(
            {"index": 0},
            {"role": "assistant", "content": ""},
            {"reasoning_content": "Hm "},
            {"reasoning_content": "so."},
            {"content": "Café "},
            {"content": "🍵."},
            {"tool_calls": [cut[0]]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}, cut[1]]},
            {"tool_calls": [{"index": 1, "custom": {"input": "x = 1"}}, {"index": 0, "function": {"arguments": "  1}"}}]},
            last={"finish_reason": "tool_calls"},
        ),
        *pieces({"index": 1}, {"role": "assistant", "refusal": "N"}, {"refusal": "o."}, last={"finish_reason": "stop"}),
        {"id": "a", "choices": [], "usage": usage},
        "[DONE]",
    ]
    at_once, streamed = only(exchange(CHAT, {}, whole)), only(exchange(CHAT, {}, events=events))
    assert at_once.answers == [
        {
            "role": "assistant",
            "parts": [{"type": "reasoning", "content": "Hm so."}, text("Café 🍵."), *TOOL_CALLS],
            "finish_reason": "tool_calls",
        },
        {"role": "assistant", "parts": [text("No.")], "finish_reason": "stop"},
    ]
    assert streamed.answers == at_once.answers
    assert streamed.attributes == at_once.attributes
    assert at_once.attributes["gen_ai.usage.cache_read.input_tokens"] == 4


def test_a_streamed_completion_is_the_whole_one() -> None:
    whole = {"choices": [{"index": 0, "text": "one two", "finish_reason": "length"}]}
    events = [{"choices": [{"index": 0, "text": t, "finish_reason": f}]} for t, f in (("one", None), (" two", "length"))]
    assert only(exchange(COMPLETIONS, {}, events=events)).answers == only(exchange(COMPLETIONS, {}, whole)).answers


ITEMS: list[dict[str, Any]] = [
    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm so."}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Café 🍵."}]},
    {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"a":  1}'},
]


def streamed_items() -> list[Any]:
    def delta(at: int, kind: str, *texts: str) -> list[Any]:
        return [{"type": f"response.{kind}.delta", "output_index": at, "delta": t} for t in texts]

    call = {**ITEMS[2], "arguments": ""}
    return [
        {"type": "response.created", "response": {"id": "r", "model": "m", "status": "in_progress", "output": []}},
        *delta(0, "reasoning_text", "Hm ", "so."),
        {"type": "response.output_item.added", "output_index": 1, "item": {"type": "message", "content": []}},
        *delta(1, "output_text", "Café ", "🍵."),
        {"type": "response.output_item.done", "output_index": 1, "item": ITEMS[1]},
        {"type": "response.output_item.added", "output_index": 2, "item": call},
        *delta(2, "function_call_arguments", '{"a":', "  1}"),
    ]


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "cut"])
def test_a_streamed_response_is_the_whole_one(ended: bool) -> None:
    usage = {"input_tokens": 7, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 4}}
    whole = {"id": "r", "model": "m", "status": "completed", "output": ITEMS, "usage": usage}
    end = [{"type": "response.completed", "response": whole}] if ended else []
    at_once, streamed = only(exchange(RESPONSES, {}, whole)), only(exchange(RESPONSES, {}, events=streamed_items() + end))
    parts = [{"type": "reasoning", "content": "Hm so."}, text("Café 🍵."), TOOL_CALLS[0]]
    assert at_once.answers == [{"role": "assistant", "parts": parts, "finish_reason": "stop"}]
    assert streamed.answers == ([{**at_once.answers[0]}] if ended else [{**at_once.answers[0], "finish_reason": "in_progress"}])
    assert not ended or streamed.attributes == at_once.attributes


def test_a_response_that_stopped_early() -> None:
    said = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": ITEMS[1:2]}
    assert only(exchange(RESPONSES, {}, said)).answers[0]["finish_reason"] == "max_output_tokens"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_bodies_are_read(encoding: str) -> None:
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    made = exchange(CHAT, pack(b'{"model":"m"}'), pack(b'{"id":"a"}'), headers={"content-encoding": encoding})
    made.answer_headers = {"content-encoding": encoding}
    record = only(made)
    assert (record.model, record.attributes["gen_ai.response.id"]) == ("m", "a")
    assert PROBLEM not in record.attributes


# -- read again ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_what_was_written_is_read_again(tmp_path: Path, streamed: bool) -> None:
    """Through `read_trace`: the calls of both APIs, their sessions, agents and words."""
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?", "name": "clerk"}]
    message = {"role": "assistant", "content": "Me.", "tool_calls": CALLS[:1]}
    whole = {"choices": [{"message": message}]}
    events = pieces({"index": 0}, {"content": "M"}, {"content": "e."}, {"tool_calls": [{"index": 0, **CALLS[0]}]}, last={})
    chat = exchange(CHAT, {"messages": asked, "session_id": "s"}, whole, events if streamed else None)
    response = {"status": "completed", "output": ITEMS[1:]}
    asked_again = {"instructions": "Be brief.", "input": "Who?", "session_id": "s"}
    responses = exchange(RESPONSES, asked_again, response, streamed_items()[3:] if streamed else None)
    responses.started_ns += SECOND
    with Recorder(tmp_path / "t.jsonl") as recorder:
        recorder.add(lambda: chat.records("default", None))
        recorder.add(lambda: responses.records("default", None))
    first, second = read_trace(tmp_path / "t.jsonl", strict=True)
    system = Message("system", "Be brief.")
    assert first.messages == (system, Message("user", "Who?", "clerk"))
    assert second.messages == (system, Message("user", "Who?"))
    call = '{"name": "look", "arguments": {"a": 1}}'
    assert (first.output, second.output) == (f"Me.\n{call}", f"Café 🍵.\n{call}")
    assert first.agent == second.agent
    assert (first.session, first.started, first.ended, second.started) == ("s", 1.0, 3.0, 2.0)


# -- the rest of a span -----------------------------------------------------------------------------------------------------


def test_settings_usage_and_times() -> None:
    asked = {"model": "m", "temperature": 0, "top_p": 0.5, "max_completion_tokens": 9, "seed": 3, "n": True, "stream": True}
    record = only(exchange(CHAT, asked, {"id": "a", "model": "m-1", "usage": {"prompt_tokens": 0, "completion_tokens": 2.0}}))
    assert record.attributes == {
        "gen_ai.provider.name": "openai",
        "server.address": "model.example",
        "server.port": 8443,
        "url.path": CHAT,
        "http.response.status_code": 200,
        "gen_ai.response.id": "a",
        "gen_ai.response.model": "m-1",
        "gen_ai.request.stream": True,
        "gen_ai.request.temperature": 0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.seed": 3,
        "gen_ai.usage.input_tokens": 0,
        "gen_ai.usage.output_tokens": 2.0,
        "gen_ai.response.time_to_first_chunk": 1.0,
    }
    assert (record.operation, record.model, record.started_ns, record.ended_ns) == ("chat", "m", SECOND, 3 * SECOND)


@pytest.mark.parametrize(
    ("said", "status", "failed"),
    [
        ({"error": {"message": "slow down", "type": "rate"}}, 429, ("429", "slow down")),
        ({"object": "error", "message": "too long", "code": 400}, 400, ("400", "too long")),
        (b"<h1>Bad Gateway</h1>", 502, ("502", "")),
        ({"error": "no model"}, 404, ("404", "no model")),
        ({"error": {"message": "on fire", "type": "server_error"}}, 200, ("server_error", "on fire")),
        ({"error": None}, 200, ("", "")),
    ],
)
def test_failures(said: object, status: int, failed: tuple[str, str]) -> None:
    record = only(exchange(CHAT, {}, said, status=status))
    assert (record.error, record.reason) == failed


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_failure_inside_a_stream(path: str) -> None:
    record = only(exchange(path, {}, events=[{"error": {"message": "on fire", "type": "server_error"}}]))
    assert (record.error, record.reason) == ("server_error", "on fire")


@pytest.mark.parametrize(
    ("path", "asked", "headers", "says"),
    [
        (CHAT, b"{", {}, "the request is not JSON"),
        (CHAT, b"[" * 100_000, {}, "the request is not JSON"),
        (CHAT, b"\xff\xfe", {}, "the request is not JSON"),
        (CHAT, [1], {}, "the request is not a JSON object"),
        (CHAT, {}, {"content-encoding": "br"}, "the request is encoded as br, which is not read here"),
        (CHAT, {}, {"content-encoding": "gzip"}, "the request is not the gzip that it says it is"),
        (RESPONSES, {"previous_response_id": "r"}, {}, "previous_response_id: the earlier turns are the server's"),
    ],
)
def test_what_cannot_be_read_is_said(path: str, asked: object, headers: dict[str, str], says: str) -> None:
    problem = only(exchange(path, asked, {}, headers=headers)).attributes[PROBLEM]
    assert isinstance(problem, str)
    assert problem.startswith(says)


KEYS = (
    "role content name type text id index delta message choices tool_calls function arguments error usage input output prompt "
    "messages model tools session_id conversation kv_transfer_params vllm_xargs item response call_id".split()
)
json_values = st.recursive(
    st.sampled_from([None, True, 0, -1, 10**30, 1.5, float("nan"), float("inf"), "", "text", "message", "stop", "\ud800"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


@given(
    path=st.sampled_from([CHAT, COMPLETIONS, RESPONSES]),
    asked=st.dictionaries(st.sampled_from("messages prompt input tools model instructions stop".split()), json_values),
    said=st.dictionaries(st.sampled_from("choices output usage error id status type response delta item".split()), json_values),
    streamed=st.booleans(),
    status=st.sampled_from([200, 400]),
)
def test_bodies_of_any_shape(path: str, asked: Any, said: Any, streamed: bool, status: int) -> None:
    """Whatever is sent, there is a record, and a line of JSON for it."""
    said_again = {"type": "response.output_item.done", "output_index": 0, **said}
    made = exchange(path, asked, said, [said, said_again] if streamed else None, status=status)
    for record in made.records("default", None):
        assert json.loads(record.redacted(str.upper).line())["resourceSpans"]


# -- names ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "headers", "session"),
    [
        ({}, {}, "default"),
        ({"user": "u", "session_id": ""}, {}, "default"),
        ({}, {"x-correlation-id": "c"}, "c"),
        ({}, {"x-correlation-id": "c", "x-session-id": "s"}, "s"),
        ({"conversation": {"id": "v"}}, {"x-session-id": "s"}, "v"),
        ({"conversation": "v", "session_id": 7}, {"x-session-id": "s"}, "7"),
        ({"session_id": "b"}, {"x-mine": "own"}, "own"),
    ],
)
def test_sessions(asked: dict[str, Any], headers: dict[str, str], session: str) -> None:
    (record,) = exchange(CHAT, asked, {}, headers=headers).records("default", "X-Mine")
    assert record.session == session


def test_agents() -> None:
    system = {"role": "system", "content": "You are the critic."}
    said: dict[str, Any] = {
        "messages": [{**system, "name": "n"}],
        "kv_transfer_params": {"kvcomm": {"agent": "k"}},
        "vllm_xargs": {"kvcomm_agent": "x"},
    }

    def agent(path: str = CHAT, **asked: Any) -> str:
        return only(exchange(path, asked, {})).agent

    assert agent(**said) == "k"
    assert agent(**{**said, "kv_transfer_params": {"kvcomm": "off"}}) == "x"
    assert agent(messages=[{**system, "name": "n"}]) == "n"
    made = agent(messages=[system, {"role": "user", "content": "Who?", "name": "clerk"}])
    assert (
        made
        == agent(messages=[system, {"role": "user", "content": "Why?"}])
        == agent(RESPONSES, instructions=system["content"])
    )
    assert made == "agent-17e17439", "the same in every run"
    assert made != agent(messages=[{**system, "content": "You are the judge."}])
    assert agent(messages=[{"role": "user", "content": "Who?"}]) == agent(RESPONSES, input="Who?") == "agent"


def test_which_requests_are_calls() -> None:
    calls = (CHAT, COMPLETIONS, RESPONSES, "/openai/deployments/d/chat/completions?api-version=1", "/chat/completions/")
    assert all(is_call("POST", path) for path in calls)
    others = (*(("GET", path) for path in calls), ("POST", "/v1/embeddings"), ("POST", "/v1/responses/r/cancel"), ("POST", "/"))
    assert not any(is_call(method, path) for method, path in others)
