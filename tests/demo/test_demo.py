"""The demo on the embedded model, small: its document is complete and adds up, its page and table show what it holds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from kvcomm.agents.team import Team
from kvcomm.cli import main
from kvcomm.demo.page import page, terminal
from kvcomm.demo.workloads import ROLES, default_team, make_task, style_of
from kvcomm.tiny import tasks

WANTED = (
    "accuracy_dense accuracy_shared accuracy_rotate token_reuse_rate call_reuse_rate "
    "ttft_dense_ms ttft_prefix_cache_ms ttft_shared_ms"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    flags = "demo --requests 6 --documents 6 --agents 4 -q --format json --output".split()
    assert main([*flags, str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def doc(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "demo.json").read_text())
    return loaded


def test_every_number_is_there(doc: dict[str, Any]) -> None:
    assert doc["schema"] == "kvcomm.demo/1"
    assert set(doc["workloads"]) == set(ROLES)
    for workload in doc["workloads"].values():
        for block in (workload, *workload["bindings"].values(), *workload["agents"]):
            assert all(0 <= block[k] <= 1 for k in WANTED[:3])
        assert all(workload[k] is not None for k in WANTED)
        assert {"self", "header", "other", "two-hop"} & set(workload["bindings"])
        assert [a["position"] for a in workload["agents"]] == [1, 2, 3, 4]


def test_the_numbers_add_up(doc: dict[str, Any]) -> None:
    for workload in doc["workloads"].values():
        assert workload["requests"] == 2
        assert workload["calls"] == 8
        asked = sum(b["questions"] for b in workload["bindings"].values())
        assert asked == 3 * workload["calls"]
        for arm in ("dense", "shared", "rotate"):
            right = sum(b["questions"] * b[f"accuracy_{arm}"] for b in workload["bindings"].values())
            assert right == pytest.approx(asked * workload[f"accuracy_{arm}"])
        for agent in workload["agents"]:
            assert sum(agent["tokens_by_rung"].values()) == pytest.approx(agent["prompt_tokens"])


def test_agents_after_the_first_reuse_most_of_their_prompt(doc: dict[str, Any]) -> None:
    assert doc["all"]["token_reuse_rate"] > 0.6
    assert doc["all"]["call_reuse_rate"] > 0.9


def test_page_and_table_show_it(doc: dict[str, Any], folder: Path) -> None:
    html = (folder / "demo.html").read_text()
    assert html == page(doc)
    assert "http" not in html.replace("http://www.w3.org", ""), "nothing is loaded from elsewhere"
    text = terminal(doc)
    for workload, names in ROLES.items():
        assert f"<h2>{workload}</h2>" in html
        assert workload in text
        assert all(name in text for name in names[:4])
    assert "ms saved per call" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--requests", "0"], "--requests is 0"),
        (["--agents", "1"], "--agents is 1"),
        (["--documents", "1"], "--documents is 1"),
        (["--dtype", "int7"], "int7"),
        (["--team", "nowhere.yaml"], "nowhere.yaml"),
        (["--model", "nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_unusable_flags(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-q", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_team_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "team.yaml"
    file.write_text(
        "defaults: {template: '{documents} {said} questions : {questions}', max_new_tokens: 8}\n"
        "agents: [{name: clerk, role: you are the clerk .}, {name: judge, role: you are the judge .}]\n"
        "topology: chain\n"
    )
    assert main(["demo", "-q", "--requests", "3", "--documents", "3", "--team", str(file), "--format", "json"]) == 0
    doc = json.loads(capsys.readouterr().out)
    assert [a["agent"] for a in doc["workloads"]["math"]["agents"]] == ["clerk", "judge"]


def test_tasks_fill_their_teams() -> None:
    """Every agent's template finds its fields, and its items are in the style of its role."""
    for workload in ROLES:
        team: Team = default_team(workload, 5)
        task = make_task(random.Random(0), workload, team.agents, 8)
        for agent in team.agents:
            messages = agent.messages(task.fields, "nobody says anything .")
            assert all(item.question in messages[-1]["content"] for item in task.items[agent.name])
            assert tasks.score(task.items[agent.name], tasks.answer_text(task.items[agent.name])) == [True] * 3
            assert style_of(agent.role) in agent.role
