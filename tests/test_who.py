"""Who asks: what is said with a call, around it, or by default; and threads, which have no context of their own."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from threading import Thread

import pytest

from kvcomm.errors import InputError
from kvcomm.who import Callers, Who


def in_a_thread(callers: Callers, *said: str | None, inherit: bool = False) -> Who | None:
    found: list[Who | None] = []

    def look() -> None:
        found.append(callers.who(*said))  # type: ignore[arg-type]  # rules are words

    thread = Thread(target=copy_context().run, args=(look,)) if inherit else Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


def test_what_is_said_last_counts_and_the_rest_is_inherited() -> None:
    callers = Callers()
    assert callers.who() == Who()
    with callers.unless_said(Who("writer", tenant="x")):
        assert callers.who() == Who("writer", tenant="x")
        with callers.acting("judge", "exact", None):
            assert callers.who() == Who("judge", "exact", "x")
            assert callers.who("critic") == Who("critic", "exact", "x")
            assert callers.who(None, "auto", "") == Who("judge", "auto", "")
            with callers.acting(None, None, "y"):
                assert callers.who() == Who("judge", "exact", "y")
            assert callers.who() == Who("judge", "exact", "x")
        assert callers.who() == Who("writer", tenant="x")
    assert callers.who() == Who()


def test_threads() -> None:
    """One without context is the default, but nobody while somebody acts; unless the call itself says what matters."""
    callers = Callers()
    with callers.unless_said(Who("writer")):
        assert in_a_thread(callers) == Who("writer")
        with callers.acting("judge", None, "x"):
            assert in_a_thread(callers) is None
            assert in_a_thread(callers, "clerk", "auto") is None
            assert in_a_thread(callers, "clerk", "auto", "x") == Who("clerk", "auto", "x")
            assert in_a_thread(callers, None, "auto", "x") == Who("writer", "auto", "x")
            assert in_a_thread(callers, inherit=True) == Who("judge", "auto", "x")
        assert in_a_thread(callers) == Who("writer")
    assert in_a_thread(callers) == Who()


def test_tasks_inherit() -> None:
    callers = Callers()

    async def look() -> Who | None:
        return callers.who()

    async def act() -> list[Who | None]:
        with callers.acting("judge", None, None):
            task = asyncio.create_task(look())
        return [await task, await asyncio.create_task(look())]

    assert asyncio.run(act()) == [Who("judge"), Who()]


def test_blocks_end_with_exceptions() -> None:
    callers = Callers()
    with pytest.raises(ZeroDivisionError), callers.unless_said(Who("writer")), callers.acting("judge", None, None):
        raise ZeroDivisionError
    assert callers.who() == in_a_thread(callers) == Who()


def test_an_unknown_rule() -> None:
    callers = Callers()
    with pytest.raises(InputError, match="rule is 'sometimes'"), callers.acting("judge", "sometimes", None):  # type: ignore[arg-type]
        pass
    assert in_a_thread(callers) == Who()
