"""On whose behalf a request runs, and how the engine knows: said with the request, said around it, or the default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from threading import Lock

from kvcomm.errors import InputError
from kvcomm.policy import Rule

__all__ = ["Callers", "Who"]


@dataclass(frozen=True)
class Who:
    """Nothing crosses tenants; rule `exact` reuses exact prefixes only. Raises InputError for an unknown rule."""

    agent: str = ""
    rule: Rule = "auto"
    tenant: str = ""

    def __post_init__(self) -> None:
        if self.rule not in ("auto", "exact"):
            raise InputError(f"rule is {self.rule!r} for agent {self.agent!r}; use auto or exact")

    def but(self, agent: str | None, rule: Rule | None, tenant: str | None) -> Who:
        """The same with what is given instead."""
        given = {"agent": agent, "rule": rule, "tenant": tenant}
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


class Callers:
    """Who calls one engine. Contexts follow calls and asyncio tasks, and are not handed to threads: one that was started
    inside `acting` has none, and cannot be told from a stranger's. So while somebody acts, threads without one are nobody.
    """

    def __init__(self, tenant: str = "") -> None:
        """`tenant`: on whose behalf calls are made that say nothing."""
        self._said: ContextVar[Who | None] = ContextVar("kvcomm_who", default=None)
        self.default = Who(tenant=tenant)
        self._acting = 0  # open blocks, in all threads
        self._lock = Lock()

    def who(self, agent: str | None = None, rule: Rule | None = None, tenant: str | None = None) -> Who | None:
        """Who calls now, with what the call itself says instead; None where rule or tenant cannot be known."""
        said = self._said.get()
        if said is None and self._acting and None in (rule, tenant):
            return None
        return (said or self.default).but(agent, rule, tenant)

    @contextmanager
    def acting(self, agent: str | None, rule: Rule | None, tenant: str | None) -> Iterator[None]:
        """Inside, calls of this context are on behalf of these; what is not given is as it is outside."""
        token = self._said.set((self._said.get() or self.default).but(agent, rule, tenant))
        with self._lock:
            self._acting += 1
        try:
            yield
        finally:
            with self._lock:
                self._acting -= 1
            self._said.reset(token)

    @contextmanager
    def unless_said(self, who: Who) -> Iterator[None]:
        """Inside, this is who calls where nothing else is said, in any thread."""
        before, self.default = self.default, who
        try:
            yield
        finally:
            self.default = before
