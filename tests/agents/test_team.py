"""Teams on a fake generator that records every prompt: what each agent is shown, in which order, what happens on failure."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.agents import topology
from kvcomm.agents.agent import Agent
from kvcomm.agents.team import Team, TurnFailed
from kvcomm.engine import Output
from kvcomm.errors import InputError, TeamError
from kvcomm.policy import Rule
from kvcomm.segments import ReuseReport

NAMES = ("a", "b", "c", "d", "e")
REQUEST = {"input": "the facts .", "question": "who ?"}


@dataclass
class Recorder:
    """Answers its n-th call for an agent with "<agent><n>" and keeps what it was asked."""

    fails: str = ""
    calls: list[tuple[str, Rule, int]] = field(default_factory=list)
    prompts: dict[str, str] = field(default_factory=dict)  # answer -> the user message it answers

    def generate(self, messages: Sequence[Mapping[str, str]], /, *, agent: str, rule: Rule, max_new_tokens: int) -> Output:
        self.calls.append((agent, rule, max_new_tokens))
        text = f"{agent}{sum(name == agent for name, _, _ in self.calls)}"
        if text == self.fails:
            raise OSError("out of paper")
        self.prompts[text] = messages[-1]["content"]
        return Output(text, [1], 1.0, ReuseReport(agent, 1, 0, 1))


@dataclass
class Crowd(Recorder):
    """Answers only when everybody of a step of `size` has asked: would hang, were they asked one after the other."""

    concurrent: bool = True
    size: int = 5

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=20)

    def generate(self, messages: Sequence[Mapping[str, str]], /, *, agent: str, rule: Rule, max_new_tokens: int) -> Output:
        self.barrier.wait()
        return super().generate(messages, agent=agent, rule=rule, max_new_tokens=max_new_tokens)


def team(kind: str = "full", rounds: int = 1, template: str = "{input} {said} {question}", **options: object) -> Team:
    return Team(tuple(Agent(name, template=template) for name in NAMES), topology.KINDS[kind](NAMES, **options), rounds)


# -- what agents are shown --------------------------------------------------------------------------------------------------


def test_prompts_of_a_full_team() -> None:
    """Every prompt, written out."""
    recorder = Recorder()
    team().run(recorder, REQUEST)
    assert recorder.prompts == {
        "a1": "the facts . who ?",
        "b1": "the facts . a says : a1 who ?",
        "c1": "the facts . a says : a1 b says : b1 who ?",
        "d1": "the facts . a says : a1 b says : b1 c says : c1 who ?",
        "e1": "the facts . a says : a1 b says : b1 c says : c1 d says : d1 who ?",
    }


def test_prompts_of_a_star_in_two_rounds() -> None:
    recorder = Recorder()
    team("star", rounds=2).run(recorder, REQUEST)
    assert recorder.prompts == {
        "a1": "the facts . who ?",
        **{f"{x}1": "the facts . a says : a1 who ?" for x in "bcde"},
        "a2": "the facts . b says : b1 c says : c1 d says : d1 e says : e1 who ?",
        **{f"{x}2": "the facts . a says : a2 who ?" for x in "bcde"},
    }


def test_prompts_of_a_debate() -> None:
    """In round 2 everybody is shown the same, of round 1; in round 3 of round 2."""
    recorder = Recorder()
    team("debate", rounds=3, template="{said}\n{input}").run(recorder, REQUEST)
    assert {text: recorder.prompts[text] for text in ("a1", "e2", "b3")} == {
        "a1": "the facts .",
        "e2": "a says : a1 b says : b1 c says : c1 d says : d1 e says : e1\nthe facts .",
        "b3": "a says : a2 b says : b2 c says : c2 d says : d2 e says : e2\nthe facts .",
    }
    assert len({recorder.prompts[f"{x}2"] for x in NAMES}) == 1


@pytest.mark.parametrize("kind", ["full", "mesh", "debate", "chain", "star", "random"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_prompts_hold_what_the_topology_says(kind: str, rounds: int) -> None:
    """The user message of every turn against one put together here from `hears`."""
    recorder, built = Recorder(), team(kind, rounds)
    run = built.run(recorder, REQUEST)
    assert len(run.turns) == 5 * rounds
    for turn in run.turns:
        heard = [f"{who} says : {who}{r}" for r, who in built.topology.hears(turn.round, turn.agent)]
        assert turn.messages[-1]["content"] == " ".join(["the facts .", *heard, "who ?"])
        assert turn.output.text == f"{turn.agent}{turn.round}"
        assert recorder.prompts[turn.output.text] == turn.messages[-1]["content"]


def test_turns_are_records_in_order() -> None:
    run = team("layered", 2, layers=[["b", "c"], ["a"], ["e", "d"]]).run(Recorder(), REQUEST)
    order = [("b", 1), ("c", 1), ("a", 2), ("d", 3), ("e", 3)]
    assert [(t.round, t.agent, t.step) for t in run.turns] == [(r, a, s) for r in (1, 2) for a, s in order]
    assert run.answer == "e2"
    assert all(t.wall_ms >= 0 for t in run.turns)


def test_the_agents_own_settings_reach_the_generator() -> None:
    first = Agent("first", role="You plan.", rule="exact", template="{input}", max_new_tokens=3)
    second = Agent("second", template="<{said}> {{{question}}}", quote="[{round}] {name}: {text}", join="; ")
    third = Agent("third", template="<{said}>", quote="{text}", join=" | ")
    recorder = Recorder()
    run = Team((first, second, third), topology.full(("first", "second", "third"))).run(recorder, REQUEST)
    assert recorder.calls == [("first", "exact", 3), ("second", "auto", 256), ("third", "auto", 256)]
    assert run.turns[0].messages == (
        {"role": "system", "content": "You plan."},
        {"role": "user", "content": "the facts ."},
    )
    assert run.turns[1].messages == ({"role": "user", "content": "<[1] first: first1> {who ?}"},)
    assert run.turns[2].messages == ({"role": "user", "content": "<first1 | second1>"},)


def test_rounds_of_one_run_can_differ() -> None:
    built = team("chain", rounds=2)
    assert len(built.run(Recorder(), REQUEST, rounds=1).turns) == 5
    assert built.run(Recorder(), REQUEST, rounds=4).answer == "e4"
    assert built.rounds == 2


def test_braces_in_texts_are_text() -> None:
    """Neither the request nor an answer is ever read as a template."""
    two = Team((Agent("{x}"), Agent("b")), topology.full(("{x}", "b")))
    run = two.run(Recorder(), {"input": "{said} {0} }{ {{"})
    assert run.turns[0].messages[0]["content"] == "{said} {0} }{ {{"
    assert run.turns[1].messages[0]["content"] == "{said} {0} }{ {{ {x} says : {x}1"


words = st.text("ab \n", max_size=6)


@given(words, words)
def test_an_empty_slot_leaves_no_gap(left: str, right: str) -> None:
    """Against the template with the slot and the white space before it cut out by hand."""
    agent = Agent("a", template="x " + left + "{said}" + right + " y{input}")
    assert agent.messages({"input": ""}, "")[0]["content"] == (("x " + left).rstrip() + right + " y").strip()
    assert agent.messages({"input": "z"}, "w")[0]["content"] == "x " + left + "w" + right + " yz"


# -- side by side, and failing ----------------------------------------------------------------------------------------------


def test_a_step_runs_side_by_side_where_the_generator_can() -> None:
    crowd = Crowd()
    run = team("debate", rounds=2).run(crowd, REQUEST)
    assert [t.output.text for t in run.turns] == [f"{x}{r}" for r in (1, 2) for x in NAMES]
    assert run.turns[7].messages == team("debate", rounds=2).run(Recorder(), REQUEST).turns[7].messages


def test_steps_wait_for_each_other() -> None:
    """Two layers of two: the second asks only when both of the first have answered."""
    four = ("a", "b", "c", "d")
    built = Team(tuple(map(Agent, four)), topology.layered(four, [["a", "b"], ["c", "d"]]))
    crowd = Crowd(size=2)
    run = built.run(crowd, REQUEST)
    assert {name for name, _, _ in crowd.calls[:2]} == {"a", "b"}
    assert run.turns[3].messages[-1]["content"] == "the facts . a says : a1 b says : b1"


def test_one_after_the_other_stays_in_the_callers_thread() -> None:
    here, seen = threading.get_ident(), set()

    class Where(Recorder):
        def generate(self, *args: object, **kwargs: object) -> Output:
            seen.add(threading.get_ident())
            return super().generate(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they came

    recorder = Where()
    team("debate").run(recorder, REQUEST)
    assert seen == {here}
    assert [name for name, _, _ in recorder.calls] == list(NAMES)


def test_context_variables_reach_every_thread() -> None:
    who: ContextVar[str] = ContextVar("who", default="nobody")
    seen = []

    class Context(Crowd):
        def generate(self, *args: object, **kwargs: object) -> Output:
            seen.append(who.get())
            return super().generate(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they came

    token = who.set("caller")
    try:
        team("debate").run(Context(), REQUEST)
    finally:
        who.reset(token)
    assert seen == ["caller"] * 5


def test_a_failure_names_the_agent_and_keeps_what_is_done() -> None:
    recorder = Recorder(fails="c2")
    with pytest.raises(TurnFailed, match="agent 'c' failed in round 2 after 7 finished turns: OSError: out of paper") as caught:
        team(rounds=2).run(recorder, REQUEST)
    assert (caught.value.agent, caught.value.round) == ("c", 2)
    assert [t.output.text for t in caught.value.turns] == ["a1", "b1", "c1", "d1", "e1", "a2", "b2"]
    assert isinstance(caught.value.__cause__, OSError)
    assert len(recorder.calls) == 8  # nobody after it was asked


def test_one_after_the_other_nobody_is_asked_after_a_failure() -> None:
    recorder = Recorder(fails="c1")
    with pytest.raises(TurnFailed, match="agent 'c' failed in round 1 after 2 finished turns") as caught:
        team("debate").run(recorder, REQUEST)
    assert [t.output.text for t in caught.value.turns] == ["a1", "b1"]
    assert [name for name, _, _ in recorder.calls] == ["a", "b", "c"]


def test_a_failure_side_by_side_keeps_the_others_of_its_step() -> None:
    with pytest.raises(TurnFailed, match="agent 'c' failed in round 1 after 4 finished turns") as caught:
        team("debate").run(Crowd(fails="c1"), REQUEST)
    assert [t.output.text for t in caught.value.turns] == ["a1", "b1", "d1", "e1"]


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupted(Recorder):
        def generate(self, *args: object, **kwargs: object) -> Output:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        team().run(Interrupted(), REQUEST)


# -- graphs -----------------------------------------------------------------------------------------------------------------


def test_graph_is_plain_text() -> None:
    assert team("layered", 2, layers=[["a", "b"], ["c", "d"], ["e"]]).graph() == dedent(
        """\
        layered: agents 5, rounds 2
          step 1  a  from the round before e
          step 1  b  from the round before e
          step 2  c  hears a, b
          step 2  d  hears a, b
          step 3  e  hears c, d"""
    )
    assert "from the round before" not in team("mesh").graph()
    assert "hears a; from the round before b, c, d, e" in team("full", 2).graph()


def test_mermaid_draws_every_edge_once() -> None:
    three = ("a", 'b "x" <y>', "c")
    built = Team(tuple(map(Agent, three)), topology.chain(three), rounds=2)
    assert built.mermaid() == dedent(
        """\
        flowchart LR
            a1["a"]
            a2["b &quot;x&quot; &lt;y&gt;"]
            a3["c"]
            a1 --> a2
            a2 --> a3
            a3 -.-> a1"""
    )
    assert team("full").mermaid().count("-->") == 10
    assert team("full", 2).mermaid().count("-.->") == 15


# -- files ------------------------------------------------------------------------------------------------------------------

FILE = """
rounds: 2
topology:
  kind: layered
  layers: [[scout, clerk], [judge]]
