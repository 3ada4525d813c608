"""The head's duties, with a directory and members by hand: no agent, no Ray, no Slurm."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from made_heads import Place, heard, joined, lost, run

from raylaunch.cli import cli
from raylaunch.cluster import down
from raylaunch.cluster.head import HeadController
from raylaunch.cluster.head.context import Replaced
from raylaunch.cluster.membership.control_channel import Member
from raylaunch.cluster.node_loop.node_loop import LoopResult
from raylaunch.config.schema import Config
from raylaunch.errors import StateError
from raylaunch.scheduler.backends import Job
from raylaunch.state import files, records, requests, runs
from raylaunch.state.head_state import Draining
from raylaunch.state.members import MemberRow, NodeInfo
from raylaunch.state.records import Cluster
from raylaunch.state.requests import Ask, DownAsk, DrainAsk, DrainedAsk, RunAsk, ScaleAsk, StrikeAsk
from raylaunch.training.cluster_view import ClusterView


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def stale(*_: object) -> Any:
    """What storage answers whose server was exchanged."""
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.005)


def hide_listings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a client of NFS has them: nothing that others made is listed."""
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))


def test_a_claim_that_no_listing_shows_is_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert records.claim(place.directory, 1, "n1") and not records.is_fenced(place.directory, 1)
    hide_listings(monkeypatch)
    assert records.claim(place.directory, 2, "n2")
    assert records.is_fenced(place.directory, 1) and not records.is_fenced(place.directory, 2)


def test_a_directory_that_cannot_be_listed_is_not_an_empty_one(place: Place) -> None:
    file = place.directory / "no-directory"
    assert records.claims(file) == []
    file.write_text("")
    with pytest.raises(NotADirectoryError):
        records.claims(file)


def test_a_newer_head_json_fences_where_the_claim_cannot_be_seen(place: Place) -> None:
    assert records.claim(place.directory, 1, "n1")
    place.head(2).write(place.directory / records.HEAD_FILE)
    assert records.is_fenced(place.directory, 1)


def test_a_storage_that_is_gone_fences_nobody(place: Place) -> None:
    assert records.claim(place.directory, 1, "n1")
    place.directory.rename(place.directory.with_name("elsewhere"))
    assert not records.is_fenced(place.directory, 1)


def test_a_head_that_was_replaced_resigns_and_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event is written at its end: a driver, or the agent's search for a head, may have found it first."""
    monkeypatch.setattr("raylaunch.cluster.head.head.FENCE_EVERY", 0.0)

    async def story() -> None:
        await place.lead(1).abandon()
        assert not place.events("fenced")
        head = place.lead(2)
        await head.open("")
        assert records.claim(place.directory, 3, "n2")
        await until(lambda: place.resigned)
        await head.abandon()

    run(story)
    assert place.resigned == ["a newer incarnation has begun"]
    (event,) = place.events("fenced")
    assert (event["node"], event["incarnation"]) == ("n1", 2)


def test_a_head_of_a_past_life_is_fenced(place: Place) -> None:
    """`up` removes the claims of the life before."""
    assert records.claim(place.directory, 1, "n1")
    (place.directory / records.INCARNATIONS / "00000001").unlink()
    assert records.is_fenced(place.directory, 1)


@pytest.mark.parametrize("name", [records.HEAD_FILE, records.MEMBERS_FILE, records.DUTIES_FILE])
def test_the_last_words_of_an_older_head_are_replaced(place: Place, name: str) -> None:
    """It was frozen between its look at the fence and its write."""

    async def story() -> None:
        old, new = place.lead(1), place.lead(2)
        new.table.members.table["n1"] = Member("n1", NodeInfo(state="ready"))
        new.context.memory.queue = ["wanted"]
        new.context.duties_file.write(asdict(new.context.memory))
        new.table.write(new.table.rows())
        new._file.write(asdict(new.head))
        expected = place.read(name)
        new.restore()
        assert not place.events("restored")
        old._file.write(asdict(old.head))
        old.context.duties_file.write(asdict(old.context.memory))
        old.table._file.write({"incarnation": 1, "nodes": []})
        assert place.read(name) != expected
        new.restore()
        assert place.read(name) == expected
        new.restore()
        await new.context.off_loop(lambda: None)
        assert [row["file"] for row in place.events("restored")].count(name) == 1

    run(story)


