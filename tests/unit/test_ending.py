"""The end of an allocation on a fake Slurm: what is asked, what is decided, and what comes of it."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_heads import Place, heard, joined, run
from test_run_queue import FakeDrivers

from raylaunch.cluster.head import HeadController, ending
from raylaunch.config.schema import Config
from raylaunch.errors import SlurmError
from raylaunch.scheduler.slurm import allocation
from raylaunch.scheduler.slurm.allocation import Continuation, JobSnapshot, Word
from raylaunch.state import event_log, records, runs
from raylaunch.state.records import Cluster


class FakeSlurm:
    """What the head is told of its job, and what it asks for. It is told by patches of `allocation`'s functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.look: JobSnapshot | None = JobSnapshot("COMPLETING", None)
        self.word, self.refuses = Word(), False
        self.asked: list[str] = []
        self.done: list[str] = []
        monkeypatch.setattr(allocation, "snapshot", lambda *_: self._ask("look", self.look))
        monkeypatch.setattr(allocation, "why_ended", lambda *_: self._ask("why", self.word))
        monkeypatch.setattr(allocation, "give_back", lambda jobs: self.done.extend(f"cancel {job}" for job in jobs))
        monkeypatch.setattr(allocation, "Slurm", lambda: self)

    def _ask(self, what: str, answer: Any) -> Any:
        self.asked.append(what)
        return answer

    def requeue(self, job: str) -> None:
        if self.refuses:
            raise SlurmError("not allowed")
        self.done.append(f"requeue {job}")

    def jobs(self, _: list[str]) -> dict[str, Any]:
        return {}

    def submit(self, _: str) -> str:
        self.done.append("submit")
        return "8"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path, "slurm", "7:0")
    (made.directory / records.SCRIPT_FILE).write_text("#!/bin/sh\n")
    return made


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(monkeypatch)


def lead(place: Place, running: str = "r", requeues: int = 3, nodes: tuple[str, ...] = ("n1", "n2")) -> HeadController:
    config = Config.model_validate({"elastic": {"max_requeues": requeues}})
    head = place.lead(1, config)
    head.ending._drivers = FakeDrivers()  # type: ignore[assignment]
    head.context.memory.running = running
    joined(head, *nodes, job="7")
    heard(head, "n1", index=0)  # the batch host's
    return head


async def end(head: HeadController) -> None:
    """As the agent does it, once it was told to stop."""
    for member in head.table.members.table.values():
        member.alive = member.node == "n1"  # the others' agents have ended
        heard(head, member.node, state="ended", left=0)
    await head.close("signal SIGTERM")
    await asyncio.to_thread(head.write_end, "signal SIGTERM", 0)


async def noticed(head: HeadController) -> None:
    head.notice()
    await head.context.all_done()


async def signalled(head: HeadController) -> None:
    assert head.terminated()
    await head.context.all_done()


@pytest.mark.parametrize(
    ("look", "cause", "done"),
    [
        (JobSnapshot("COMPLETING", None, preempted=True, again=False), "", ["submit"]),
        (JobSnapshot("COMPLETING", None, again=True), "", []),  # Slurm queues it anew by itself
        (JobSnapshot("COMPLETING", None, signal=1, again=True), "", []),  # its batch host booted
        (JobSnapshot("COMPLETING", None, signal=1, again=False), "", ["submit"]),
        (JobSnapshot("COMPLETING", None), "time limit", ["submit"]),
        (None, "node failure", []),
    ],
)
def test_what_slurm_takes_goes_on_once(
    place: Place, slurm: FakeSlurm, look: JobSnapshot | None, cause: str, done: list[str]
) -> None:
    place.run("r", "running")
    slurm.look, slurm.word = look, Word(cause)

    async def story() -> None:
        head = lead(place)
        await signalled(head)
        assert place.stopped == ["signal SIGTERM"] and head.context.course.goes_on
        await end(head)

    run(story)
    assert slurm.done == done and not (place.directory / records.ENDED_FILE).exists()
    assert place.read("duties.json")["running"] == "r"
    assert len(place.events("requeued", "successor")) == 1


