"""The head's duties, with a directory and members by hand: no agent, no Ray, no Slurm."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from raylaunch import layout, state
from raylaunch.config import Config
from raylaunch.head import HeadDuties
from raylaunch.layout import Cluster, Head
from raylaunch.link import Member, Members


class Place:
    """A cluster directory, and heads that lead it one after the other."""

    def __init__(self, state_dir: Path) -> None:
        self.directory = state_dir / "clusters" / "main"
        for part in (layout.REQUESTS, layout.INCARNATIONS, layout.LOGS, layout.NODES):
            (self.directory / part).mkdir(parents=True)
        self.cluster = Cluster("main", "local", 1, "canary", 0.0, 1, 8, 1, ("local",))
        self.cluster.write(self.directory / layout.CLUSTER_FILE)
        self.stopped: list[str] = []
        self.resigned: list[str] = []

    def head(self, incarnation: int) -> Head:
        return Head("canary", incarnation, "n1", "n1", "127.0.0.1", 1, "", 1, float(incarnation), "local")

    def lead(self, incarnation: int, config: Config | None = None, nodes: int = 4) -> HeadDuties:
        """The head of the next incarnation, which has claimed it."""
        assert layout.claim(self.directory, incarnation, "n1")
        return HeadDuties(
            self.directory, self.cluster, config or Config(), self.head(incarnation), Members("t", lambda: "lost"), {},
            self.stopped.append, self.resigned.append, nodes,
        )  # fmt: skip

    def read(self, name: str) -> Any:
        return json.loads((self.directory / name).read_text())

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return state.read_events(self.directory, *kinds)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def hide_listings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a client of NFS has them: nothing that others made is listed."""
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))


def test_a_claim_that_no_listing_shows_is_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert layout.claim(place.directory, 1, "n1") and not layout.is_fenced(place.directory, 1)
    hide_listings(monkeypatch)
    assert layout.claim(place.directory, 2, "n2")
    assert layout.is_fenced(place.directory, 1) and not layout.is_fenced(place.directory, 2)


def test_a_newer_head_json_fences_where_the_claim_cannot_be_seen(place: Place) -> None:
    assert layout.claim(place.directory, 1, "n1")
    place.head(2).write(place.directory / layout.HEAD_FILE)
    assert layout.is_fenced(place.directory, 1)


def test_a_head_of_a_past_life_is_fenced(place: Place) -> None:
    """`up` removes the claims of the life before."""
    assert layout.claim(place.directory, 1, "n1")
    (place.directory / layout.INCARNATIONS / "00000001").unlink()
    assert layout.is_fenced(place.directory, 1)


@pytest.mark.parametrize("name", [layout.HEAD_FILE, layout.MEMBERS_FILE, layout.DUTIES_FILE])
def test_the_last_words_of_an_older_head_are_replaced(place: Place, name: str) -> None:
    """It was frozen between its look at the fence and its write."""

    async def story() -> None:
        old, new = place.lead(1), place.lead(2)
        new.members.table["n1"] = Member("n1", {"state": "ready"})
        new._memory.queue = ["wanted"]
        new._duties_file.write(asdict(new._memory))
        new._save_table(new.table())
        new._head_file.write(asdict(new.head))
        expected = place.read(name)
        new._restore()
        assert not place.events("restored")
        old._head_file.write(asdict(old.head))
        old._duties_file.write(asdict(old._memory))
        old._members_file.write({"incarnation": 1, "nodes": []})
        assert place.read(name) != expected
        new._restore()
        assert place.read(name) == expected
        new._restore()
        await new._off_loop(lambda: None)
        assert [row["file"] for row in place.events("restored")].count(name) == 1

    run(story)