def test_a_head_that_was_replaced_before_it_began_writes_nothing(place: Place) -> None:
    async def story() -> None:
        old, new = place.lead(1), place.lead(2)
        new.context.memory.running = "r"  # which a head that takes over queues again
        new.context.duties_file.write(asdict(new.context.memory))
        expected = place.read(records.DUTIES_FILE)
        with pytest.raises(Replaced):
            await old.open("")
        assert place.read(records.DUTIES_FILE) == expected and not (place.directory / records.HEAD_FILE).exists()

    run(story)


def test_what_another_version_remembered_is_read(place: Place) -> None:
    head = place.lead(1)
    memory = asdict(head.context.memory) | {"canary": "canary", "later": 1, "wanted": 5}
    memory["draining"] = {"n3": {"reason": "broken", "agent": 1, "left": True, "since": 3}}
    files.write_json(place.directory / records.DUTIES_FILE, memory)
    found = place.lead(2).context.memory
    assert (found.wanted, found.draining) == (5, {"n3": Draining("broken", 1, left=True)})


# -- requests --------------------------------------------------------------------------------------


def left_over(place: Place) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in (place.directory / records.REQUESTS).iterdir())


def asked(place: Place, what: Ask) -> Path:
    return requests.ask(place.directory, what)


def test_a_request_is_deleted_when_it_is_remembered(place: Place) -> None:
    async def story() -> None:
        head = place.lead(1)
        asked(place, RunAsk(run="one"))
        asked(place, ScaleAsk(nodes=3))
        await head.requests.turn()
        assert left_over(place) == []
        assert (place.read("duties.json")["queue"], place.read("duties.json")["wanted"]) == (["one"], 3)

    run(story)


def test_a_head_that_was_replaced_takes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was frozen, and a newer one leads: no listing tells."""

    async def story() -> None:
        old, new = place.lead(1), place.lead(2)
        path = asked(place, RunAsk(run="mine"))
        with monkeypatch.context() as patch:
            patch.setattr(records, "claims", lambda _: [1])
            await old.requests.turn()
        assert path.exists() and place.read("duties.json")["queue"] == []
        await new.requests.turn()
        assert place.read("duties.json")["queue"] == ["mine"] and not path.exists()

    run(story)


class Killed(Exception):
    """The head dies here."""


def die(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("moment", ["taken", "remembered", "replaced"])
def test_a_head_dies_with_a_request_in_its_hands(place: Place, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Its successor does what was asked, once."""

    async def story() -> None:
        old = place.lead(1)
        asked(place, RunAsk(run="mine"))
        asked(place, StrikeAsk(node="n3", reason="broken"))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if moment == "taken":
                patch.setattr(old.context.duties_file, "write", die)
            elif moment == "remembered":
                patch.setattr("raylaunch.state.requests.Request.done", die)
            else:  # between its look at the fence and its write; it writes all the same
                write = old.context.duties_file.write
                patch.setattr(old.context.duties_file, "write", lambda value: (write(value), claim_next()))
            await old.requests.turn()
            await old.context.off_loop(lambda: None)
            if moment == "replaced":
                raise Killed
        assert len(left_over(place)) == 2
        new = place.lead(3 if moment == "replaced" else 2)
        await new.requests.turn()
        assert new.context.memory.queue == ["mine"] and new.context.memory.strikes == {"n3": 1}
        assert left_over(place) == [] and place.read("duties.json")["strikes"] == {"n3": 1}

    def claim_next() -> None:
        records.claim(place.directory, 2, "n2")

    run(story)


def test_what_was_done_is_remembered_though_no_listing_shows_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        old = place.lead(1)
        asked(place, StrikeAsk(node="n3", reason="broken"))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr("raylaunch.state.requests.Request.done", die)
            await old.requests.turn()
        with monkeypatch.context() as patch:
            hide_listings(patch)
            new = place.lead(2)
        await new.requests.turn()
        assert new.context.memory.strikes == {"n3": 1} and left_over(place) == []

    run(story)