def test_a_person_s_scancel_ends_it(place: Place, slurm: FakeSlurm) -> None:
    place.run("r", "running")

    async def story() -> None:
        head = lead(place)
        await signalled(head)
        await end(head)

    run(story)
    assert slurm.done == [] and (place.directory / records.ENDED_FILE).exists()
    assert [row["goes_on"] for row in place.events("ending")] == [False] and not place.events("max_requeues_reached")


@pytest.mark.parametrize(("queue", "goes_on"), [([], ""), (["next"], "preempted")])
def test_a_finished_run_is_nothing_to_go_on_with(
    place: Place, slurm: FakeSlurm, queue: list[str], goes_on: str
) -> None:
    """Slurm takes the allocation while the driver writes the weights."""
    place.run("r", "finished")
    slurm.look = JobSnapshot("COMPLETING", None, preempted=True)

    async def story() -> None:
        head = lead(place)
        head.context.memory.queue = queue
        await signalled(head)
        assert head.context.course.goes_on == goes_on

    run(story)


def test_the_notice_saves_and_has_the_job_requeued(place: Place, slurm: FakeSlurm) -> None:
    directory = place.run("r", "running")
    slurm.look = JobSnapshot("RUNNING", 20.0)

    async def story() -> None:
        head = lead(place)
        for _ in range(3):  # the batch script's, the agent's, the node loop's
            await noticed(head)
        assert place.stopped == ["walltime"] and runs.stop_continues(directory)
        await end(head)

    run(story)
    assert slurm.done == ["requeue 7"] and slurm.asked == ["look"] * 2  # and once more before the requeue
    assert [row["why"] for row in place.events("termination_notice")] == ["walltime"]


def test_where_a_requeue_is_refused_a_successor_follows(place: Place, slurm: FakeSlurm) -> None:
    place.run("r", "running")
    slurm.look, slurm.refuses = JobSnapshot("RUNNING", 20.0), True

    async def story() -> None:
        head = lead(place)
        await noticed(head)
        await end(head)

    run(story)
    assert slurm.done == ["submit"] and len(place.events("successor")) == 1
    assert Cluster.read(place.directory).jobs == ("7", "8")  # type: ignore[union-attr]


def test_the_limit_of_requeues_is_told(place: Place, slurm: FakeSlurm) -> None:
    place.run("r", "running")
    slurm.look = JobSnapshot("RUNNING", 20.0)

    async def story() -> None:
        head = lead(place, requeues=0)
        await noticed(head)
        await end(head)

    run(story)
    assert slurm.done == [] and len(place.events("max_requeues_reached")) == 1


def test_a_run_that_finishes_while_it_is_saved_does_not_go_on(place: Place, slurm: FakeSlurm) -> None:
    directory = place.run("r", "running")
    slurm.look = JobSnapshot("RUNNING", 20.0)

    async def story() -> None:
        head = lead(place)

        async def finishes() -> None:
            runs.Run.read(directory).save(directory, state="finished")  # type: ignore[union-attr]

        head.ending._drivers.ended = finishes  # type: ignore[method-assign]
        await noticed(head)
        assert not head.context.course.goes_on

    run(story)


def test_down_while_the_allocation_ends(place: Place, slurm: FakeSlurm) -> None:
    """A person's word counts: the job is not requeued."""
    place.run("r", "running")
    slurm.look = JobSnapshot("RUNNING", 20.0)

    async def story() -> None:
        head = lead(place)
        await noticed(head)
        head.ending.down(5.0)
        await end(head)

    run(story)
    assert slurm.done == [] and (place.directory / records.ENDED_FILE).exists()


