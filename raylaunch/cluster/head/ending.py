"""The end of an allocation, or of the cluster: the facts for `allocation_policy`, and what it decides, carried out.

begin → save the run, bounded → stop the node → close: the agents' ends → write_end: the last word, or the next
allocation
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from raylaunch.cluster.head import allocation_policy
from raylaunch.cluster.head.allocation_policy import (
    AllocationEvent,
    AllocationFacts,
    BatchJob,
    Course,
    Drain,
    End,
    Leave,
    Resign,
    Save,
    Work,
)
from raylaunch.cluster.head.context import HeadContext
from raylaunch.cluster.head.drivers import Drivers
from raylaunch.cluster.head.member_table import MemberTable
from raylaunch.cluster.membership.control_channel import Member
from raylaunch.host.threads import within
from raylaunch.scheduler.slurm import allocation
from raylaunch.scheduler.slurm.allocation import Continuation, Word
from raylaunch.state import event_log, records, runs
from raylaunch.state.cluster_events import ClusterEnded, ClusterEnding, SaveTimedOut, TerminationNotice
from raylaunch.state.members import OVER
from raylaunch.state.node_events import BaseJobLost, MaxRequeuesReached
from raylaunch.state.records import Cluster
from raylaunch.state.runs import Run
from raylaunch.timing import ENDING_LIMIT, SAVE_LIMIT, TELL_LIMIT, TERM_LIMIT

T = TypeVar("T")

STORAGE_LIMIT = 5.0
"""Seconds that the end waits for the storage's word."""
STALLED_LIMIT = 1.0
"""The same of one that has not answered before."""