def test_a_request_that_cannot_be_read_is_said_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is looked for three times a second, and may stay like that."""
    assert records.claim(place.directory, 1, "n1")
    path, answers = asked(place, RunAsk(run="one")), ["stale", "stale", "denied"]

    def refuse(_: Path) -> bytes:
        raise OSError(answers.pop(0))

    monkeypatch.setattr(requests, "_read", refuse)
    assert [requests.take(place.directory, 1) for _ in (1, 2, 3)] == [[]] * 3
    said = [record.message for record in caplog.records]
    assert ["stale" in words for words in said] == [True, False] and all(path.stem in words for words in said)


def test_the_next_life_removes_whatever_lies_among_the_requests(place: Place) -> None:
    """A directory, say, that was set aside as no request."""
    (place.directory / records.REQUESTS / "a.json" / "deep").mkdir(parents=True)
    asked(place, RunAsk(run="one"))
    down.clear_life(place.directory)
    assert left_over(place) == []


def test_a_head_is_replaced_while_it_writes_what_it_took(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was frozen after its look at the fence; its successor has read duties.json before it thaws and writes."""
    newer: list[HeadController] = []

    async def story() -> None:
        old = place.lead(1)
        write = old.context.duties_file.write

        def thaw(value: Any) -> None:
            newer.append(place.lead(2))
            write(value)

        monkeypatch.setattr(old.context.duties_file, "write", thaw)
        asked(place, RunAsk(run="mine"))
        await old.requests.turn()
        assert len(left_over(place)) == 1
        (new,) = newer
        new.restore()
        await new.requests.turn()
        assert place.read("duties.json")["queue"] == ["mine"] and left_over(place) == []

    run(story)


