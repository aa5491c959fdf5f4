"""Frameworks that call `model.generate` themselves share KV inside `attach`, unchanged, and say what they say without it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, pipeline

from kvcomm.config import Config
from kvcomm.engine import KVComm
from kvcomm.tiny import FOLDER

TEXT = "report about bob : city is oslo . pet is dog . report about erin : city is rome . food is rice . color of ute is red ."
QUESTION = "questions : city of bob ? food of erin ? now write the final answer in the style of your role only ."


def messages(role: str) -> list[dict[str, str]]:
    system = f"you are the {role} , a careful agent of the team . your style is plain . use only what is said below ."
    return [{"role": "system", "content": system}, {"role": "user", "content": f"{TEXT} {QUESTION}"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")


def shares(ask: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """`ask(role)` for two agents, plain and attached: equal answers, and the second one reuses the first one's text."""
    plain = [ask("clerk"), ask("analyst")]
    comm = KVComm.from_model(model, tokenizer, config=Config())
    with comm.attach(model):
        attached = [ask("clerk"), ask("analyst")]
    assert attached == plain
    assert plain[0]
    assert [bool(r.reused_tokens) for r in comm.reports] == [False, True]
    assert {r.fallback for r in comm.reports} == {"nothing-known", None}
    assert ask("clerk") == plain[0]
    assert len(comm.reports) == 2, "undone"


def generation_pipeline(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    build: Any = pipeline  # its overloads have no place for a model of any class
    return build("text-generation", model=model, tokenizer=tokenizer, **options)


def test_transformers_pipeline(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    pipe = generation_pipeline(model, tokenizer)

    def ask(role: str) -> str:
        answer: str = pipe(messages(role), max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"]
        return answer

    shares(ask, model, tokenizer)


def test_smolagents() -> None:
    from smolagents import TransformersModel

    wrapped = TransformersModel(
        model_id=str(FOLDER), device_map="cpu", torch_dtype="float32", max_new_tokens=24, do_sample=False
    )

    def ask(role: str) -> str:
        return str(
            wrapped.generate([{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages(role)]).content
        )

    shares(ask, wrapped.model, wrapped.tokenizer)


def test_smolagents_streams_from_a_thread() -> None:
    """It starts one without the caller's context: what `attach` says counts there, and nothing is shared inside `acting`."""
    from smolagents import TransformersModel

    wrapped = TransformersModel(
        model_id=str(FOLDER), device_map="cpu", torch_dtype="float32", max_new_tokens=24, do_sample=False
    )

    def ask(role: str) -> str:
        asked = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages(role)]
        return "".join(delta.content or "" for delta in wrapped.generate_stream(asked))

    expected = [ask("clerk"), ask("analyst")]
    comm = KVComm.from_model(wrapped.model, wrapped.tokenizer, config=Config())
    with comm.attach(wrapped.model, agent="team", tenant="x"):
        assert [ask("clerk"), ask("analyst")] == expected
        with comm.acting("analyst", tenant="y"):
            assert ask("analyst") == expected[1]
    assert [(r.agent, bool(r.reused_tokens)) for r in comm.reports] == [("team", False), ("team", True), ("", False)]
    assert (comm.reports[-1].fallback or "").startswith("nobody knows")
    assert {s.tenant for s in comm.store.segments()} == {"x"}


def test_langchain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline

    pipe = generation_pipeline(model, tokenizer, max_new_tokens=24, do_sample=False, return_full_text=False)
    chat = ChatHuggingFace(llm=HuggingFacePipeline(pipeline=pipe), tokenizer=tokenizer)

    def ask(role: str) -> str:
        system, user = messages(role)
        return str(chat.invoke([SystemMessage(system["content"]), HumanMessage(user["content"])]).content)

    shares(ask, model, tokenizer)
