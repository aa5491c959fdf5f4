"""Serves a trace's calls one after the other under every policy, and measures each beside dense.

Recorded outputs are kept: every policy reads and says the same text, so that differences are the policy's own. Where outputs
are `live`, each policy reads what it has said itself, and is compared with dense on its own prompt and its own answer.
Sessions know nothing of each other unless asked; a session that was cut is served again from its first call on, because KV is
not kept on disk, and only what is missing of it is written down.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from kvcomm.errors import InputError
from kvcomm.replay.graph import Turn, rewritten
from kvcomm.replay.measure import agreement
from kvcomm.replay.player import Asked, Player, Served
from kvcomm.replay.policies import Policy
from kvcomm.replay.results import FAILED, Log, Outcome, Row

__all__ = ["Options", "replay", "warm_up"]

SHOWN = 40  # characters of the answer in front of a choice that differs, and behind it


@dataclass(frozen=True)
class Options:
    """How a trace is replayed."""

    policies: tuple[Policy, ...]
    live: bool = False
    across: bool = False  # sessions find each other's text
    new_tokens: int = 256  # of a live answer, at most
    seed: int = 0  # of the order in which policies serve a call


def replay(turns: Sequence[Turn], player: Player, options: Options, log: Log, tick: Callable[[Row], object]) -> None:
    """Fills `log` with the turns that it lacks. `tick` is told of every row, those that were there included."""
    groups: dict[str, list[Turn]] = defaultdict(list)
    for turn in turns:
        groups["" if options.across else turn.call.session].append(turn)
    for group in groups.values():
        missing = [turn for turn in group if turn.number not in log.rows]
        if missing:
            player.begin()
        said: dict[str, dict[int, str]] = {policy.name: {} for policy in options.policies}
        for turn in group:
            if missing and turn.number <= missing[-1].number:
                row = _row(turn, player, options, said)
                if turn.number not in log.rows:
                    log.add(row)
            tick(log.rows[turn.number])


def warm_up(player: Player, options: Options) -> None:
    """The first calls of a process pay for its set-up; they belong to no policy."""
    player.begin()
    chat = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 8}]
    ids = player.wording.prompt(chat)
    if player.limit is not None and len(ids) + 8 > player.limit:
        return
    for _ in range(2):
        for policy in options.policies:
            player.serve(policy, Asked("warm-up", "warm-up", chat, ids, player.wording.answer(chat, "one two three"), 4))


def _row(turn: Turn, player: Player, options: Options, said: dict[str, dict[int, str]]) -> Row:
    call = turn.call
    reads = sorted({read.source for read in turn.reads})
    facts = (turn.number, call.session, call.agent, call.id, call.where, turn.hop, reads)
    done: dict[str, tuple[Asked, Served]] = {}
    policies = list(options.policies)
    random.Random(f"{options.seed} {turn.number}").shuffle(policies)
    try:
        asked = dict.fromkeys(said, _asked(turn, player, options, said["dense"]))
        if options.live:
            asked = {name: _asked(turn, player, options, mine) for name, mine in said.items()}
        for policy in policies:
            done[policy.name] = asked[policy.name], player.serve(policy, asked[policy.name])
            if options.live:
                said[policy.name][turn.number] = player.wording.text(done[policy.name][1].answer)
        found = {p.name: _outcome(p.name, done, player, options) for p in options.policies}
    except InputError as error:
        return Row(*facts, skipped=str(error))
    except RuntimeError as error:  # the model's own: no memory, for example
        return Row(*facts, skipped=f"{FAILED}{error}")
    return Row(*facts, changes=dict(asked["dense"].changes), policies=found)


def _asked(turn: Turn, player: Player, options: Options, said: dict[int, str]) -> Asked:
    """Raises InputError where the call cannot be put to this model."""
    call, wording = turn.call, player.wording
    try:
        chat, changes = wording.chat(rewritten(turn, said) if options.live else call.messages)
        ids = wording.prompt(chat)
        answer = None if options.live else wording.answer(chat, call.output)
    except (UnicodeError, TypeError) as error:  # half a character, for example
        raise InputError(f"it cannot be put into tokens: {error}") from error
    needed = len(ids) + (options.new_tokens if answer is None else len(answer))
    if player.limit is not None and needed > player.limit:
        raise InputError(f"it needs {needed} tokens, the model's context is {player.limit} (--context N)")
    tenant = "" if options.across else call.session
    return Asked(tenant, call.agent, chat, ids, answer, options.new_tokens, changes)


def _outcome(name: str, done: dict[str, tuple[Asked, Served]], player: Player, options: Options) -> Outcome:
    asked, served = done[name]
    facts = Outcome(
        served.ttft_ms, served.reused_tokens, served.tokens_by_rung, len(asked.ids), len(served.answer), served.fallback,
        text=player.wording.text(served.answer) if options.live else None,
        same_text=list(served.answer) == list(done["dense"][1].answer) if options.live and name != "dense" else None,
    )  # fmt: skip
    if name == "dense":
        return facts
    dense = player.dense(asked, served.answer) if options.live else done["dense"][1].heard
    measured = agreement(dense, served.heard)
    text, piece, said = player.wording.text, player.wording.piece, list(served.answer)
    differs = [
        (at, text(said[max(0, at - SHOWN) : at])[-SHOWN:], piece(theirs), piece(mine), text(said[at : at + SHOWN])[:SHOWN])
        for at, theirs, mine in measured.differs
    ]
    return Outcome(**{**asdict(facts), **asdict(measured), "differs": differs})
