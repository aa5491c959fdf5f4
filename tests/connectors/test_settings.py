"""Settings from a JSON object, and what a request, its agent and the process come to together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvcomm.connectors.settings import Settings
from kvcomm.errors import InputError


def test_fields_of_both_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMM_CLOSING", "5")
    settings = Settings.from_extra({"boundary": 4, "mode": "shadow", "max_hole_tokens": 9})
    assert (settings.config.boundary, settings.config.closing, settings.mode, settings.max_hole_tokens) == (4, 5, "shadow", 9)
    monkeypatch.setenv("KVCOMM_MODE", "off")
    assert Settings.from_extra({}).mode == "off"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"bound": 1}, "no setting bound"),
        ({"mode": "maybe"}, "mode is 'maybe'"),
        ({"boundary": -1}, "boundary is -1"),
        ({"rung": "naive"}, "rung is 'naive'"),
        ({"max_hole_tokens": -1}, "max_hole_tokens is -1"),
        ({"agents": {"a": "exact"}}, r"agents\['a'\]"),
        ({"agents": {"a": {"mode": "x"}}}, "mode of agent 'a'"),
        ({"agents": {"a": {"rule": "x"}}}, "rule is 'x'"),
    ],
)
def test_unusable_settings(extra: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Settings.from_extra(extra)


@pytest.mark.parametrize(
    ("process", "agent", "request_", "mode"),
    [("on", "on", "on", "on"), ("on", "shadow", "on", "shadow"), ("shadow", "on", "off", "off"), ("off", "on", "on", "off")],
)
def test_the_most_cautious_mode_wins(process: str, agent: str, request_: str, mode: str) -> None:
    settings = Settings.from_extra({"mode": process, "agents": {"judge": {"mode": agent}}})
    wish = settings.wish({"agent": "judge", "mode": request_}, "tenant")
    assert (wish.mode, wish.who.agent, wish.who.tenant, wish.who.rule) == (mode, "judge", "tenant", "auto")


def test_rules() -> None:
    settings = Settings.from_extra({"agents": {"judge": {"rule": "exact"}}})
    assert settings.wish({"agent": "judge", "rule": "auto"}, "").who.rule == "exact"
    assert settings.wish({"rule": "exact"}, "").who.rule == "exact"
    assert settings.wish({}, "").who.rule == "auto"
    with pytest.raises(InputError, match="rule is 'no'"):
        settings.wish({"agent": "judge", "rule": "no"}, "")


def test_a_request_may_name_the_rung() -> None:
    settings = Settings.from_extra({"closing": 5})
    assert settings.wish({}, "").config == settings.config
    assert settings.wish({"rung": "rotate"}, "").config == replace(settings.config, rung="rotate")
    for rung in ("naive", "no", 3, None, ["rotate"]):
        with pytest.raises(InputError, match="rung is"):
            settings.wish({"rung": rung}, "")
