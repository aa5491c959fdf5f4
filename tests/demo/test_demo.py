"""The demo on the embedded model, small: its document is complete and adds up, its page and table show what it holds."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvcomm.agents.team import Team
from kvcomm.cli import main
from kvcomm.demo import runner
from kvcomm.demo.page import gain, page, terminal
from kvcomm.demo.runner import ARMS, Arm, Call
from kvcomm.demo.summary import summarise
from kvcomm.demo.workloads import ROLES, default_team, make_task, own_questions, style_of
from kvcomm.engine import Output
from kvcomm.errors import TeamError
from kvcomm.replay.readers import read_trace
from kvcomm.replay.recording.recorder import Recorder
from kvcomm.segments import ReuseReport
from kvcomm.tiny import tasks

EXAMPLE = Path(__file__).parents[2] / "examples" / "team.yaml"

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
    assert sum(b["questions"] for b in doc["workloads"]["math"]["bindings"].values()) == 2 * 3


def test_a_team_of_one_agent_that_is_asked_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody to share with, nothing to score: nothing is measured, so nothing is shown."""
    monkeypatch.chdir(tmp_path)
    Path("team.yaml").write_text("agents: [{name: clerk, template: '{input} is this right ?', max_new_tokens: 4}]\n")
    assert main("demo -q --requests 1 --documents 2 --team team.yaml --output out".split()) == 0
    assert "one agent: nobody to share with; accuracy -" in capsys.readouterr().out
    assert "one agent" in Path("out/demo.html").read_text()


def test_an_agents_questions_in_a_team_file(tmp_path: Path) -> None:
    """`{questions}`, as documented, `{question}` and the agent's name, as in the example: each agent is asked its own."""
    file = tmp_path / "team.yaml"
    file.write_text(
        "agents: [{name: a, template: '{documents} {{questions}} {questions}'},"
        " {name: b, template: '{input} {said} {question}'}, {name: c, template: '{input} {said} right ?'}]"
    )
    for path in (file, EXAMPLE):
        team = own_questions(Team.from_yaml(path))
        task = make_task(random.Random(0), "code", team.agents, 4)
        asked = {name: [item.question for item in items] for name, items in task.items.items()}
        for agent in team.agents:
            text = agent.messages(task.fields, "")[-1]["content"]
            assert " ".join(asked[agent.name]) in text
            assert ("{questions}" in text) == (agent.name == "a"), "a brace that is no slot"
            assert len(asked[agent.name]) == (0 if agent.name == "c" else 3)


