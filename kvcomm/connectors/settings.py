"""The connector's settings: kvcomm's own configuration, and who may use it how. From a JSON object; knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from kvcomm.config import Config
from kvcomm.errors import InputError
from kvcomm.policy import Rule
from kvcomm.who import Who
from kvcomm.wire.address import Address
from kvcomm.wire.client import ServerStore

__all__ = ["Mode", "Settings", "Wish"]

Mode = Literal["off", "shadow", "on"]  # shadow: plan and report, load nothing


@dataclass(frozen=True)
class Wish:
    """How one request is to be served."""

    who: Who
    mode: Mode
    config: Config = field(default_factory=Config)
    prefill: bool = False  # its prompt is a text to be computed alone and kept, for whoever reads it


@dataclass(frozen=True)
class Settings:
    """Validated once. `agents` maps an agent's name to its own `mode` and `rule`."""

    config: Config = field(default_factory=Config)
    mode: Mode = "on"
    agents: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    max_hole_tokens: int | None = (
        None  # computed outside the engine's budget, per request and per step; None: one step's budget
    )
    least_gain: int | None = None  # tokens that must be saved for a request to be touched; None: as measured at start
    server: str | None = None  # address of the server that keeps what engines share; None: this engine keeps it, for itself
    server_token_file: str | None = None  # holds what the server wants to hear of clients from other hosts
    untested_vllm: bool = False  # start although nobody has tried this version of vLLM

    def __post_init__(self) -> None:
        _check_mode(self.mode, "mode")
        for agent, given in self.agents.items():
            if not isinstance(given, Mapping) or not given.keys() <= {"mode", "rule"}:
                raise InputError(f"agents[{agent!r}] is {given!r}; it may have mode and rule")
            _check_mode(given.get("mode", "on"), f"mode of agent {agent!r}")
            Who(agent, given.get("rule", "auto"))  # type: ignore[arg-type]  # checked there
        if self.server is not None:
            Address.parse(self.server)
        if self.config.rung == "naive":
            raise InputError("rung is 'naive', which serves comparisons inside the library alone; use boundary or rotate")
        for name in ("max_hole_tokens", "least_gain"):
            if (given := getattr(self, name)) is not None and given < 0:
                raise InputError(f"{name} is {given}; it must be at least 0")

    def store(self, *, wait_ms: float, reads_kv: bool = True) -> ServerStore | None:
        """A client of the server; None where there is none. Raises InputError for a file that cannot be read."""
        if self.server is None:
            return None
        token = ""
        if self.server_token_file is not None:
            try:
                token = Path(self.server_token_file).read_text(encoding="utf-8").strip()
            except OSError as fault:
                raise InputError(f"server_token_file {self.server_token_file!r} cannot be read: {fault.strerror}") from fault
        return ServerStore(self.server, token=token, wait_ms=wait_ms, reads_kv=reads_kv)

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> Settings:
        """From `kv_connector_extra_config`: fields of `Config` and of this class side by side. Raises InputError."""
        own = {f.name for f in fields(cls)} - {"config"}
        known = own | {f.name for f in fields(Config)}
        if unknown := extra.keys() - known:
            raise InputError(f"kvcomm knows no setting {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
        config = Config.from_env(**{k: v for k, v in extra.items() if k not in own})
        given = {k: v for k, v in extra.items() if k in own}
        return cls(config, **{"mode": config.mode, **given})

    def wish(self, asked: Mapping[str, Any], tenant: str) -> Wish:
        """What a request's own words (`mode`, `agent`, `rule`, `prefill`), its agent's settings and the process's come to: the
        most cautious of the three modes, and rule `exact` where request or agent asks for it. A request may name the `rung` of
        moved text, to compare one with another. Raises InputError.
        """
        agent = str(asked.get("agent", ""))
        of_agent = self.agents.get(agent, {})
        modes: list[Any] = [self.mode, of_agent.get("mode", "on"), asked.get("mode", "on")]
        for mode in modes:
            _check_mode(mode, "mode")
        rules: set[Any] = {of_agent.get("rule", "auto"), asked.get("rule", "auto")}
        rule: Rule = (rules - {"auto", "exact"} or (rules & {"exact"}) or {"auto"}).pop()
        prefill = asked.get("prefill", False)
        if prefill not in (False, True):
            raise InputError(f"prefill is {prefill!r}; use true or false")
        rung: Any = asked.get("rung", self.config.rung)
        config = self.config if rung == self.config.rung else replace(self, config=replace(self.config, rung=rung)).config
        return Wish(Who(agent, rule, tenant), min(modes, key=get_args(Mode).index), config, bool(prefill))


def _check_mode(mode: object, what: str) -> None:
    if mode not in get_args(Mode):
        raise InputError(f"{what} is {mode!r}; use one of {', '.join(get_args(Mode))}")
