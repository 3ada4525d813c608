"""Looking for a head, in virtual time: what is found, when, and what is given up. The other agents are made up."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import virtual

from raylaunch import timing
from raylaunch.cluster.membership import head_search
from raylaunch.cluster.membership.control_channel import AlreadyHere, ControlClient, NotHead
from raylaunch.cluster.membership.head_search import HeadSearch
from raylaunch.errors import BringUpError
from raylaunch.state import files, records
from raylaunch.state.records import Head

LOST = Head(canary="c", incarnation=3, node="n1", hostname="n1", address="a1", control_port=1, gcs="", dashboard_port=1,
            time=0.0)  # fmt: skip
NEWER = replace(LOST, incarnation=4, node="n3", address="a3")


class Connection:
    closed = False

    def close(self) -> None:
        self.closed = True


class Network:
    """Who answers: address → what connecting gives, and what asking gives (an exception is raised)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.directory = directory
        self.heads: dict[str, Callable[[], Any]] = {}
        self.answers: dict[str, Any] = {}
        self.led: list[tuple[int, str]] = []
        monkeypatch.setattr(ControlClient, "connect", self._connect)
        monkeypatch.setattr(head_search.control_channel, "ask", self._ask)

    async def _connect(self, address: str, *_: Any) -> Any:
        found = self.heads.get(address, OSError)()
        if isinstance(found, Exception):
            raise found
        return found

    async def _ask(self, address: str, *_: Any) -> str:
        found = self.answers.get(address, OSError("no route"))
        if isinstance(found, Exception):
            raise found
        return str(found)

    async def lead(self, incarnation: int, why: str) -> Head:
        self.led.append((incarnation, why))
        self.heads["a2"] = Connection
        return replace(LOST, incarnation=incarnation, node="n2", address="a2")

    def table(self, *nodes: str, **states: str) -> None:
        rows = [
            {
                "name": n,
                "state": states.get(n, "ready"),
                "since": 0,
                "index": i,
                "address": f"a{n[1:]}",
                "control_port": 1,
            }
            for i, n in enumerate(nodes)
        ]
        files.write_json(self.directory / records.MEMBERS_FILE, {"canary": "c", "incarnation": 3, "nodes": rows})

    async def search(self, gone: bool = True) -> tuple[Any, Head]:
        return await HeadSearch(
            self.directory, "c", "n2", "token", dict, self.lead, frozenset, lost=LOST, gone=gone
        ).search()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Network:
    return Network(monkeypatch, tmp_path)


def test_a_hiccup_of_the_network_is_no_end(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    async def main() -> None:
        began = time.monotonic()
        network.table("n1", "n2", "n3")
        network.heads["a1"] = lambda: Connection() if time.monotonic() > began + 1.0 else OSError()
        network.answers["a3"] = "sees"
        _, head = await network.search(gone=False)
        assert head == LOST and time.monotonic() < began + 2.0

    virtual.run(monkeypatch, main)
    assert not network.led and records.claims(network.directory) == []


def test_a_newer_head_is_followed(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    async def main() -> None:
        network.table("n1", "n2", "n3")
        network.heads["a3"] = Connection
        NEWER.write(network.directory / records.HEAD_FILE)
        assert (await network.search())[1] == NEWER

    virtual.run(monkeypatch, main)


def test_a_majority_that_has_lost_it_elects(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    async def main() -> None:
        network.table("n1", "n2", "n3")
        network.answers["a3"] = "lost"
        _, head = await network.search()
        assert (head.node, head.incarnation) == ("n2", 4)

    virtual.run(monkeypatch, main)
    ((incarnation, why),) = network.led
    assert incarnation == 4 and "n2, n3" in why and records.claims(network.directory) == [4]


def test_no_majority_waits_and_gives_up(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    for name in ("LOOK_EVERY", "ASK_EVERY", "FILES_EVERY", "RECONNECT_EVERY"):  # ten minutes are many looks
        monkeypatch.setattr(head_search, name, 5.0)

    async def main() -> None:
        network.table("n1", "n2", "n3", "n4", "n5")
        network.answers["a3"] = "lost"
        began = time.monotonic()
        with pytest.raises(BringUpError, match="no other was elected"):
            await network.search()
        assert timing.PATIENCE <= time.monotonic() - began < timing.PATIENCE + 10

    virtual.run(monkeypatch, main)
    assert not network.led


def test_a_head_that_is_no_head_any_more_is_gone(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    """Its agent is back as a plain member: no verdict is waited for."""

    async def main() -> None:
        network.table("n1", "n2")
        network.heads["a1"] = lambda: NotHead("a plain member")
        began = time.monotonic()
        await network.search(gone=False)
        assert time.monotonic() - began < timing.VERDICT

    virtual.run(monkeypatch, main)
    assert network.led


def test_another_job_s_agent_on_this_node_is_insisted_against_for_a_while(
    monkeypatch: pytest.MonkeyPatch, network: Network
) -> None:
    """One that has just died is found by then."""

    async def main() -> None:
        network.table("n1", "n2", "n3")
        network.answers["a3"] = "sees"
        network.heads["a1"] = lambda: AlreadyHere("by job 8")
        began = time.monotonic()
        with pytest.raises(AlreadyHere):
            await network.search(gone=False)
        assert time.monotonic() - began >= timing.ALREADY_LIMIT

    virtual.run(monkeypatch, main)


def test_a_winner_that_dies_before_it_is_reached_is_replaced(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    async def main() -> None:
        network.table("n1", "n2")
        network.answers["a1"] = ConnectionRefusedError()  # its agent is dead
        assert records.claim(network.directory, 4, "n3")
        NEWER.write(network.directory / records.HEAD_FILE)
        began = time.monotonic()
        _, head = await network.search()
        assert head.incarnation == 5 and time.monotonic() - began > timing.PUBLISH_LIMIT

    virtual.run(monkeypatch, main)


def test_storage_that_fails_does_not_end_the_search(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    async def main() -> None:
        (network.directory / records.MEMBERS_FILE).mkdir()  # it cannot be read
        began = time.monotonic()
        network.heads["a1"] = lambda: Connection() if time.monotonic() > began + 30.0 else OSError()
        assert (await network.search())[1] == LOST

    virtual.run(monkeypatch, main)


def test_a_claim_that_was_made_though_it_failed_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, network: Network
) -> None:
    """As that of a winner who died."""
    claim, errors = records.claim, [OSError(errno.EIO, "the answer got lost")]

    def failing(*arguments: Any) -> bool:
        made = claim(*arguments)
        if errors:
            raise errors.pop()
        return made

    async def main() -> None:
        network.table("n1", "n2", "n3")
        network.answers["a3"] = "lost"
        assert (await network.search())[1].incarnation == 5

    monkeypatch.setattr(records, "claim", failing)
    virtual.run(monkeypatch, main)
    assert records.claims(network.directory) == [4, 5]


def test_a_search_that_is_given_up_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    async def main() -> None:
        network.table("n1", "n2", "n3")
        searching = asyncio.create_task(network.search(gone=False))
        await asyncio.sleep(1.0)
        searching.cancel()
        await asyncio.gather(searching, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    virtual.run(monkeypatch, main)
