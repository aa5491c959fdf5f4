"""The pass-through against no pass-through: what the upstream is asked and what the client is answered, byte for byte."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import openai
import pytest

from kvcomm.replay.recording import exchange
from kvcomm.replay.recording.recorder import Recorder

if TYPE_CHECKING:
    from tests.replay.recording.conftest import Seen, Wire

ASKED = {"model": "m", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]}
ODD = (
    b'{ "model":"m",  "messages": [{"role":"user","content":"Caf\\u00e9 \xf0\x9f\x8d\xb5"}], "zz": [1, 1.0, null], "zz": 2 }\n'
)
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
TEA = 'data: {"choices":[{"index":0,"delta":{"content":"Café 🍵"}}]}\n\n'.encode()


def plain(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]).encode() + body


def chunked(*pieces: bytes) -> tuple[bytes, ...]:
    return (SSE + b"\r\n", *(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces), b"0\r\n\r\n")


def post(body: bytes, *headers: str, path: str = "/v1/chat/completions") -> bytes:
    return (f"POST {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n" + "".join(f"{h}\r\n" for h in headers)).encode() + (
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nAccept: */*\r\n\r\n".encode()


CASES: dict[str, tuple[bytes, tuple[bytes, ...]]] = {
    "unknown fields, odd white space, a key given twice": (post(ODD, "Content-Type: application/json"), (plain(ODD),)),
    "headers": (
        post(
            b"{}",
            "Authorization: Bearer sk-secret",
            "X-Two: a",
            "X-Two: b",
            "User-Agent: mine",
            "cOOkie: c=d",
            "Accept-Encoding: br",
        ),
        (plain(b"{}", "Set-Cookie: a=1", "Set-Cookie: b=2", "x-request-id: 7", "Server: mine", "Date: today"),),
    ),
    "no headers of ours": (post(b"{}"), (plain(b"{}"),)),
    "a stream cut inside a character": (post(b'{"stream":true}'), chunked(TEA[:50], TEA[50:51], TEA[51:], b": ping\n\n")),
    "a stream by its end": (post(b"{}"), (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", TEA, TEA)),
    "a request in chunks": (
        get("/v1/responses", "POST")[:-2] + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"inp\r\n9\r\nut":"x"} \r\n0\r\n\r\n',
        (plain(b"{}"),),
    ),
    "a request that waits to be let in": (post(b"{}" * 999, "Expect: 100-continue"), (plain(b"{}"),)),
    "too many requests": (
        post(b"{}"),
        (plain(b'{"error":{"message":"slow"}}', "Retry-After: 7", "x-ratelimit-reset: 1s", status="429 Slow Down"),),
    ),
    "an error that is a page": (post(b"{}"), (plain(b"<h1>Bad Gateway</h1>", "Content-Type: text/html", status="502 Bad"),)),
    "a compressed answer": (
        post(b"{}", "Accept-Encoding: gzip"),
        (plain(gzip.compress(b'{"choices":[]}', mtime=0), "Content-Encoding: gzip"),),
    ),
    "a compressed request": (post(gzip.compress(b"{}", mtime=0), "Content-Encoding: gzip"), (plain(b"{}"),)),
    "elsewhere": (post(b"{}"), (plain(b"", "Location: http://127.0.0.1:9/x", status="307 Temporary Redirect"),)),
    "a path": (get("/v1//models/../a%2Fb%20c/?q=%7E&q=ä".replace("ä", "%E4")), (plain(b"[]"),)),
    "health": (get("/health"), (plain(b""),)),
    "a head": (get("/health", "HEAD"), (b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n",)),
    "nothing": (get("/v1/files/1", "DELETE"), (b"HTTP/1.1 204 No Content\r\n\r\n",)),
    "a method of its own": (get("/cache", "PURGE"), (plain(b"ok"),)),
    "no answer's end": (post(b"{}"), (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", b"only this")),
    "no stream's end": (post(b'{"stream":true}'), chunked(TEA, TEA)[:-1]),
    "a chunk's middle": (post(b'{"stream":true}'), (SSE + b"\r\n", b"ffff\r\n" + TEA)),
}
ABOUT_THE_CONNECTION = {"connection", "transfer-encoding", "content-length", "host", "expect"}


def essence(seen: Seen) -> object:
    """All that is not about one connection; a body that did not end is as good as its bytes."""
    headers = [(k, v) for k, v in seen.headers if k.lower() not in ABOUT_THE_CONNECTION]
    return seen.start, headers, seen.body, seen.whole


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_changed(wire: Wire, name: str) -> None:
    raw, answer = CASES[name]
    upstream = wire.upstream(wire.says(*answer))
    direct = wire.ask(upstream.url, raw)
    through, _ = wire.recorded(upstream, raw)
    assert essence(through) == essence(direct)
    assert through.header("content-length") == direct.header("content-length")
    asked_directly, asked = upstream.seen
    assert essence(asked) == essence(asked_directly)
    assert (asked.header("content-length") or ["0"]) == (asked_directly.header("content-length") or ["0"])
    assert asked.header("host") == [upstream.url.removeprefix("http://")]


def test_pieces_come_as_they_are_sent(wire: Wire) -> None:
    """The upstream sends its next piece only when the client has had the one before."""
    had = [threading.Event() for _ in range(20)]

    def play(request: Seen, connection: socket.socket) -> None:
        connection.sendall(SSE + b"\r\n")
        for number, event in enumerate(had):
            connection.sendall(wire.chunk(b"data: %d" % number))
            assert event.wait(20)
        connection.sendall(b"0\r\n\r\n")

    upstream = wire.upstream(play)
    with wire.passing_through(upstream.url, Recorder(wire.file)) as running:
        host, _, port = running.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(post(b"{}"))
            got = b""
            for number, event in enumerate(had):
                while b"data: %d\r\n" % number not in got:
                    piece = connection.recv(4096)
                    assert piece, got
                    got += piece
                event.set()


def test_credentials_are_passed_and_not_written(wire: Wire) -> None:
    upstream = wire.upstream(wire.json_answer({"choices": []}))
    body = json.dumps(ASKED).encode()
    wire.recorded(
        upstream,
        post(
            body,
            "Authorization: Bearer sk-secret",
            "api-key: sk-secret",
            "Cookie: sk-secret",
            path="/v1/chat/completions?key=sk-secret",
        ),
    )
    assert upstream.seen[0].header("authorization") == ["Bearer sk-secret"]
    assert "secret" not in wire.file.read_text()
    assert "Be brief." in wire.file.read_text()


def test_only_calls_of_a_model_are_written(wire: Wire) -> None:
    upstream = wire.upstream(wire.json_answer({"data": []}))
    with wire.passing_through(upstream.url, Recorder(wire.file)) as running:
        for raw in (get("/v1/models"), get("/health"), post(b"{}", path="/v1/embeddings"), get("/v1/chat/completions")):
            assert wire.ask(running.url, raw).body == b'{"data": []}'
    assert wire.spans(wire.file) == []


# -- what goes wrong --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 2], ids=["while the model thinks", "while it speaks"])
def test_a_client_that_goes_away(wire: Wire, after: int) -> None:
    """The upstream sees its connection end at once, not when it next speaks."""
    thinking, gone = threading.Event(), threading.Event()

    def play(request: Seen, connection: socket.socket) -> None:
        if after:
            connection.sendall(SSE + b"\r\n" + wire.chunk(TEA) * after)
        thinking.set()
        assert connection.recv(1) == b"", "nothing more is asked"
        gone.set()

    upstream = wire.upstream(play)
    with wire.passing_through(upstream.url, Recorder(wire.file)) as running:
        host, _, port = running.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(post(json.dumps(ASKED).encode()))
            assert thinking.wait(20)
            got = b""
            while got.count(TEA) < after:
                got += connection.recv(4096)
        assert gone.wait(20)
    (span,) = wire.spans(wire.file)
    assert span["attributes"]["error.type"] == "client_disconnected"
    assert span["attributes"]["gen_ai.input.messages"][1]["parts"][0]["content"] == "Who?"
    said = span["attributes"].get("gen_ai.output.messages", [])
    assert "".join(part["content"] for message in said for part in message["parts"]) == "Café 🍵" * after


@pytest.mark.parametrize("name", ["no answer's end", "no stream's end", "a chunk's middle"])
def test_an_upstream_that_dies_is_written(wire: Wire, name: str) -> None:
    raw, answer = CASES[name]
    _, (span,) = wire.recorded(wire.upstream(wire.says(*answer)), raw)
    assert span["attributes"]["error.type"] == "upstream_broke_off"
    assert span["status"]["code"] == 2
    assert span["attributes"]["http.response.status_code"] == "200"


@pytest.mark.parametrize("answer", [b"", b"no HTTP at all\r\n\r\n"])
def test_an_upstream_that_does_not_answer(wire: Wire, answer: bytes) -> None:
    seen, (span,) = wire.recorded(wire.upstream(wire.says(answer)), post(json.dumps(ASKED).encode()))
    assert seen.start.split(" ")[1] == "502"
    assert json.loads(seen.body)["error"]["message"].startswith("kvcomm record got no answer from http://127.0.0.1:")
    assert span["attributes"]["error.type"] == "upstream_unreachable"


def test_an_upstream_that_is_not_there(wire: Wire) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    with wire.passing_through(url, Recorder(wire.file)) as running:
        seen = wire.ask(running.url, post(json.dumps(ASKED).encode()))
    assert seen.start.split(" ")[1] == "502"
    (span,) = wire.spans(wire.file)
    assert "Connect call failed" in span["status"]["message"]


def test_a_general_proxys_request_is_refused(wire: Wire) -> None:
    upstream = wire.upstream(wire.json_answer({}))
    answer, written = wire.recorded(upstream, post(b"{}", path="http://elsewhere.example/v1/chat/completions"))
    assert answer.start.split(" ")[1] == "400"
    assert upstream.seen == []
    assert len(written) == 1


def test_a_full_disk_is_the_recorders_alone(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    upstream = wire.upstream(wire.json_answer({"choices": []}))
    direct = wire.ask(upstream.url, post(b"{}"))
    with wire.passing_through(upstream.url, Recorder("/dev/full")) as running:
        answers = [wire.ask(running.url, post(b"{}")) for _ in range(3)]
    assert [essence(answer) for answer in answers] == [essence(direct)] * 3
    assert (running.recorder.written, running.recorder.lost) == (0, 3)
    assert [record.getMessage() for record in caplog.records] == ["recording: /dev/full: No space left on device"]


def test_bodies_too_long_to_keep(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "LIMIT", 1000)
    upstream = wire.upstream(wire.says(plain(b"x" * 5000)))
    answer, (span,) = wire.recorded(upstream, post(json.dumps({**ASKED, "more": "y" * 5000}).encode()))
    assert answer.body == b"x" * 5000
    assert len(upstream.seen[0].body) > 5000
    assert span["attributes"]["kvcomm.record.problem"] == "the request has more than 1000 bytes"
    assert "gen_ai.input.messages" not in span["attributes"]


def test_stopped_while_an_answer_is_under_way(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcomm.replay.recording._proxy.GRACE_S", 0.1)
    thinking, stopped = threading.Event(), threading.Event()

    def play(request: Seen, connection: socket.socket) -> None:
        thinking.set()
        stopped.wait(20)

    upstream = wire.upstream(play)
    with ThreadPoolExecutor(1) as pool:
        with wire.passing_through(upstream.url, Recorder(wire.file)) as running:
            asked = pool.submit(wire.ask, running.url, post(json.dumps(ASKED).encode()))
            assert thinking.wait(20)
        stopped.set()
        assert asked.result().start == ""
    (span,) = wire.spans(wire.file)
    assert span["attributes"]["error.type"] == "recorder_stopped"


# -- many at once, and a client that people use ------------------------------------------------------------------------------


def test_many_at_once(wire: Wire) -> None:
    """Answers do not mix, and every line is whole."""

    def play(request: Seen, connection: socket.socket) -> None:
        asked = json.loads(request.body)
        texts = [f"{asked['session_id']} " for _ in range(20)]
        connection.sendall(SSE + b"\r\n")
        for text in texts:
            event = {"choices": [{"index": 0, "delta": {"content": text}}]}
            connection.sendall(wire.chunk(f"data: {json.dumps(event)}\n\n".encode()))
        connection.sendall(b"0\r\n\r\n")

    upstream = wire.upstream(play)
    with wire.passing_through(upstream.url, Recorder(wire.file)) as running, ThreadPoolExecutor(16) as pool:
        bodies = [json.dumps({**ASKED, "stream": True, "session_id": f"s{n}"}).encode() for n in range(64)]
        answers = list(pool.map(lambda body: wire.ask(running.url, post(body)), bodies))
    assert all(answer.whole for answer in answers)
    found = {s["attributes"]["gen_ai.conversation.id"]: s["attributes"] for s in wire.spans(wire.file)}
    assert len(found) == 64
    assert [a for a in found.values() if "error.type" in a] == []
    for session, attributes in found.items():
        assert attributes["gen_ai.output.messages"][0]["parts"] == [{"type": "text", "content": f"{session} " * 20}]


TOOL = {"type": "function", "function": {"name": "look", "description": "Looks it up.", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}


def test_the_openai_client(wire: Wire) -> None:
    """Chat completions and responses, streamed and not, tools and an error, as the client sees them with and without us."""
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    said: dict[str, Any] = {"id": "r1", "object": "response", "created_at": 1, "model": "m", "status": "completed", "tools": []}
    said |= {"tool_choice": "auto", "parallel_tool_calls": True}
    said["output"] = [
        {"id": "m1", "type": "message", "role": "assistant", "status": "completed"}
        | {"content": [{"type": "output_text", "text": "It is.", "annotations": []}]}
    ]
    completion: dict[str, Any] = {
        "id": "a",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "usage": usage,
        "mine": {"kept": 1},
    }
    completion["choices"] = [
        {"index": 0, "finish_reason": "tool_calls", "message": {"role": "assistant", "content": None, "tool_calls": [CALL]}}
    ]
    piece = {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def play(request: Seen, connection: socket.socket) -> None:
        asked: dict[str, Any] = json.loads(request.body)
        if asked.get("model") == "wrong":
            answer = wire.json_answer({"error": {"message": "no such model", "type": "not_found"}}, "404 Not Found")
        elif "responses" in request.start and asked.get("stream"):
            delta = {"type": "response.output_text.delta", "output_index": 0, "item_id": "m1"}
            deltas = [{**delta, "delta": d} for d in ("It ", "is.")]
            created = {"type": "response.created", "response": {**said, "output": []}}
            answer = wire.stream_answer(created, *deltas, {"type": "response.completed", "response": said})
        elif "responses" in request.start:
            answer = wire.json_answer(said)
        elif asked.get("stream"):
            choices = [{"index": 0, "delta": {"content": text}, "finish_reason": None} for text in ("Yes", "!")]
            answer = wire.stream_answer(*({**piece, "choices": [choice]} for choice in choices), "[DONE]")
        else:
            answer = wire.json_answer(completion)
        answer(request, connection)

    def use(url: str) -> list[object]:
        found: list[object] = []
        with (
            openai.DefaultHttpxClient(headers={"Connection": "close"}) as http,  # this upstream answers once, without saying so
            openai.OpenAI(base_url=f"{url}/v1", api_key="sk-secret", max_retries=0, http_client=http) as client,
        ):
            chat = client.chat.completions
            messages = ASKED["messages"]
            found.append(chat.create(model="m", messages=messages, tools=[TOOL], extra_body={"session_id": "s"}).to_dict())
            found.append([c.to_dict() for c in chat.create(model="m", messages=messages, stream=True)])
            found.append(client.responses.create(model="m", input="Is it?", instructions="Be brief.").to_dict())
            found.append([e.to_dict() for e in client.responses.create(model="m", input="Is it?", stream=True)])
            with pytest.raises(openai.NotFoundError, match="no such model") as error:
                chat.create(model="wrong", messages=messages)
            found.append(error.value.body)
        return found

    upstream = wire.upstream(play)
    with wire.passing_through(upstream.url, Recorder(wire.file)) as running:
        through = use(running.url)
    assert through == use(upstream.url)
    assert "secret" not in wire.file.read_text()
    written = [span["attributes"] for span in wire.spans(wire.file)]
    parts = [[m["parts"] for m in a.get("gen_ai.output.messages", [])] for a in written]
    text = [[{"type": "text", "content": "It is."}]]
    assert parts == [
        [[{"type": "tool_call", "id": "c1", "name": "look", "arguments": '{"at": "it"}'}]],
        [[{"type": "text", "content": "Yes!"}]],
        text,
        text,
        [],
    ]
    assert written[0]["gen_ai.tool.definitions"] == [TOOL]
    assert written[0]["gen_ai.usage.input_tokens"] == "7"
    assert written[2]["gen_ai.system_instructions"] == [{"type": "text", "content": "Be brief."}]
    assert [a["gen_ai.agent.name"] for a in written[:3]] == [written[0]["gen_ai.agent.name"]] * 3, (
        "one system prompt, one agent"
    )
    assert written[4]["error.type"] == "404"