defaults:
  template: |
    {input}

    {said}

    {question}
  quote: "[{name}] {text}"
  max_new_tokens: 32
agents:
  - name: scout
    role: You look things up.
  - name: clerk
    rule: exact
  - name: judge
    max_new_tokens: 8
    template: "{said} {question}"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "team.yaml"
    path.write_text(dedent(text), encoding="utf-8")
    return path


def test_a_file_is_the_team_it_describes(tmp_path: Path) -> None:
    """The file against the same team in Python."""
    shared = "{input}\n\n{said}\n\n{question}\n"
    agents = (
        Agent("scout", "You look things up.", template=shared, quote="[{name}] {text}", max_new_tokens=32),
        Agent("clerk", rule="exact", template=shared, quote="[{name}] {text}", max_new_tokens=32),
        Agent("judge", template="{said} {question}", quote="[{name}] {text}", max_new_tokens=8),
    )
    built = topology.layered(("scout", "clerk", "judge"), [["scout", "clerk"], ["judge"]])
    found = Team.from_yaml(write(tmp_path, FILE))
    assert found == Team(agents, built, 2)
    run = found.run(Recorder(), REQUEST)
    assert run.turns[0].messages[1]["content"] == "the facts .\n\nwho ?"
    assert run.turns[2].messages[0]["content"] == "[scout] scout1 [clerk] clerk1 who ?"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", topology.full(("x", "y"))),
        ("topology: debate", topology.debate(("x", "y"))),
        ("topology: {kind: star, hub: y}", topology.star(("x", "y"), hub="y")),
        ("topology: {kind: random, p: 1, seed: 3}", topology.random(("x", "y"), p=1, seed=3)),
        (
            "topology: {kind: custom, within: [[y, x]], across: [[x, x]]}",
            topology.custom(("x", "y"), [["y", "x"]], [["x", "x"]]),
        ),
    ],
)
def test_topologies_in_files(tmp_path: Path, spec: str, expected: topology.Topology) -> None:
    assert Team.from_yaml(write(tmp_path, f"agents: [{{name: x}}, {{name: y}}]\n{spec}\n")).topology == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the team is empty; it must be a mapping with agents, defaults, rounds, topology"),
        ("- a\n- b\n", r"the team is \['a', 'b'\]; it must be a mapping"),
        (
            "agents: [{name: x}]\nturns: 2\n",
            "the team has the unknown key 'turns'; allowed are agents, defaults, rounds, topology",
        ),
        ("rounds: 2\n", "the team has no 'agents'; add it"),
        ("agents: []\n", r"agents is \[\]; give a list of at least one agent"),
        ("agents: {name: x}\n", "give a list of at least one agent"),
        ("agents: [x]\n", "agent 1 is 'x'; it must be a mapping with name, role, rule"),
        ("agents: [{name: x}, {role: y}]\n", "agent 2 has no 'name'; add it"),
        (
            "agents: [{name: x, colour: red}]\n",
            "agent 1 has the unknown key 'colour'; allowed are name, role, rule, template, quote",
        ),
        ("agents: [{name: x}]\ndefaults: {name: y}\n", "defaults has the unknown key 'name'; allowed are role, rule"),
        ("agents: [{name: 7}]\n", "name is 7; it must be text, so put it in quotes"),
        ("agents: [{name: x, rule: on}]\n", "rule is True; it must be text"),
        ("agents: [{name: x, rule: always}]\n", "rule is 'always'; use auto or exact"),
        ("agents: [{name: x, max_new_tokens: 0}]\n", "max_new_tokens is 0; it must be a whole number from 1"),
        ("agents: [{name: x}, {name: x}]\n", "the name 'x' is given to 2 agents"),
        ("agents: [{name: x}]\nrounds: 0\n", "rounds is 0; it must be a whole number from 1"),
        ("agents: [{name: x}]\nrounds: true\n", "rounds is True"),
        (
            "agents: [{name: x}]\ntopology: ring\n",
            "the topology's kind is 'ring'; use one of full, mesh, debate, layered, chain",
        ),
        ("agents: [{name: x}]\ntopology: [full]\n", r"the topology's kind is \['full'\]"),
        ("agents: [{name: x}]\ntopology: {p: 0.5}\n", "the topology's kind is None"),
        ("agents: [{name: x}]\ntopology: {kind: full, p: 0.5}\n", "topology full has the unknown key 'p'; allowed are kind"),
        ("agents: [{name: x}]\ntopology: {kind: layered}\n", "topology layered has no 'layers'; add it"),
        ("agents: [{name: x}]\ntopology: {kind: star, hub: z}\n", "the hub is 'z'"),
        (
            "agents: [{name: x}, {name: y}]\ntopology: {kind: custom, within: [[x, y], [y, x]]}\n",
            "a cycle within a round: x -> y -> x",
        ),
        ("agents: [{name: x}\n", "while parsing"),
        ("agents: [{name: x}]\nrounds: 2020-13-77\n", "month must be in"),
        ("agents: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_cannot_be_run_says_so(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TeamError, match=says) as caught:
        Team.from_yaml(path)
    assert str(caught.value).startswith(f"team file {path}")


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(TeamError, match=r"none\.yaml cannot be read: No such file or directory; give the path of a YAML file"):
        Team.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(TeamError, match="cannot be read: Is a directory"):
        Team.from_yaml(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"agents: \xff\xfe\x00")
    with pytest.raises(TeamError, match=r"bytes\.yaml: "):
        Team.from_yaml(tmp_path / "bytes.yaml")


# -- what cannot be run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": ""}, "without white space around it"),
        ({"name": " x"}, "' x'; it must be text without white space"),
        ({"template": "no slot"}, r"its template has no slot; write at least \{input\}"),
        ({"template": "{input"}, r"template is '\{input'.*a brace that is no slot is written twice"),
        ({"template": "{}"}, "the slot ''; a slot is one plain name"),
        ({"template": "{a.b}"}, r"the slot 'a\.b'"),
        ({"template": "{a!r}"}, "a slot is one plain name"),
        ({"template": "{a:>9}"}, "a slot is one plain name"),
        ({"quote": "{name}"}, r"quote is '\{name\}'; it needs \{text\}"),
        ({"quote": "{text} {when}"}, r"it needs \{text\} and may have \{name\} and \{round\}"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"role": None}, "role is None"),
    ],
)
def test_an_agent_that_cannot_be_used_says_so(options: dict[str, object], says: str) -> None:
    with pytest.raises(TeamError, match=says):
        Agent(**{"name": "x", **options})  # type: ignore[arg-type]  # wrong types are what is tested