@pytest.mark.parametrize(
    ("look", "word", "done"),
    [
        (JobSnapshot("COMPLETING", None), Word(cancelled=True), []),  # a person wants no next allocation either
        (JobSnapshot("COMPLETING", None, again=False), Word(), []),
        (
            JobSnapshot("COMPLETING", None, again=True),
            Word(),
            [],
        ),  # Slurm runs the job again by itself: no second allocation
        (JobSnapshot("COMPLETING", None, preempted=True, again=False), Word(), ["submit"]),
        (JobSnapshot("COMPLETING", None), Word("time limit"), ["submit"]),
        (JobSnapshot("COMPLETING", None), Word(), ["requeue 7"]),  # nobody says why
        (None, Word(), ["requeue 7"]),
    ],
)
@pytest.mark.parametrize("signalled_first", [True, False])
def test_the_job_ends_while_the_run_is_saved(
    place: Place, slurm: FakeSlurm, look: JobSnapshot | None, word: Word, done: list[str], signalled_first: bool
) -> None:
    """Slurm ends it, or a person, and SIGTERM comes, or comes when the agent does not hear any more."""
    place.run("r", "running")
    slurm.look = JobSnapshot("RUNNING", 20.0)

    async def story() -> None:
        head = lead(place)
        await noticed(head)
        assert head.context.course.goes_on
        slurm.look, slurm.word = look, word
        if signalled_first:
            await signalled(head)
        await end(head)

    run(story)
    by_a_person = word.cancelled or look == JobSnapshot("COMPLETING", None, again=False)
    assert slurm.done == done and (place.directory / records.ENDED_FILE).exists() == by_a_person


def test_sigterm_of_the_grace_lets_the_save_go_on(place: Place, slurm: FakeSlurm) -> None:
    place.run("r", "running")
    slurm.look = JobSnapshot("RUNNING", 20.0)

    async def story() -> None:
        head = lead(place)
        saved = asyncio.Event()
        head.ending._drivers.ended = saved.wait  # type: ignore[method-assign,assignment]
        head.ending.begin("walltime", 60.0, goes_on=True)
        assert head.terminated()
        async with asyncio.timeout(10):
            while not slurm.asked:
                await asyncio.sleep(0.001)
        assert not place.stopped
        saved.set()
        await head.context.all_done()
        assert place.stopped == ["walltime"]

    run(story)
    assert not place.events("termination_notice")


def test_a_stop_is_not_forgotten_by_the_notice(place: Place, slurm: FakeSlurm) -> None:
    directory = place.run("r", "running")
    runs.request_stop(directory, "raylaunch stop")
    slurm.look = JobSnapshot("RUNNING", 20.0)

    async def story() -> None:
        head = lead(place)
        await noticed(head)

    run(story)
    assert runs.stop_reason(directory) == "raylaunch stop" and not runs.stop_continues(directory)


def test_a_head_that_was_frozen_in_its_end_has_no_last_word(place: Place, slurm: FakeSlurm) -> None:
    async def story() -> None:
        head = lead(place, nodes=("n1",))
        await head.close("down")
        records.claim(place.directory, 2, "n2")
        await asyncio.to_thread(head.write_end, "down", 0)

    run(story)
    assert not (place.directory / records.ENDED_FILE).exists() and not slurm.done


