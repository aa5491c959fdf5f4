"""One call per object, with its messages: written by hand, by AIPerf, or in Mooncake's format with `messages`.

    {"session_id": "s", "agent": "critic", "messages": [{"role": "user", "content": "..."}], "output": "...", "timestamp": 0}

`timestamp` is milliseconds or an ISO 8601 time. AIPerf has no agents: a session id "run#critic" is taken apart. With
`message_mode: delta` (later `assistant_responses: live`) only a turn's new messages are in the file; they are put behind those
of the turns before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from kvcomm.replay.calls import Call, Message
from kvcomm.replay.readers.base import BadRecord, NoText, Record
from kvcomm.replay.readers.content import decoded, message, messages, name_in, seconds, text

__all__ = ["Jsonl"]

PROMPT = ("messages", "prompt", "text_input", "payload")
TURNS = 4096  # sessions of which the turns so far are remembered, for those that record only what is new


class Jsonl:
    name = "jsonl"

    def __init__(self) -> None:
        self._turns: OrderedDict[str, tuple[Message, ...]] = OrderedDict()

    def fits(self, record: Record) -> bool:
        return any(k in record for k in PROMPT) or "hash_ids" in record or {"input_length", "output_length"} <= record.keys()

    def read(self, record: Record, where: str) -> Sequence[Call]:
        prompt = _prompt(record)
        said, answered = _output(record)
        session = name_in(record, "session_id", "session", "conversation_id")
        if record.get("message_mode") == "delta" or record.get("assistant_responses") == "live":
            prompt = self._turns.pop(session, ()) + prompt
            self._turns[session] = (*prompt, Message("assistant", said)) if answered else prompt
            if len(self._turns) > TURNS:
                self._turns.popitem(last=False)
        agent, length = name_in(record, "agent", "agent_name"), record.get("output_length")
        if not agent and "#" in session:
            session, agent = session.rsplit("#", 1)
        return [
            Call(
                session=session or "all",
                agent=agent,
                messages=prompt,
                output=said,
                answered=answered,
                id=name_in(record, "id", "call_id", "call_index"),
                started=seconds(record.get("timestamp"), 1e-3),
                where=where,
                extra={"model": name_in(record, "model"), **({"output_length": length} if isinstance(length, int) else {})},
            )
        ]


def _prompt(record: Record) -> tuple[Message, ...]:
    key = next((k for k in PROMPT if record.get(k) is not None), None)
    if key is None:
        if any(k in record for k in PROMPT):
            raise BadRecord("messages is missing")
        raise NoText(
            "this trace has no text (hash_ids or lengths only): it shows equal prefixes, but nothing that stands elsewhere "
            "in a prompt. Record messages: kvcomm record, or AIPerf's format with messages"
        )
    value: Any = record[key]
    if key == "payload":
        value = value.get("messages") if isinstance(value, dict) else None
    if key in ("prompt", "text_input") and isinstance(value, str):
        return (message(value, key),)
    found = messages(value, key)
    if not found:
        raise BadRecord(f"{key} is empty")
    return found


def _output(record: Record) -> tuple[str, bool]:
    """What was answered, and whether the record says so."""
    value = next((record[k] for k in ("output", "response", "completion") if record.get(k) is not None), None)
    if value is None:
        return "", False
    if isinstance(value, str):
        return text(value), True
    value = decoded(value)
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        return "\n".join(m.content for m in messages(value, "output")), True
    if isinstance(value, dict):
        return message({"role": "assistant", **value}, "output").content, True
    raise BadRecord(f"output is a {type(value).__name__}, not text")
