"""Electing a new head among the agents that are left: who may claim it, and when. Pure.

An agent that lost its head asks the other agents whether they still see it, and looks at what the
head wrote last. A claim needs more than half of those who were members, so that a few nodes cut off
from the rest never make a second cluster; nodes that Slurm calls down count no more. Claiming is
the exclusive creation of a numbered file (`claims`), so that two who think the same at once still
make one head. A head that is not dead but was thought so finds the higher number, and ends itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from raylaunch.timing import LONELY, PATIENCE, PUBLISH_LIMIT, TOGETHER, TURN, VERDICT

Answer = Literal["sees", "lost"]
"""What another agent says of the head: it is connected to it, or it has lost it, too."""


@dataclass(frozen=True)
class ElectionFacts:
    """What an agent without a head knows."""

    me: str
    candidates: tuple[str, ...]
    """Those who were members, without the lost head unless that is me; the first is preferred."""
    answers: Mapping[str, Answer]
    """What those say that can be reached; not me."""
    silent: float
    """Seconds since the connection was lost."""
    gone: bool
    """The head's end said goodbye: its process is dead, for a cut cable says nothing."""
    disowned: bool
    """The head wrote that it holds us for lost: it has outlived us."""
    down: frozenset[str] = frozenset()
    """Nodes that Slurm has taken out of the job, and those whose agent is dead: its port refuses."""
    head: str = ""
    """The lost head's node."""


@dataclass(frozen=True)
class Wait:
    """Ask again."""

    reason: str


@dataclass(frozen=True)
class Claim:
    """Become the head."""

    reason: str
    voters: tuple[str, ...]


@dataclass(frozen=True)
class Leave:
    """Nobody will come: end this node."""

    reason: str


class Voter(Protocol):
    """A row of members.json, as far as elections need it."""

    name: str
    state: str
    since: float
    index: int | None
    joiner: bool


def candidates(rows: Sequence[Voter], me: str, head: str) -> tuple[str, ...]:
    """Who were members, from the lost head's table: base nodes before joiners, in the job's order; the lost
    head's own node only if that is me, and last.

    A head that was cut off holds us all for lost: whoever was lost with me counts, whoever was before does not.
    """
    mine = next((row for row in rows if row.name == me), None)
    since = mine.since - TOGETHER if mine is not None and mine.state == "lost" else float("inf")

    def counts(row: Voter) -> bool:
        if row.name == me:
            return True
        lost_before = row.state == "lost" and row.since < since
        return row.name != head and row.state not in {"ended", "failed"} and not lost_before

    chosen = [row for row in rows if counts(row)]
    chosen.sort(key=lambda row: (row.name == head, row.joiner, row.index or 0, row.name))
    return tuple(row.name for row in chosen)


def decide(facts: ElectionFacts) -> Wait | Claim | Leave:
    """What an agent without a head does next."""
    seen_by = sorted(node for node, answer in facts.answers.items() if answer == "sees")
    head_is_down = facts.head in facts.down
    if facts.silent > PATIENCE:
        return Leave(f"no head for {facts.silent:.0f} s")
    if seen_by:
        return Wait(f"{seen_by[0]} still sees the head")
    if facts.me not in facts.candidates:
        return Wait("this node was no member yet")
    electorate = [node for node in facts.candidates if node not in facts.down or node == facts.me]
    voters = tuple(n for n in electorate if n == facts.me or facts.answers.get(n) == "lost")
    # A head that said nothing may yet be there, and one that disowned us was: it is a vote for itself.
    doubt = not head_is_down and (facts.disowned or (not facts.gone and facts.silent <= VERDICT))
    if 2 * len(voters) <= len(electorate) + doubt:
        return Wait(
            f"{len(voters)} of {len(electorate) + doubt} agents have lost the head: no majority"
            + ("; it holds this node for lost" if facts.disowned else "")
        )
    if len(electorate) == 1 and not head_is_down and facts.silent <= LONELY:
        return Wait("the head may have closed the connection itself, and say so")
    turn = voters.index(facts.me)
    if facts.silent < turn * TURN:
        return Wait(f"{voters[0]} comes first")
    return Claim(f"{len(voters)} of {len(electorate)} agents have lost {facts.head or 'the head'}", voters)


def may_claim(lost: int, newest: int, seen: float) -> bool:
    """Whether to claim the incarnation after `newest`, the newest claim, first seen `seen` seconds ago. Somebody who
    claimed one after the `lost` head's may be slow to write where it is; after a while it counts as dead."""
    return newest <= lost or seen >= PUBLISH_LIMIT
