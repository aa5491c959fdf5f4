"""Arguments by their names, against Python's own binding; and calls that start again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcomm.call import Call


def generate(inputs: Any = None, generation_config: Any = None, streamer: Any = None, **kwargs: Any) -> dict[str, Any]:
    """What it was called with."""
    return {"inputs": inputs, "generation_config": generation_config, "streamer": streamer, **kwargs}


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((1,), {"top_k": 5}),
        ((1, 2), {}),
        ((), {"inputs": 1, "generation_config": 2, "kwargs": 3}),
        ((None, 2), {"input_ids": 4}),
    ],
)
def test_options_are_what_python_binds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = Call(generate, args, kwargs)
    given = generate(*args, **kwargs)
    assert {**generate(), **call.options} == given
    assert call.start() == call.untouched() == given
    assert call.start(past_key_values=9) == {**given, "past_key_values": 9}
    assert call.prompt == given.get("input_ids", given["inputs"])


@pytest.mark.parametrize(("args", "kwargs"), [((1, 2, 3, 4), {}), ((1,), {"inputs": 1})])
def test_calls_that_cannot_be_made(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = Call(generate, args, kwargs)
    assert call.options == {}
    assert call.prompt is None
    with pytest.raises(TypeError):
        call.untouched()


def test_nameless_arguments_stay_in_sight() -> None:
    """Of a generate that takes them so: under a name that no caller of ours takes for a known one."""

    def nameless(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return (*args, kwargs)

    call = Call(nameless, (1, 2), {"top_k": 5})
    assert call.options == {"args": (1, 2), "top_k": 5}
    assert call.untouched() == (1, 2, {"top_k": 5})


class Keeps:
    """A streamer."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


def test_nothing_is_streamed_twice() -> None:
    """Three starts: one that fails before the prompt, one behind it, and one that comes through."""

    def failing(prompt: torch.Tensor, fail: int, streamer: Keeps) -> str:
        if fail == 0:
            raise ZeroDivisionError
        streamer.put(prompt)
        if fail == 1:
            raise ZeroDivisionError
        streamer.put(prompt + 1)
        streamer.end()
        return "done"

    keeps = Keeps()
    call = Call(failing, (torch.tensor([5]), 0, keeps), {})
    for fail in (0, 1):
        with pytest.raises(ZeroDivisionError):
            call.start(fail=fail)
    assert call.start(fail=2) == "done"
    assert keeps.got == [[5], [6], "end"]
    assert call.options["streamer"] is keeps
