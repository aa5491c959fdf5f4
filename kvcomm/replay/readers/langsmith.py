"""LangSmith's export of runs: inputs.messages in LangChain's own serialisation or OpenAI's, outputs.generations or a message.

Runs of chains and tools are no calls, but a chain that LangGraph ran as a node names the agent of the calls inside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvcomm.replay.calls import Call, Message
from kvcomm.replay.readers.base import Around, BadRecord, Record
from kvcomm.replay.readers.content import decoded, message, messages, name_in, seconds

__all__ = ["LangSmith"]

AGENT = ("agent_name", "lc_agent_name", "langgraph_node", "agent")
SESSION = ("session_id", "conversation_id", "thread_id")  # of the metadata; a run's own session_id is the project's


class LangSmith:
    name = "langsmith"

    def fits(self, record: Record) -> bool:
        return "run_type" in record

    def read(self, record: Record, where: str) -> Sequence[Call | Around]:
        extra = record.get("extra")
        about = extra.get("metadata") if isinstance(extra, Mapping) else None
        metadata: Mapping[str, Any] = about if isinstance(about, Mapping) else {}
        id_, trace = name_in(record, "id", "run_id"), name_in(record, "trace_id", "id")
        parent = name_in(record, "parent_run_id") or None
        agent, session = name_in(metadata, *AGENT), name_in(metadata, *SESSION)
        if record["run_type"] != "llm":
            return [Around(trace, id_, parent, session, agent)]
        answer = _output(decoded(record.get("outputs")))
        call = Call(
            session=session,
            agent=agent,
            messages=_input(decoded(record.get("inputs"))),
            output=answer or "",
            answered=answer is not None,
            id=id_,
            parent=parent,
            started=seconds(record.get("start_time")),
            ended=seconds(record.get("end_time")),
            where=where,
            extra={"trace": trace, "model": name_in(metadata, "ls_model_name")},
        )
        return [call, Around(trace, id_, parent, session, agent)]


def _input(inputs: Any) -> tuple[Message, ...]:
    if not isinstance(inputs, Mapping):
        raise BadRecord("a run of type llm without inputs")
    if "messages" in inputs:
        listed = inputs["messages"]
        if isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], list):
            listed = listed[0]  # a batch of one
        if not isinstance(listed, list):
            raise BadRecord(f"inputs.messages is a {type(listed).__name__}, not a list")
        found = tuple(_message(m, f"inputs.messages[{i}]") for i, m in enumerate(listed))
    else:
        key = next((k for k in ("prompts", "prompt", "input") if k in inputs), None)
        found = messages(inputs[key], f"inputs.{key}") if key else ()
    if not found:
        raise BadRecord("inputs hold no messages, prompts or input")
    return found


def _output(outputs: Any) -> str | None:
    if not isinstance(outputs, Mapping):
        return None
    first = outputs.get("generations") or outputs.get("choices")
    while isinstance(first, list) and first:
        first = first[0]
    value = next((outputs[k] for k in ("messages", "message", "output", "content") if outputs.get(k) is not None), None)
    if isinstance(first, Mapping):
        value = first.get("message") or first.get("text") or ""
    if value is None:
        return message(outputs).content if "role" in outputs else None
    if isinstance(value, list):
        return "\n".join(_message(m, "outputs").content for m in value)
    return value if isinstance(value, str) else _message(value, "outputs").content


def _message(value: Any, what: str) -> Message:
    """LangChain writes {"lc": 1, "id": [..., "HumanMessage"], "kwargs": {...}}, or {"type": "human", "data": {...}}."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        value = {"role": value[0], "content": value[1]}
    if not isinstance(value, Mapping):
        return message(value, what)
    inner = value.get("kwargs", value.get("data"))
    if not isinstance(inner, Mapping):
        return message({"role": value.get("type", ""), **value}, what)
    kind = value["id"][-1] if isinstance(value.get("id"), list) and value["id"] else value.get("type", "")
    role = str(inner.get("role") or inner.get("type") or kind).lower().removesuffix("chunk").removesuffix("message")
    return message({**inner, "role": role}, what)
