"""Chat completions and completions: what was asked and answered, as messages of the semantic conventions.

A streamed answer is put together into the shape of one that was not. Unknown kinds of content (images, audio) are kept as
their type alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvcomm.replay.recording.shapes import sequence, table, text

__all__ = ["answers", "message", "parts", "prompts", "whole"]

TEXTS = ("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text")
THOUGHTS = ("reasoning_content", "reasoning")  # two names that servers have for it


def message(given: Mapping[str, Any]) -> dict[str, Any]:
    """One message of a prompt, or the message of a choice."""
    role = text(given.get("role")) or "assistant"
    found = parts(given.get("content"))
    if role in ("tool", "function"):
        heard = "".join(part["content"] for part in found if part["type"] == "text")
        found = [{"type": "tool_call_response", "id": text(given.get("tool_call_id")), "response": heard}]
    thoughts = next((text(given[name]) for name in THOUGHTS if text(given.get(name))), "")
    found = [{"type": "reasoning", "content": thoughts}, *found] if thoughts else found
    found += parts(given.get("refusal"))
    found += [_call(call) for call in sequence(given.get("tool_calls"))]
    if legacy := table(given.get("function_call")):
        found.append(_call({"function": legacy}))
    name = text(given.get("name"))
    return {"role": role, "parts": found, **({"name": name} if name else {})}


def parts(content: object) -> list[dict[str, Any]]:
    """The parts of a message's content, which is a text or a list."""
    if isinstance(content, str):
        return [{"type": "text", "content": content}]
    found = []
    for part in sequence(content):
        kind = text(table(part).get("type"))
        if isinstance(part, str):
            found.append({"type": "text", "content": part})
        elif kind in TEXTS:
            found.append({"type": "text", "content": text(part.get("text")) or text(part.get("refusal"))})
        else:
            found.append({"type": kind or "unknown"})
    return found


def prompts(prompt: object) -> list[list[dict[str, Any]]]:
    """The prompts of a completions request, each as the messages it is; token ids are no text and stay away."""
    batch = isinstance(prompt, list) and prompt and all(isinstance(item, str | list) for item in prompt)
    several = sequence(prompt) if batch else [prompt]
    return [[{"role": "user", "parts": parts(one if isinstance(one, str) else [{"type": "token_ids"}])}] for one in several]


def answers(choices: object) -> list[dict[str, Any]]:
    """One message per choice, of either API."""
    found = []
    for choice in map(table, sequence(choices)):
        said = table(choice.get("message")) or {"content": choice.get("text")}
        reason = text(choice.get("finish_reason"))
        found.append({**message({"role": "assistant", **said}), **({"finish_reason": reason} if reason else {})})
    return found


def whole(chunks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The answer that was streamed in these; `error` where one of them says so."""
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        answer |= {key: chunk[key] for key in ("id", "model", "usage", "error") if chunk.get(key)}
        for choice in map(table, sequence(chunk.get("choices"))):
            into = choices.setdefault(_index(choice), {})
            if choice.get("finish_reason"):
                into["finish_reason"] = choice["finish_reason"]
            if text(choice.get("text")):
                into["text"] = into.get("text", "") + choice["text"]
            if delta := table(choice.get("delta")):
                _add(into.setdefault("message", {}), delta)
    return {**answer, "choices": [choices[index] for index in sorted(choices)]}


def _add(said: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for key in ("content", "refusal", *THOUGHTS):
        if text(delta.get(key)):
            said[key] = said.get(key, "") + delta[key]
    if text(delta.get("role")):
        said["role"] = delta["role"]
    for call in map(table, sequence(delta.get("tool_calls"))):
        calls = said.setdefault("tool_calls", [])
        at = _index(call)
        if not (into := next((known for known in calls if known["index"] == at), None)):
            calls.append(into := {"index": at})
        into |= {key: call[key] for key in ("id", "type") if text(call.get(key))}
        for kind in ("function", "custom"):
            _join(into, kind, table(call.get(kind)))
    _join(said, "function_call", table(delta.get("function_call")))


def _join(into: dict[str, Any], kind: str, pieces: Mapping[str, Any]) -> None:
    for key, piece in pieces.items():
        if text(piece):
            known = into.setdefault(kind, {})
            known[key] = known.get(key, "") + piece


def _call(call: object) -> dict[str, Any]:
    """A tool call; its arguments stay the text that the model wrote."""
    given = table(call)
    asked = table(given.get("function")) or table(given.get("custom"))
    wrote = text(asked.get("arguments")) or text(asked.get("input"))
    return {"type": "tool_call", "id": text(given.get("id")), "name": text(asked.get("name")), "arguments": wrote}


def _index(given: Mapping[str, Any]) -> int:
    return index if isinstance(index := given.get("index"), int) else 0