def test_a_disk_that_is_full_keeps_the_request(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        head = place.lead(1)
        asked(place, StrikeAsk(node="n3", reason="broken"))
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(head.context.duties_file, "write", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
            await head.requests.turn()
        assert len(left_over(place)) == 1
        await head.requests.turn()
        assert left_over(place) == [] and place.read("duties.json")["strikes"] == {"n3": 1}

    run(story)


def test_a_run_that_is_queued_twice_runs_once(place: Place) -> None:
    async def story() -> None:
        head = place.lead(1)
        asked(place, RunAsk(run="mine"))
        asked(place, RunAsk(run="mine"))
        await head.requests.turn()
        assert place.read("duties.json")["queue"] == ["mine"]

    run(story)


def test_one_request_that_is_wrong_keeps_no_other_from_being_done(place: Place) -> None:
    async def story() -> None:
        head = place.lead(1)
        wrong = ({"kind": "scale", "nodes": "many"}, {"kind": "scale", "nodes": float("inf")}, {"kind": "scale", "nodes": -1},
                 {"kind": "down", "save_limit": True}, {"kind": "strike", "node": "n1"}, {"kind": "dance"},
                 *({"kind": "run", "run": name} for name in ("", "../x", "a\0b", "\udcff", "a" * 300)))  # fmt: skip
        for number, values in enumerate(wrong):
            files.write_json(place.directory / records.REQUESTS / f"0-{number}.json", values)
        (place.directory / records.REQUESTS / "1-torn-x.json").write_text('{"kind": "ru')
        (place.directory / records.REQUESTS / ".2-half.json").write_text('{"kind": "ru')
        asked(place, RunAsk(run="good"))
        await head.requests.turn()
        assert place.read("duties.json")["queue"] == ["good"]
        await head.requests.turn()
        assert sorted(name.rpartition(".")[2] for name in left_over(place)) == [*["bad"] * (len(wrong) + 1), "json"]
        await head.context.off_loop(lambda: None)
        assert len(place.events("request_refused")) == len(wrong)

    run(story)


def test_a_request_that_cannot_be_read_is_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        head = place.lead(1)
        asked(place, RunAsk(run="mine"))
        with monkeypatch.context() as patch:
            patch.setattr("raylaunch.state.requests._read", stale)
            patch.setattr(records, "is_fenced", lambda *_: False)
            await head.requests.turn()
        assert len(left_over(place)) == 1 and not head.context.memory.queue
        await head.requests.turn()
        assert left_over(place) == [] and head.context.memory.queue == ["mine"]

    run(story)


def odd(folder: Path, kind: str) -> None:
    """A file that sorts before all requests."""
    path = folder / "0-odd.json"
    match kind:
        case "deeply nested":
            path.write_text("[" * 60000)
        case "large":
            path.write_text('{"kind": "run", "run": "odd"}' + " " * 65536)
        case "a pipe":
            os.mkfifo(path)
        case "a link":
            (folder / ".elsewhere").write_text('{"kind": "run", "run": "odd"}')
            path.symlink_to(folder / ".elsewhere")
        case "a directory":
            path.mkdir()
        case name:
            (folder / name).write_text('{"kind": "run", "run": "odd"}')


async def good_is_done_beside(place: Place, kind: str) -> None:
    """A request is taken though an odd file lies there."""
    head = place.lead(1)
    odd(place.directory / records.REQUESTS, kind)
    asked(place, RunAsk(run="good"))
    await head.requests.turn()
    assert head.context.memory.queue == ["good"]


@pytest.mark.parametrize("kind", ["deeply nested", "large", "a pipe", "a link", "a directory"])
def test_what_is_no_request_is_set_aside_and_keeps_no_other_from_being_done(place: Place, kind: str) -> None:
    async def story() -> None:
        await good_is_done_beside(place, kind)
        assert left_over(place)[-1] == "odd.bad"

    run(story)


@pytest.mark.parametrize("name", ["0-odd.taken-00000001~", "0-odd.taken-1.bak", "0-odd.taken-"])
def test_a_file_of_somebody_s_own_is_left_alone(place: Place, name: str) -> None:
    async def story() -> None:
        await good_is_done_beside(place, name)
        assert left_over(place) == [name.removeprefix("0-")]

    run(story)


def test_down_is_heard_by_the_next_head_too(place: Place) -> None:
    async def story() -> None:
        old = place.lead(1)
        asked(place, DownAsk(save_limit=5))
        await old.requests.turn()
        await old.requests.turn()
        assert old.context.course.ending and len(left_over(place)) == 1
        new = place.lead(2)
        await new.requests.turn()
        assert new.context.course.ending

    run(story)


def test_the_end_of_another_allocation_s_time_is_over(place: Place) -> None:
    async def story() -> None:
        head = place.lead(1)
        path = place.directory / records.REQUESTS / "walltime.json"
        files.write_json(path, {"kind": "walltime", "life": "6:0"})
        await head.requests.turn()
        assert not head.ending._noticed and left_over(place) == []
        for _ in range(2):  # the batch script's has always the same name
            files.write_json(path, {"kind": "walltime", "allocation": head.head.allocation})
            await head.requests.turn()
        assert head.ending._noticed
        head.context.cancel_all()

    run(story)


def test_the_end_of_this_allocation_s_time_is_heard_though_a_head_died_behind_that_of_another(place: Place) -> None:
    """The head had remembered and deleted the other one's request, which has the same name."""

    async def story() -> None:
        path = place.directory / records.REQUESTS / "walltime.json"
        files.write_json(path, {"kind": "walltime", "life": "6:0"})
        await place.lead(1).requests.turn()
        assert place.read("duties.json")["taken"] == ["walltime"] and left_over(place) == []
        head = place.lead(2)
        files.write_json(path, {"kind": "walltime", "life": head.head.allocation})
        await head.requests.turn()
        assert head.ending._noticed
        head.context.cancel_all()

    run(story)


def test_a_node_that_drains_does_so_under_the_next_head(place: Place) -> None:
    """Unless another agent has come in place of the one that was to go."""

    def connect(head: HeadController, pid: int) -> None:
        head.table.members.table["n2"] = Member("n2", NodeInfo(state="ready", pid=pid))
        head.table.changed(head.table.members.table["n2"], "joined")

    async def story() -> None:
        old = place.lead(1)
        connect(old, 22)
        old.context.memory.running = "r"
        asked(place, DrainAsk(node="n2", reason="too many"))
        await old.requests.turn()
        new = place.lead(2)
        new.context.memory.running = "r"
        connect(new, 22)
        assert new.table.state_of(new.table.members.table["n2"]) == "draining"
        connect(new, 23)
        assert new.table.state_of(new.table.members.table["n2"]) == "ready"

    run(story)


def test_a_drained_node_that_does_not_hear_its_end_is_told_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is down when the driver says, once, that it has left; this head or the next hears from it again."""
    ended: list[HeadController] = []

    def connect(head: HeadController) -> None:
        head.table.members.table["n2"] = Member("n2", NodeInfo(state="ready", pid=22))
        monkeypatch.setattr(head.table.members, "order", lambda *_, only: only.alive and ended.append(head))
        head.table.changed(head.table.members.table["n2"], "joined")

    async def story() -> None:
        old = place.lead(1)
        old.context.memory.running = "r"
        connect(old)
        old.table.drain("n2", "Slurm drains it")
        connect(old)
        assert not ended  # the run is there
        lost(old, "n2")
        asked(place, DrainedAsk(node="n2"))
        await old.requests.turn()
        assert not ended and place.read("duties.json")["draining"]["n2"]["left"]
        connect(old)
        new = place.lead(2)
        new.context.memory.running = "r"
        connect(new)
        assert ended == [old, new]

    run(story)


def test_a_node_that_drains_since_an_older_version(place: Place) -> None:
    place.lead(1)
    files.write_json(place.directory / records.DUTIES_FILE, {"canary": "canary", "draining": {"n2": {"reason": "x"}}})
    assert place.lead(2).context.memory.draining == {"n2": Draining("x")}


# -- strikes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["ended", "lost"])
def test_whoever_is_gone_does_not_count_when_most_are_lost(place: Place, before: str) -> None:
    """A switch takes three nodes of four; twenty were here in the weeks before."""

    async def story() -> None:
        head = place.lead(1)
        old = [f"old{i}" for i in range(20)]
        joined(head, *old, "n1", "n2", "n3", "n4")
        lost(head, *old, ago=3600.0)
        for node in old:
            heard(head, node, state="ended" if before == "ended" else "ready")
        lost(head, "n2", "n3", "n4")
        for node in ("n2", "n3", "n4"):
            await head.table.record_loss(head.table.members.table[node], "silent", after=0.0)
        assert head.context.memory.strikes == {}

    run(story)


def test_one_node_of_four_that_is_lost_is_struck_whoever_was_lost_before(place: Place) -> None:
    async def story() -> None:
        head = place.lead(1)
        old = [f"old{i}" for i in range(20)]
        joined(head, *old, "n1", "n2", "n3", "n4")
        lost(head, *old, ago=3600.0)
        lost(head, "n4")
        await head.table.record_loss(head.table.members.table["n4"], "silent", after=0.0)
        assert head.context.memory.strikes == {"n4": 1}

    run(story)


def test_who_was_lost_before_an_election_is_not_struck_by_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylaunch.cluster.head.member_table.FOLLOW_LIMIT", 0.0)

    async def story() -> None:
        head = place.lead(2)
        states = ("ready", "ready", "ready", "lost", "lost")
        rows = [MemberRow(name=f"n{i}", state=state, since=5.0, job="1") for i, state in enumerate(states, 1)]
        head.table.inherit(rows)
        joined(head, "n1", "n2")
        await head.context.all_done()
        await head.context.off_loop(lambda: None)
        assert head.context.memory.strikes == {"n3": 1}
        assert [row["node"] for row in place.events("node_lost")] == ["n3"]
        assert next(row for row in head.table.rows() if row.name == "n4").since == 5.0

    run(story)


def test_the_table_keeps_the_last_of_those_who_are_gone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylaunch.cluster.head.member_table.KEEP_GONE", 3)

    async def story() -> None:
        head = place.lead(1)
        joined(head, *(f"n{i}" for i in range(10)))
        for i in range(8):
            lost(head, f"n{i}", ago=100.0 - i)
        head.table.forget_the_longest_gone()
        assert [row.name for row in head.table.rows()] == ["n5", "n6", "n7", "n8", "n9"]

    run(story)


def test_only_rows_that_have_changed_are_made_again(place: Place) -> None:
    async def story() -> None:
        head = place.lead(1)
        joined(head, "n1", "n2", "n3", "n4")
        before = head.table.rows()
        assert all(a is b for a, b in zip(before, head.table.rows(), strict=True))
        heard(head, "n2", state="ready")
        lost(head, "n3")
        head.context.memory.draining["n4"] = Draining("asked")
        rows = head.table.rows()
        assert rows[0] is before[0] and [row.state for row in rows[1:]] == ["ready", "lost", "draining"]
        del head.table.members.table["n4"]
        assert [row.name for row in head.table.rows()] == ["n1", "n2", "n3"]

    run(story)


def test_nobody_is_struck_by_a_head_that_may_have_been_replaced(place: Place) -> None:
    async def story() -> None:
        head = place.lead(1)
        joined(head, "n1", "n2", "n3", "n4")
        lost(head, "n4")
        head.context.is_fenced = stale  # type: ignore[method-assign]
        await head.table.record_loss(head.table.members.table["n4"], "silent", after=0.0)
        assert head.context.memory.strikes == {}

    run(story)


def test_the_node_loop_begins_when_the_storage_answers(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [stale, stale, lambda *_: SimpleNamespace(turn=turn)]
    turned: list[bool] = []

    def turn(*_: object) -> LoopResult:
        turned.append(True)
        return LoopResult(pause=1000.0)

    async def story() -> None:
        head = place.lead(1)
        head.context.ready.set()
        head.enough.set()
        head.context.spawn(head.nodes.run())
        await until(lambda: turned or place.stopped)
        head.context.cancel_all()

    monkeypatch.setattr("raylaunch.cluster.head.node_duty.NodeLoop", lambda *rest: answers.pop(0)(*rest))
    monkeypatch.setattr("raylaunch.cluster.head.node_duty.AFTER_FAILURE", 0.0)
    run(story)
    assert not place.stopped


# -- mistakes of our own ---------------------------------------------------------------------------


def test_a_mistake_in_the_node_loop_is_told_once_and_shown_until_it_is_over(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Exception | None] = [KeyError("n1"), KeyError("n2"), TypeError("x"), KeyError("n1"), None]
    shown: list[dict[str, str]] = []

    async def story() -> None:
        head = place.lead(1)
        head.context.ready.set()
        over = asyncio.Event()

        def turn(*_: object) -> LoopResult:
            shown.append(dict(head.context.errors.present))
            if not faults:
                head.table.closed = True
                loop.call_soon_threadsafe(over.set)
                return LoopResult(pause=1000.0)
            if (fault := faults.pop(0)) is not None:
                raise fault
            return LoopResult(pause=0.0)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr("raylaunch.cluster.head.node_duty.NodeLoop.turn", lambda _self, *rest: turn(*rest))
        monkeypatch.setattr("raylaunch.cluster.head.node_duty.LEAST", 0.0)
        monkeypatch.setattr("raylaunch.cluster.head.node_duty.AFTER_FAILURE", 0.0)
        head.enough.set()
        task = asyncio.create_task(head.nodes.run())
        await over.wait()
        task.cancel()
        await head.context.off_loop(lambda: None)

    run(story)
    told = place.events("internal_error")
    assert [row["work"] for row in told] == ["node loop"] * 2
    assert "KeyError: 'n1' (test_head.py:" in told[0]["error"] and "TypeError: x" in told[1]["error"]
    assert [bool(one) for one in shown] == [False, True, True, True, True, False]


def test_status_shows_a_mistake_of_ours(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        head = place.lead(1)
        head.context.errors.report("node loop", KeyError("n1"))
        head.table.write([])
        await head.context.off_loop(lambda: None)

    run(story)
    alive = Job("local", "RUNNING", True)
    monkeypatch.setattr("raylaunch.scheduler.backends.LocalBackend.states", lambda *_: {"local": alive})
    done = CliRunner().invoke(cli, ["status", "--state-dir", str(place.directory.parents[1])])
    assert "internal error (node loop): KeyError: 'n1'" in " ".join(done.output.split()), done.output


# -- the end ---------------------------------------------------------------------------------------


def test_the_end_waits_for_a_joiner_that_is_being_submitted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs are read for the last time after that; the turn's thread cannot be cancelled."""
    submitting, answer = threading.Event(), threading.Event()

    def turn(*_: object) -> LoopResult:
        submitting.set()
        assert answer.wait(10)
        replace(place.cluster, jobs=("local", "joiner")).write(place.directory / records.CLUSTER_FILE)
        return LoopResult()

    async def story() -> None:
        head = place.lead(1)
        head.context.ready.set()
        head.enough.set()
        head.context.spawn(head.nodes.run())
        await asyncio.to_thread(submitting.wait, 10)
        closing = asyncio.create_task(head.close("down"))
        await asyncio.to_thread(stopped.wait, 10)
        done, _ = await asyncio.wait({closing}, timeout=0.2)
        assert not done
        answer.set()
        await closing
        now = Cluster.read(place.directory)
        assert now is not None and now.jobs == ("local", "joiner")

    stopped = threading.Event()
    monkeypatch.setattr("raylaunch.cluster.head.node_duty.NodeLoop.turn", turn)
    monkeypatch.setattr("raylaunch.cluster.head.node_duty.NodeLoop.stop", lambda _: stopped.set())
    run(story)


# -- the event loop --------------------------------------------------------------------------------

_FILE_WORK = {"open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.mkdir", "os.link", "os.utime"}
_watched: dict[str, Any] = {"directory": None, "found": []}


def _hook(name: str, arguments: tuple[Any, ...]) -> None:
    """What Python tells of each file that is opened; a hook stays for good, and is idle but for one test."""
    directory = _watched["directory"]
    if directory is None or name not in _FILE_WORK or threading.current_thread() is not threading.main_thread():
        return
    if any(isinstance(one, (str, os.PathLike)) and str(one).startswith(directory) for one in arguments):
        _watched["found"].append(f"{name}{arguments[:2]} " + "".join(traceback.format_stack(limit=8)[:-1]))


sys.addaudithook(_hook)


class FakeProcess:
    """A driver, or what tells of a run's end."""

    returncode: int | None = None

    def __init__(self) -> None:
        self.over = asyncio.Event()

    async def wait(self) -> int:
        await self.over.wait()
        return 0

    async def communicate(self, _: bytes) -> None:
        return None

    def kill(self) -> None:
        self.over.set()


def test_the_head_s_event_loop_touches_no_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its begin to its end: shared storage that stalls must not look like a dead head."""
    made: list[FakeProcess] = []

    async def start(*_: object, **__: object) -> FakeProcess:
        made.append(FakeProcess())
        return made[-1]

    async def story() -> None:
        head = place.lead(2)
        _watched["directory"] = str(place.directory.parents[1])
        await head.open("an election")
        head.table.members.table["n1"] = Member("n1", NodeInfo(state="ready", pid=1, job="1"))
        for what in ("joined", "changed"):
            head.table.changed(head.table.members.table["n1"], what)
        await until(lambda: bool(made))
        made[-1].over.set()  # the driver ends without a word: the alerts are told
        head.table.changed(head.table.members.table["n1"], "silent")
        head.context.errors.report("test", KeyError("x"))
        await until(
            lambda: not head.requests._taken and head.context.memory.running == "" and not head.context.memory.queue
        )
        closing = asyncio.create_task(head.close("down"))
        await until(closing.done)
        closing.result()
        _watched["directory"] = None

    config = Config.model_validate({"alerts": {"command": ["true"]}})
    files.make_dir(place.directory.parents[1] / "runs")
    with runs.prepared(files.run_dir(place.directory.parents[1], "r"), config, "main"):
        requests.ask(place.directory, RunAsk(run="r"))
        requests.ask(place.directory, StrikeAsk(node="n9", reason="x"))
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr("raylaunch.cluster.head.request_loop.LOOK_EVERY", 0.01)
    monkeypatch.setattr("raylaunch.cluster.head.run_queue.BROKEN_PAUSE", 0.0)
    monkeypatch.setattr("raylaunch.cluster.head.metrics_process.keep", lambda *_: asyncio.sleep(1000))
    _watched["found"].clear()
    try:
        run(story)
    finally:
        _watched["directory"] = None
    assert not _watched["found"], _watched["found"][0]
    assert place.events("run_ended")


def test_a_driver_opens_what_it_looks_at(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client of NFS knows of head.json by its name may be a minute old."""
    place.head(1).write(place.directory / records.HEAD_FILE)
    seen = ClusterView(place.directory, 1)
    old = (place.directory / records.HEAD_FILE).stat()
    assert not seen.fenced()
    place.head(2).write(place.directory / records.HEAD_FILE)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: old)
    assert seen.fenced()


@pytest.mark.parametrize("content", ["{", '{"nodes": [{"name": 3}]}', "[]", "null"])
def test_a_table_that_nobody_can_read_keeps_nobody_from_leading(place: Place, content: str) -> None:
    head = place.lead(2)
    (place.directory / records.MEMBERS_FILE).write_text(content)
    assert head._nodes_before() == ()


def test_a_table_that_the_storage_does_not_give_is_not_taken_for_an_empty_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = place.lead(2)
    (place.directory / records.MEMBERS_FILE).mkdir()
    with pytest.raises(StateError):
        head._nodes_before()