def test_a_storage_that_stalls_at_the_very_end(place: Place, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is requeued all the same."""
    monkeypatch.setattr(ending, "STORAGE_LIMIT", 0.01)
    monkeypatch.setattr(ending, "STALLED_LIMIT", 0.01)
    place.run("r", "running")
    slurm.look = JobSnapshot("RUNNING", 20.0)
    stalls = threading.Event()

    async def story() -> None:
        head = lead(place)
        head.ending.begin("walltime", 0.0, goes_on=True)
        await head.context.all_done()
        stalled = asyncio.ensure_future(head.context.off_loop(stalls.wait, 10))
        monkeypatch.setattr(head.context.duties_file, "write", lambda _: stalls.wait(10))
        monkeypatch.setattr(event_log, "append", lambda *_, **__: stalls.wait(10))
        await end(head)
        assert slurm.done == ["requeue 7"] and not stalled.done()
        stalls.set()
        await stalled

    run(story)


def test_down_while_the_run_is_paused_is_told(place: Place, slurm: FakeSlurm) -> None:
    directory = place.run("r", "running")
    slurm.look = JobSnapshot("RUNNING", 20.0)

    async def story() -> None:
        head = lead(place)
        await noticed(head)
        runs.Run.read(directory).save(directory, state="queued")  # type: ignore[union-attr]
        head.ending.down(5.0)
        await end(head)
        assert len(head.ending._drivers.told) == 1  # type: ignore[attr-defined]

    run(story)


def test_a_save_that_takes_too_long_is_told(place: Place, slurm: FakeSlurm) -> None:
    place.run("r", "running")

    async def story() -> None:
        head = lead(place)
        drivers = head.ending._drivers
        drivers.running, drivers.ended = True, asyncio.Event().wait  # type: ignore[misc,method-assign,assignment]
        head.ending.begin("down", 0.0)
        await head.context.all_done()
        assert place.stopped == ["down"]

    run(story)
    assert [row["run"] for row in place.events("save_timed_out")] == ["r"]


def test_a_joiner_that_leads_is_left_where_others_can_go_on(
    place: Place, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "TERM_LIMIT", 0.0)

    async def story() -> None:
        head = lead(place)
        heard(head, "n1", job="9")
        await signalled(head)
        assert list(head.context.memory.draining) == ["n1"] and place.resigned == ["its job was told to end"]

    run(story)
    assert slurm.asked == []  # it is quick


def test_the_base_job_is_lost_and_the_joiners_go_on(place: Place, slurm: FakeSlurm) -> None:
    slurm.look = JobSnapshot("COMPLETING", None, reason="JobLaunchFailure")

    async def story() -> None:
        head = lead(place)
        heard(head, "n2", job="9")
        await signalled(head)
        assert len(place.resigned) == 1 and not place.stopped and not head.context.course.ending

    run(story)
    assert [row["why"] for row in place.events("base_job_lost")] == ["JobLaunchFailure"]


@pytest.mark.parametrize("own", [True, False])
def test_the_end_of_a_joiner_s_job(place: Place, slurm: FakeSlurm, own: bool) -> None:
    place.run("r", "running")

    async def story() -> None:
        head = lead(place, nodes=("n1",) if own else ("n1", "n2"))
        heard(head, "n1" if own else "n2", job="9")
        head.ending.joiner_ends("9", "time")
        await head.context.all_done()
        assert list(head.context.memory.draining) == ([] if own else ["n2"])
        assert head.context.course.ending == own

    run(story)


def test_a_fenced_head_sees_to_no_end(place: Place, slurm: FakeSlurm) -> None:
    slurm.look = JobSnapshot("COMPLETING", None, preempted=True)

    async def story() -> None:
        head = lead(place)
        records.claim(place.directory, 2, "n2")
        await signalled(head)
        assert place.resigned == ["a newer incarnation has begun"] and not place.stopped

    run(story)


def test_the_end_of_local_agents_is_their_own(place: Place) -> None:
    place.cluster = replace(place.cluster, backend="local")

    async def story() -> None:
        assert not lead(place).terminated()

    run(story)


def test_the_last_word(place: Place, slurm: FakeSlurm) -> None:
    """Of nodes: the unclean ones, those without a word, and those that were lost before."""
    replace(place.cluster, jobs=("7", "9")).write(place.directory / records.CLUSTER_FILE)

    async def story() -> None:
        head = lead(place, running="", nodes=("n1", "n2", "n3", "n4"))
        table = head.table.members.table
        table["n4"].alive = False
        closing = asyncio.create_task(head.close("down"))
        await asyncio.sleep(0)
        for node, left in (("n2", 0), ("n3", 2)):
            table[node].alive = False
            heard(head, node, state="ended", left=left)
        await closing
        await asyncio.to_thread(head.write_end, "down", 0)

    run(story)
    said = json.loads((place.directory / records.ENDED_FILE).read_text())
    assert (said["unclean"], said["lost"], said["reason"]) == ({"n3": 2}, ["n4"], "down")
    assert slurm.done == ["cancel 9"] and (place.directory / records.EXIT_CODE_FILE).read_text() == "0\n"


def test_every_way_is_one_of_the_allocation_s() -> None:
    assert {way.value for way in Continuation} == {"requeue", "itself", "successor"}


def test_a_storage_that_stalls_keeps_nobody_from_the_end(
    place: Place, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm ends the job meanwhile: what it took goes on."""
    monkeypatch.setattr(ending, "STORAGE_LIMIT", 0.01)
    slurm.look = JobSnapshot("COMPLETING", None, preempted=True)
    stalls = threading.Event()

    async def story() -> None:
        head = lead(place)
        blocked = asyncio.ensure_future(head.context.off_loop(stalls.wait, 10))
        assert head.terminated()
        async with asyncio.timeout(10):
            while not place.stopped:
                await asyncio.sleep(0.001)
        assert not blocked.done() and head.context.course.goes_on == "preempted"
        stalls.set()
        await head.context.all_done()

    run(story)
