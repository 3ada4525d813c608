"""Electing a head: who may claim, stepped through generated partitions and deaths."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylaunch.cluster.membership import election
from raylaunch.cluster.membership.election import PATIENCE, TURN, VERDICT, Answer, Claim, ElectionFacts, Leave, Wait
from raylaunch.state import records
from raylaunch.state.members import MemberRow


def facts(
    *, me: str = "b", candidates: tuple[str, ...] = ("b", "c", "d"), silent: float = 0.0, **more: object
) -> ElectionFacts:
    base: dict[str, object] = {
        "answers": {n: "lost" for n in candidates if n != me}, "gone": True, "disowned": False, "head": "a",
    }  # fmt: skip
    return ElectionFacts(me=me, candidates=candidates, silent=silent, **{**base, **more})  # type: ignore[arg-type]


def test_the_first_claims_at_once_the_next_waits_for_its_turn() -> None:
    assert isinstance(election.decide(facts()), Claim)
    assert isinstance(election.decide(facts(me="c")), Wait)
    assert isinstance(election.decide(facts(me="c", silent=TURN)), Claim)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"answers": {"c": "sees", "d": "lost"}}, "still sees"),
        ({"answers": {}}, "no majority"),
        ({"disowned": True, "candidates": ("b",), "answers": {}}, "holds this node for lost"),
        ({"me": "x", "answers": dict.fromkeys("bcd", "lost")}, "no member"),
    ],
)
def test_no_claim_without_right(changes: dict[str, object], why: str) -> None:
    for silent in (0.0, VERDICT, PATIENCE - 1):
        decision = election.decide(facts(silent=silent, **changes))  # type: ignore[arg-type]
        assert isinstance(decision, Wait) and why in decision.reason
    assert isinstance(election.decide(facts(silent=PATIENCE + 1, **changes)), Leave)  # type: ignore[arg-type]


def test_slurm_s_word_frees_the_last_one() -> None:
    alone = facts(answers={}, down=frozenset({"c", "d"}), gone=False)
    assert isinstance(election.decide(alone), Wait)  # the head may live on
    for certain in (
        facts(answers={}, down=frozenset({"a", "c", "d"}), gone=False),
        facts(answers={}, down=frozenset({"c", "d"}), gone=True, silent=1.1),
        facts(answers={}, down=frozenset({"c", "d"}), gone=False, silent=VERDICT + 0.1),
    ):
        assert isinstance(election.decide(certain), Claim)


def row(name: str, state: str = "ready", since: float = 0.0, **more: Any) -> MemberRow:
    return MemberRow(name=name, state=state, since=since, **more)


def test_candidates() -> None:
    head, joiner = row("a", index=0), row("j", joiner=True, index=0)
    rows = [joiner, row("c", index=2), row("b", index=1), head, row("old", "ended", index=3)]
    assert election.candidates(rows, "b", "a") == ("b", "c", "j")
    assert election.candidates(rows, "a", "a") == ("b", "c", "j", "a")  # its agent was killed and came back
    # Lost before: it has no vote. Lost together with me, by a head that was cut off: it has one.
    assert election.candidates([head, row("b"), row("c", "lost", 50.0)], "b", "a") == ("b",)
    cut = [head, row("b", "lost", 100.0), row("c", "lost", 100.5), row("d", "lost", 50.0)]
    assert election.candidates(cut, "b", "a") == ("b", "c")


@dataclass
class Site:
    """Nodes in a network that falls apart: each is in one island, some are dead."""

    nodes: list[str]
    island: dict[str, int]
    dead: set[str]
    links: set[str] = field(default_factory=set)
    """Agents that are connected to the head."""

    def facts(self, me: str, head: str, silent: float) -> ElectionFacts:
        def reaches(other: str) -> bool:
            return other not in self.dead and self.island[other] == self.island[me]

        answers: dict[str, Answer] = {
            n: "sees" if n in self.links else "lost" for n in self.nodes if n not in {me, head} and reaches(n)
        }
        head_lives = head not in self.dead
        return ElectionFacts(
            me=me, candidates=tuple(n for n in self.nodes if n != head), answers=answers, silent=silent,
            gone=head in self.dead and self.island[head] == self.island[me],
            # The directory is reached from every island here: the hardest case, for all see the same files.
            disowned=head_lives and silent > 3.0, head=head,
        )  # fmt: skip


@st.composite
def sites(draw: st.DrawFn) -> Site:
    nodes = [f"n{i}" for i in range(draw(st.integers(2, 7)))]
    island = {n: draw(st.integers(0, 2)) for n in nodes}
    dead = set(draw(st.lists(st.sampled_from(nodes), max_size=len(nodes) - 1)))
    head = nodes[0]
    links = {n for n in nodes if n not in dead and head not in dead and island[n] == island[head]}
    return Site(nodes, island, dead, links)


@settings(max_examples=500, deadline=None)
@given(sites())
def test_at_most_one_island_elects_and_never_beside_a_majority_with_its_head(site: Site) -> None:
    head = site.nodes[0]
    claims: set[int] = set()
    for tenth in range(600):  # after the last turn nothing changes any more
        silent = tenth / 10
        for me in site.nodes[1:]:
            if me in site.dead or me in site.links:
                continue
            decision = election.decide(site.facts(me, head, silent))
            if isinstance(decision, Claim):
                claims.add(site.island[me])
                assert me in decision.voters and not set(decision.voters) & site.dead
    assert len(claims) <= 1
    if head not in site.dead and len(site.links) * 2 > len(site.nodes) - 1:
        assert not claims
    survivors = [n for n in site.nodes[1:] if n not in site.dead]
    if head in site.dead and len({site.island[n] for n in survivors}) == 1 and 2 * len(survivors) > len(site.nodes) - 1:
        assert claims, "a majority in one piece has to find its head"


def test_one_claim_wins(tmp_path: Path) -> None:
    assert records.claim(tmp_path, 2, "b") and not records.claim(tmp_path, 2, "c")
    assert records.claim(tmp_path, 3, "c", "15:1") and records.claims(tmp_path) == [2, 3]
    assert records.began(tmp_path, "15:1") == 3 and records.began(tmp_path, "15:2") is None
