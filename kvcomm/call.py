"""One call of a model's own `generate`, which may have to start again before its first token. Knows nothing of KV."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["Call"]


class Call:
    """`options` holds every argument by its name, however it was given; nothing where `generate` does not take them so."""

    def __init__(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._generate, self._args, self._kwargs = generate, args, kwargs
        self.options: dict[str, Any] = {}
        parameters = signature(generate)
        with suppress(TypeError):  # too many arguments, or one given twice: `generate` itself will say so
            self.options = dict(parameters.bind(*args, **kwargs).arguments)
        for parameter in parameters.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                self.options |= self.options.pop(parameter.name, {})
        streamer = self.options.get("streamer")
        self._streamer = None if streamer is None else _Streamer(streamer)

    @property
    def prompt(self) -> Any:
        """Token ids [rows, tokens], or whatever is in their place."""
        inputs = self.options.get("inputs")
        return self.options.get("input_ids") if inputs is None else inputs

    def stop_ids(self, model: Any) -> list[int]:
        """Token ids that end an answer, as `generate` will see them."""
        config = self.options.get("generation_config") or model.generation_config
        ids = self.options.get("eos_token_id", config.eos_token_id)
        return [] if ids is None else [int(i) for i in np.atleast_1d(ids)]

    def untouched(self) -> Any:
        """The call as it was made."""
        return self._generate(*self._args, **self._kwargs)

    def start(self, **more: Any) -> Any:
        """The call with other arguments. A streamer gets what it got in an earlier start no second time."""
        if self._streamer is not None:
            self._streamer.again()
            more["streamer"] = self._streamer
        return self._generate(**{**self.options, **more})


class _Streamer:
    """Hands on what is put, but after `again` not what was handed on already: before the first token, that is the prompt."""

    def __init__(self, streamer: Any) -> None:
        self._to, self._put, self._skip = streamer, 0, 0

    def again(self) -> None:
        self._skip = self._put

    def put(self, value: Tensor) -> None:
        if self._skip:
            self._skip -= 1
            return
        self._to.put(value)
        self._put += 1

    def end(self) -> None:
        self._to.end()