@pytest.mark.parametrize("slot", ["questions_1", "a"])
def test_another_agents_questions_in_a_team_file(slot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "team.yaml"
    file.write_text(f"agents: [{{name: a}}, {{name: b, template: '{{input}} {{said}} {{{slot}}}'}}]")
    with pytest.raises(TeamError, match="agent 1's questions"):
        own_questions(Team.from_yaml(file))
    assert main(["demo", "-q", "--team", str(file)]) == 2
    assert "write {questions}" in capsys.readouterr().err


class Echo(Arm):
    """Answers every agent with its name."""

    def __init__(self) -> None:
        """Without an engine."""

    def generate(self, messages: Any, *, agent: str, **options: Any) -> Output:
        return Output(agent, [1], 1.0, ReuseReport(agent, 1, 0, 1, ttft_ms=1.0))


def test_rounds_do_not_make_agents() -> None:
    team = replace(default_team("math", 3), rounds=2)
    task = make_task(random.Random(0), "math", team.agents, 3)
    calls = runner.run({arm: Echo() for arm in ARMS}, {"math": team}, [task], seed=0)
    shared = [c for c in calls if c.arm == "shared"]
    assert [(c.round, c.position, c.agent) for c in shared] == [
        (r, p, name) for r in (1, 2) for p, name in enumerate(ROLES["math"][:3], 1)
    ]
    math = summarise(calls)["math"]
    assert [(a["position"], a["agent"]) for a in math["agents"]] == list(enumerate(ROLES["math"][:3], 1))
    assert (math["calls"], math["later_agents"]["calls"]) == (6, 4)


def test_the_dense_arm_is_recorded(tmp_path: Path) -> None:
    """Each of its calls, in the order in which they are made and nothing of the other arms."""
    teams = {name: default_team(name, 3) for name in ("math", "code")}
    requests = [make_task(random.Random(n), name, teams[name].agents, 3) for n, name in enumerate(("math", "code", "math"))]
    asked: list[Any] = []

    class Asked(Echo):
        def generate(self, messages: Any, **options: Any) -> Output:
            asked.append(messages)
            return super().generate(messages, **options)

    with Recorder(tmp_path / "t.jsonl") as record:
        runner.run({arm: Asked() if arm == "dense" else Echo() for arm in ARMS}, teams, requests, seed=4, record=record)
    calls = list(read_trace(tmp_path / "t.jsonl", strict=True))
    assert [c.session for c in calls] == [name for name in ("math-4-0", "code-4-1", "math-4-2") for _ in range(3)]
    assert [c.agent for c in calls] == [*ROLES["math"][:3], *ROLES["code"][:3], *ROLES["math"][:3]]
    assert [[{"role": m.role, "content": m.content} for m in c.messages] for c in calls] == [list(m) for m in asked]
    assert [c.output for c in calls] == [c.agent for c in calls]


def test_a_recorded_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.jsonl"
    assert main(["demo", "-q", "--requests", "1", "--documents", "2", "--agents", "2", "--record", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"recorded: 2 calls of the dense arm in {file}")
    first, second = read_trace(file, strict=True)
    assert first.output
    assert first.output in second.messages[-1].content
    assert main(["demo", "-q", "--requests", "1", "--record", str(tmp_path)]) == 1
    assert "Is a directory" in capsys.readouterr().err


def test_answers_are_compared_within_their_round() -> None:
    dense = [recorded("dense", 1, round_=r, text=f"said in round {r}") for r in (1, 2)]
    shared = [replace(c, arm="shared") for c in dense]
    assert summarise([*dense, *shared])["all"]["answers_equal_to_dense"] == 1.0


def recorded(
    arm: str, position: int, *, round_: int = 1, right: bool = True, text: str = "x", match_ms: float | None = 2.0
) -> Call:
    """A call of 10 ms."""
    report = ReuseReport("", 100, 80, 20, match_ms=match_ms, ttft_ms=10.0)
    return Call("math", 0, arm, round_, position, str(position), text, (right,), ("self",), report)


def test_the_line_is_over_the_agents_it_names() -> None:
    """The first agent is right and as dense; the second one is neither."""
    calls = [recorded(arm, position) for arm in ARMS for position in (1, 2)]
    calls = [replace(c, text="y", right=(False,)) if (c.arm, c.position) == ("shared", 2) else c for c in calls]
    found = summarise(calls)
    assert (found["all"]["accuracy_shared"], found["all"]["later_agents"]["accuracy_shared"]) == (0.5, 0.0)
    line = gain({"all": found["all"]})
    assert line.startswith("agents 2 and later: 80.0 % of prompt tokens reused")
    assert line.endswith("0.0 % of answers equal to dense, accuracy 100.0 % dense, 0.0 % shared, 100.0 % with rotation alone")


@pytest.mark.parametrize(("match_ms", "prefix_ms"), [(2.0, 8.0), (None, 10.0)])
def test_a_prefix_cache_does_not_pay_for_the_search(match_ms: float | None, prefix_ms: float) -> None:
    found = summarise([recorded(arm, position, match_ms=match_ms) for arm in ARMS for position in (1, 2)])
    for block in (found["math"], found["all"], *found["math"]["agents"]):
        assert block["ttft_prefix_cache_ms"] == prefix_ms
        assert block["ttft_shared_ms"] == 10.0


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
