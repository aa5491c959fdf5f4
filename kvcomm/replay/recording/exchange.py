"""One HTTP request and its answer, as their bytes went by, and the calls of a model that they were.

Nothing is read before the answer has ended. Request headers serve to find the session and are not written. Knows the paths
and bodies of the OpenAI API, and nothing of sockets.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from kvcomm.replay.recording import chat, names, responses
from kvcomm.replay.recording.shapes import number, sequence, table, text
from kvcomm.replay.recording.span import PROBLEM, Attribute, Record
from kvcomm.replay.recording.sse import events

__all__ = ["LIMIT", "Copy", "Exchange", "is_call"]

LIMIT = 64 << 20  # bytes of one body; a call with more is written without its text
APIS = ("chat/completions", "completions", "responses")  # how paths end, whatever is in front
SETTINGS = {  # of the request; numbers alone
    "frequency_penalty": "frequency_penalty",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_tokens": "max_tokens",
    "n": "choice.count",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}


def is_call(method: str, path: str) -> bool:
    """Whether a request asks a model in a way that is recorded."""
    return method == "POST" and _api(path) is not None


class Copy:
    """The bytes of a body, up to LIMIT."""

    def __init__(self) -> None:
        self.data, self.over = bytearray(), False

    def add(self, piece: bytes) -> None:
        self.over = self.over or len(self.data) + len(piece) > LIMIT
        if self.over:
            self.data.clear()
        else:
            self.data += piece


@dataclass
class Exchange:
    """Filled in while it goes on."""

    upstream: str
    path: str
    headers: Mapping[str, str]  # of the request, by lower-case name
    started_ns: int
    request: Copy = field(default_factory=Copy)
    answer: Copy = field(default_factory=Copy)
    status: int | None = None  # None: there was no answer
    answer_headers: Mapping[str, str] = field(default_factory=dict)
    first_ns: int | None = None  # the first byte of the answer's body
    ended_ns: int = 0
    error: str = ""  # what kept the answer from ending well, in one word
    reason: str = ""

    @property
    def api(self) -> str:
        return _api(self.path) or "chat/completions"

    def records(self, default_session: str, session_header: str | None) -> list[Record]:
        """The calls; one, but for a batch of prompts."""
        asked, problem = _json(self.request, self.headers.get("content-encoding", ""), "request")
        said, trouble = self._answer()
        instructions: list[dict[str, Any]] = []
        if self.api == "responses":
            batch, answers = [responses.messages(asked.get("input"))], responses.answers(said)
            instructions = chat.parts(asked.get("instructions"))
            if asked.get("previous_response_id"):
                problem = problem or "previous_response_id: the earlier turns are the server's, and not in this record"
        else:
            answers = chat.answers(said.get("choices"))
            messages = [chat.message(m) for m in map(table, sequence(asked.get("messages")))]
            batch = [messages] if self.api == "chat/completions" else chat.prompts(asked.get("prompt"))
        each = len(answers) // len(batch)
        attributes = self._attributes(asked, said, len(batch))
        if problem or trouble:
            attributes[PROBLEM] = problem or trouble
        error, reason = self._failure(said)
        return [
            Record(
                operation="text_completion" if self.api == "completions" else "chat",
                session=names.session(asked, self.headers, session_header, default_session),
                agent=names.agent(asked, messages),
                started_ns=self.started_ns,
                ended_ns=self.ended_ns,
                model=text(asked.get("model")),
                instructions=instructions,
                messages=messages,
                answers=answers[at * each : (at + 1) * each],
                tools=sequence(asked.get("tools")),
                attributes=attributes,
                error=error,
                reason=reason,
            )
            for at, messages in enumerate(batch)
        ]

    def _answer(self) -> tuple[dict[str, Any], str]:
        """The answer in the shape of one that was not streamed, and why that is not possible."""
        encoding = self.answer_headers.get("content-encoding", "")
        if "event-stream" in self.answer_headers.get("content-type", ""):
            body, problem = _plain(self.answer, encoding, "answer")
            return (responses if self.api == "responses" else chat).whole(events(body)), problem
        if not self.answer.data and not self.answer.over:
            return {}, ""
        return _json(self.answer, encoding, "answer")

    def _failure(self, said: Mapping[str, Any]) -> tuple[str, str]:
        """What kind of failure, and in words."""
        told = said.get("error") or (said if self.status is not None and self.status >= 400 else None)
        words = text(told) or text(table(told).get("message"))
        if self.error:
            return self.error, self.reason or words
        if self.status is not None and self.status >= 400:
            return str(self.status), words
        return (text(table(told).get("type")) or text(table(told).get("code")) or "error", words) if told else ("", "")

    def _attributes(self, asked: Mapping[str, Any], said: Mapping[str, Any], batch: int) -> dict[str, Attribute]:
        place = urlsplit(self.upstream)
        found: dict[str, Attribute | None] = {
            "gen_ai.provider.name": "openai",  # whose API it is, not whose server
            "server.address": place.hostname,
            "server.port": place.port,
            "url.path": self.path.partition("?")[0],
            "http.response.status_code": self.status,
            "gen_ai.response.id": text(said.get("id")),
            "gen_ai.response.model": text(said.get("model")),
            "gen_ai.request.stream": asked.get("stream") is True or None,
        }
        for name, attribute in SETTINGS.items():
            if (value := number(asked.get(name))) is not None:
                found[f"gen_ai.request.{attribute}"] = value
        usage = table(said.get("usage")) if batch == 1 else {}
        for name, old in {"input_tokens": "prompt_tokens", "output_tokens": "completion_tokens"}.items():
            found[f"gen_ai.usage.{name}"] = number(usage.get(name, usage.get(old)))
        details = table(usage.get("prompt_tokens_details")) or table(usage.get("input_tokens_details"))
        found["gen_ai.usage.cache_read.input_tokens"] = number(details.get("cached_tokens"))
        if self.first_ns is not None:
            found["gen_ai.response.time_to_first_chunk"] = (self.first_ns - self.started_ns) / 1e9
        return {key: value for key, value in found.items() if value is not None and value != ""}


def _api(path: str) -> str | None:
    ends = path.partition("?")[0].rstrip("/")
    return next((api for api in APIS if ends.endswith(f"/{api}")), None)


def _json(copy: Copy, encoding: str, what: str) -> tuple[dict[str, Any], str]:
    """The object that a body is, and why it is none."""
    body, problem = _plain(copy, encoding, what)
    if problem:
        return {}, problem
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}, f"the {what} is not JSON"
    return (found, "") if isinstance(found, dict) else ({}, f"the {what} is not a JSON object")


def _plain(copy: Copy, encoding: str, what: str) -> tuple[bytes, str]:
    """A body without its content encoding, and why that is not possible. A body that was cut gives what there is of it."""
    if copy.over:
        return b"", f"the {what} has more than {LIMIT} bytes"
    match encoding.strip().lower():
        case "" | "identity":
            return bytes(copy.data), ""
        case "gzip" | "x-gzip" | "deflate":
            try:
                return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(copy.data, LIMIT), ""
            except zlib.error:
                return b"", f"the {what} is not the {encoding} that it says it is"
        case _:
            return b"", f"the {what} is encoded as {encoding}, which is not read here"