class HeadEnding:
    """How it comes, and goes."""

    def __init__(self, context: HeadContext, table: MemberTable, drivers: Drivers) -> None:
        self._context, self._table, self._drivers = context, table, drivers
        self._noticed = self._closing = False
        self._since, self._patience = time.time(), STORAGE_LIMIT
        self._run_is_over = False
        self._unclean: dict[str, Any] = {}
        self._lost: list[str] = []

    # -- what is heard ---------------------------------------------------------------------------------

    def notice(self) -> None:
        """Slurm says that this allocation ends: its time limit is near, or it is preempted."""
        if not self._noticed and not self._context.course.ending:
            self._noticed = True
            self._context.spawn(self._act(AllocationEvent.NOTICE, self._context.head.job))

    def terminated(self) -> bool:
        """SIGTERM came; whether the head sees to the end itself: it asks Slurm why, which decides what follows. Also while
        the run is saved for another allocation: Slurm may have begun that by itself, or a person wants none."""
        course = self._context.course
        if self._context.cluster.backend != "slurm" or self._closing or (course.ending and not course.goes_on):
            return False
        self._context.spawn(self._act(AllocationEvent.SIGTERM, self._table.own_job() or self._context.head.job))
        return True

    def joiner_ends(self, job: str, why: str) -> None:
        """A joiner's job ends: its nodes are left. With that of the head's own, the last nodes may go."""
        own = job == self._table.own_job()
        others = bool(self._table.ready(beside=self._table.own_job()))
        facts = AllocationFacts(AllocationEvent.JOINER_ENDS, own=own, others=others, why=why)
        self._carry_out(allocation_policy.decide(facts), facts, job)

    def down(self, save_limit: float) -> None:
        """A person ends the cluster."""
        if self._context.course.ending:
            self._context.course = self._context.course.called_off("down")
        else:
            self.begin("down", save_limit)

    # -- the facts -------------------------------------------------------------------------------------

    async def _act(self, event: AllocationEvent, job: str) -> None:
        facts = await self._facts(event, job)
        if event is AllocationEvent.SIGTERM:
            self._run_is_over = await self._asked(False, is_over, self._run())
        decision = allocation_policy.decide(facts)
        if not self._context.course.ending or isinstance(decision, End | Resign):
            self._carry_out(decision, facts, job)

    async def _facts(self, event: AllocationEvent, job: str) -> AllocationFacts:
        """What is asked of Slurm costs time: only what the decision depends on."""
        context = self._context
        others = not context.course.ending and bool(self._table.ready(beside=self._table.own_job()))
        facts = AllocationFacts(
            event, await self._asked(False, context.is_fenced), in_base=job == context.head.job, others=others,
            notice=context.notice,
        )  # fmt: skip
        if facts.wants_job:
            save = await self._asked(0.0, longest_save, self._run())
            facts = replace(facts, job=await asyncio.to_thread(self._seen, job), longest_save=save)
        if facts.wants_cause:
            facts = await asyncio.to_thread(self._with_cause, facts, job)
        return facts

    def _seen(self, job: str) -> BatchJob | None:
        """What Slurm says of the job. Blocking."""
        look = allocation.snapshot(job, self._context.head.restarts)
        return (
            BatchJob(look.state, look.seconds_left, look.preempted, look.taken, look.again)
            if look is not None
            else None
        )

    def _with_cause(self, facts: AllocationFacts, job: str) -> AllocationFacts:
        """Blocking, but not for longer than STORAGE_LIMIT."""
        word = within(STORAGE_LIMIT, Word(), allocation.why_ended, self._context.directory, job, self._since)
        return replace(facts, cause=word.cause, cancelled=word.cancelled)

    async def _asked(self, otherwise: T, work: Callable[..., T], *arguments: Any) -> T:
        """What the storage says; one that does not say keeps nobody from the end."""
        answer = otherwise
        with self._context.errors.caught("storage check at the end"):
            answer = await asyncio.wait_for(self._context.off_loop(work, *arguments), STORAGE_LIMIT)
        return answer

    def _run(self) -> Path:
        """The directory of the present run."""
        return runs.directory(self._context.directory, self._context.memory.running)

    def _work(self) -> Work:
        memory = self._context.memory
        unfinished = bool((memory.running and not self._run_is_over) or memory.queue)
        limit, slurm = self._context.config.elastic.max_requeues, self._context.cluster.backend == "slurm"
        work = Work(unfinished, memory.continued, limit, slurm)
        if work.used_up:
            self._context.event(MaxRequeuesReached(work.resumes, f"elastic.max_requeues={limit}"))
        return work

    # -- what is decided -------------------------------------------------------------------------------

    def _carry_out(self, decision: allocation_policy.Decision, facts: AllocationFacts, job: str) -> None:
        match decision:
            case Save(why=why, limit=limit, after=after):
                if facts.in_base and facts.event is not AllocationEvent.JOINER_ENDS:
                    left = facts.job.seconds_left if facts.job is not None else None
                    self._context.event(TerminationNotice(why, facts.notice if left is None else left))
                self._context.spawn(self._save_later(why, limit, after))
            case Leave(why=why):
                self._table.drain(self._context.head.node, why)
                self._context.spawn(self._resign_later(why))
            case Drain(why=why):
                for node in self._table.of_job(job):
                    self._table.drain(node, why)
            case Resign(why=why, base_lost=base_lost):
                if base_lost:
                    self._context.event(BaseJobLost(job, base_lost))
                self._context.resign(why)
            case End():
                self._end_now(decision)

    async def _save_later(self, why: str, limit: float, after: float) -> None:
        await asyncio.sleep(after)
        self.begin(why, limit, goes_on=True)

    async def _resign_later(self, why: str) -> None:
        await asyncio.sleep(TERM_LIMIT)
        if not self._context.course.ending:
            self._context.resign(why)

    def _end_now(self, end: End) -> None:
        """There is no time to save."""
        before = self._context.course
        work = self._work() if end.taken and not before.ending else Work(False)
        self._become(before.end(end, work))
        self._context.stop("signal SIGTERM")

    def _become(self, course: Course) -> None:
        before, self._context.course = self._context.course, course
        if course.ending and not before.ending:
            self._context.event(ClusterEnding(course.reason, bool(course.goes_on)))

    def begin(self, reason: str, save_limit: float = SAVE_LIMIT, goes_on: bool = False) -> None:
        """End the cluster: save the run (bounded), then all agents, then this one. With `goes_on` it is
        the end of this allocation only."""
        if not self._context.course.ending:
            self._become(self._context.course.begin(reason, self._work() if goes_on else None))
            self._context.spawn(self._save(reason, save_limit))

    async def _save(self, reason: str, limit: float) -> None:
        context = self._context
        if not context.course.goes_on:
            context.memory.queue.clear()
        if context.memory.running:
            with contextlib.suppress(TimeoutError):  # the storage stalls
                await asyncio.wait_for(self._save_run(context.memory.running, reason, limit), limit + STORAGE_LIMIT)
        context.stop(reason)

    async def _save_run(self, name: str, reason: str, limit: float) -> None:
        context, run = self._context, runs.directory(self._context.directory, name)
        # Where that cannot be written nothing can be saved; what is committed goes on elsewhere all the same.
        await context.off_loop(context.tried, runs.request_stop, run, reason, bool(context.course.goes_on))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drivers.ended(), limit)
        over = await self._asked(False, is_over, run)
        if not over and self._drivers.running:
            context.event(SaveTimedOut(name, limit))
        if over and not context.memory.queue:  # while it was asked to stop; or before, and its weights were written
            context.course = context.course.finished()

    # -- the end ---------------------------------------------------------------------------------------

    async def close(self, reason: str) -> None:
        """Send the other agents home and wait for their word, bounded."""
        self._closing = True
        self._context.course = self._context.course.begin(reason or "it ends")
        others = self._others()
        self._drivers.kill()  # before the nodes: it would take their end for a fault
        with contextlib.suppress(TimeoutError):  # it hangs in the storage
            await asyncio.wait_for(self._drivers.ended(), STORAGE_LIMIT)
        told = asyncio.create_task(self._tell_end(reason))
        self._table.members.order("end")
        deadline = time.monotonic() + ENDING_LIMIT
        while any(m.alive for m in others) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(told, STORAGE_LIMIT)
        left = {m.node: m.info.left for m in others if m.info.left != 0}
        self._unclean = {node: -1 if count is None else count for node, count in left.items()}
        await self._asked(None, self._table.write, self._table.rows())
        self._table.members.close()

    def _others(self) -> list[Member]:
        """The other nodes that are here. Of one that was lost before, nothing is ours to end any more."""
        everyone = [m for m in self._table.members.table.values() if m.node != self._context.head.node]
        self._lost = [m.node for m in everyone if not m.alive and m.info.state not in OVER]
        return [m for m in everyone if m.alive]

    async def _tell_end(self, reason: str) -> None:
        """Have the end of a run told whose driver could not any more, or told that it would go on."""
        context, memory = self._context, self._context.memory
        name = memory.running or next(iter(memory.queue), "")
        with context.errors.caught("message of the end"):
            run = runs.directory(context.directory, name)
            record = await context.off_loop(Run.read, run) if name and not context.course.goes_on else None
            if record is None or record.state not in {"running", "holding", "queued"}:
                return
            if record.state != "queued" or await context.off_loop(runs.stop_continues, run):
                await self._drivers.send_alerts(run, TELL_LIMIT, f"its cluster ended ({reason})")

    def write_end(self, reason: str, left_here: int) -> None:
        """The last word, in a thread: the job starts anew; or ended.json and the job's exit code. Nodes that did not
        report count as unclean. A storage that stalls keeps it from nothing that Slurm can do."""
        self._table.closed = True
        closed = within(STORAGE_LIMIT, False, self._files_are_closed)
        self._patience = STORAGE_LIMIT if closed else STALLED_LIMIT
        if within(self._patience, False, self._context.is_fenced):
            return  # frozen meanwhile: all that is to be said is the newer head's
        if self._context.course.goes_on:
            self._context.course = self._last_look(self._context.course)
        if self._context.course.goes_on:
            self._go_on(self._context.course)
        else:
            self._write_last_word(reason, left_here)

    def _files_are_closed(self) -> bool:
        self._context.close_files()
        return True

    def _last_look(self, course: Course) -> Course:
        """Before the job is requeued: whether Slurm, or a person, ended it while the cluster ended by itself."""
        if course.way != "requeue":
            return course
        job = self._context.head.job
        facts = AllocationFacts(AllocationEvent.SIGTERM, job=self._seen(job))
        if facts.job is None or facts.job.state == "RUNNING":
            return course
        decision = allocation_policy.decide(self._with_cause(facts, job) if facts.wants_cause else facts)
        return course.end(decision, Work(False)) if isinstance(decision, End) else course

    def _go_on(self, course: Course) -> None:
        context = self._context
        # A full disk is no reason not to go on: the last commit is good.
        within(self._patience, None, context.tried, context.duties_file.write, context.memory.values())
        for event in allocation.go_on(context.directory, context.head.job, course.goes_on, Continuation(course.way)):
            within(self._patience, None, context.tried, event_log.append, context.directory, event)

    def _write_last_word(self, reason: str, left_here: int) -> None:
        context, cluster = self._context, self._context.cluster
        if cluster.run is not None and context.exit_code == 0:
            run = Run.read(runs.directory(context.directory, cluster.run))
            context.exit_code = 0 if run is not None and run.state == "finished" else 1
        unclean = dict(self._unclean) | ({context.head.node: left_here} if left_here else {})
        records.write_end(context.directory, cluster.canary, reason, unclean, self._lost, context.exit_code)
        event_log.append(context.directory, ClusterEnded(reason, unclean, self._lost))
        if cluster.backend == "slurm":
            self._give_back(context.head.job)

    def _give_back(self, base: str) -> None:
        now = Cluster.read(self._context.directory) or self._context.cluster
        over = [job for job in now.jobs if job != base]  # joiners that wait
        allocation.give_back(over if self._batch_host_lives() else [*over, base])  # no script ends that one

    def _batch_host_lives(self) -> bool:
        return any(
            m.info.index == 0 and not m.info.joiner and m.node not in self._lost
            for m in self._table.members.table.values()
        )


def longest_save(run: Path) -> float:
    """Seconds of the slowest save of a run so far."""
    rows = event_log.read(run, "commit")
    return max((float(row.get("seconds", 0)) for row in rows), default=0.0)


def is_over(run: Path) -> bool:
    """Whether a run has come to its end, and its driver only has things to do yet."""
    record = Run.read(run)
    return record is not None and record.state in runs.FINAL