def test_agents_and_topology_must_be_the_same() -> None:
    with pytest.raises(TeamError, match="the agents are a, b, those of the topology b, a; name the same in the same order"):
        Team((Agent("a"), Agent("b")), topology.full(("b", "a")))
    with pytest.raises(TeamError, match="the agents are , those of the topology a"):
        Team((), topology.full(("a",)))


def test_an_edge_without_a_slot_for_it_is_an_error() -> None:
    """In the round where it first matters: the first of a chain hears the last one from round 2 on."""
    agents = (Agent("a", template="{input}"), Agent("b"))
    built = Team(agents, topology.chain(("a", "b")))
    assert built.run(Recorder(), REQUEST).answer == "b1"
    for build in (lambda: built.run(Recorder(), REQUEST, rounds=2), lambda: Team(agents, built.topology, rounds=2)):
        with pytest.raises(TeamError, match=r"agent 'a' hears others, but its template has no \{said\}; add it"):
            build()


@pytest.mark.parametrize(
    ("request_", "rounds", "says"),
    [
        ({"input": "x"}, None, "agent 'a' needs the field 'question'; the request has input"),
        ({}, None, "agent 'a' needs the field 'input'; the request has none"),
        ({**REQUEST, "said": "x"}, None, "the request has a field 'said'; that slot is the team's"),
        ({**REQUEST, "input": 7}, None, "field 'input' is 7; it must be text"),
        (REQUEST, 0, "rounds is 0; it must be a whole number from 1"),
    ],
)
def test_a_request_that_cannot_be_run_costs_no_call(request_: dict[str, str], rounds: int | None, says: str) -> None:
    recorder = Recorder()
    with pytest.raises(TeamError, match=says) as caught:
        team().run(recorder, request_, rounds)
    assert isinstance(caught.value, InputError)
    assert recorder.calls == []


# -- documentation ----------------------------------------------------------------------------------------------------------


def test_the_page_about_teams_is_true(checkout: Path) -> None:
    """Its file and its Python describe one team; its tables hold every field with its default, and every kind."""
    page = (checkout / "docs" / "teams.md").read_text(encoding="utf-8")
    described = page.split("```yaml\n")[1].split("```")[0]
    code = page.split("```python\n")[1].split("\nrun = ")[0]
    namespace: dict[str, object] = {}
    exec(code, namespace)  # noqa: S102  # our own page
    from_file = Team.from_data(yaml.safe_load(described))
    in_python = namespace["team"]
    assert isinstance(in_python, Team)
    assert from_file.topology == in_python.topology
    assert [replace(agent, max_new_tokens=256) for agent in from_file.agents] == list(in_python.agents)
    rows = {cells[1].strip("`"): cells for line in page.splitlines() if len(cells := [c.strip() for c in line.split("|")]) > 4}
    assert set(topology.KINDS) <= set(rows)
    for each in fields(Agent):
        told = rows[each.name][-2].strip("`")
        assert told == {MISSING: "needed", "": "empty", " ": "one space"}.get(each.default, str(each.default))
