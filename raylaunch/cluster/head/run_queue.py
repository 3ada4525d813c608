"""The queue of runs: one at a time, the whole cluster for each; each is driven until it has ended. A driver that is
killed or breaks is started again. How a run goes on after a fault is the driver's business, not ours."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from raylaunch.cluster.head.context import HeadContext, Replaced
from raylaunch.cluster.head.drivers import Drivers
from raylaunch.cluster.head.ending import HeadEnding
from raylaunch.cluster.head.member_table import MemberTable
from raylaunch.host.internal_errors import EXPECTED
from raylaunch.state import export_files, runs
from raylaunch.state.cluster_events import DriverCutShort, DriverLost, RunEnded, RunStarted
from raylaunch.state.runs import Run
from raylaunch.timing import RUN_TELL_LIMIT, SAVE_LIMIT

ABOARD_LIMIT, LATE_LIMIT = 300.0, 5.0
"""Seconds that a submitted run waits for the minimum of nodes, and then for the rest."""
TRIES = 3
"""Drivers that may be lost one after the other without a step between them,"""
LONG = 600.0
"""or, where no steps are told, without one that lived so many seconds."""
BROKEN_PAUSE = 2.0
"""Seconds, after the first driver that broke; more after the next."""
LOOK_EVERY, STOP_LIMIT = 2.0, 10.0
"""Seconds between two looks whether a driver outlives its run, and from its being told to end to its kill."""


@dataclass(frozen=True)
class Losses:
    """Drivers of one run that were lost one after the other, and brought nothing about."""

    count: int = 0

    def and_one(self, progress: bool, lived: float) -> Losses:
        """Another one was lost; `progress`: there was a step since the last."""
        return Losses(1 if progress or lived >= LONG else self.count + 1)

    @property
    def again(self) -> bool:
        """Whether another driver is tried."""
        return self.count < TRIES

    def pause(self, status: int) -> float:
        """Seconds before that: one that broke, as one that cannot read its storage does, may be luckier a moment
        later. One that was killed need not wait."""
        return BROKEN_PAUSE * self.count if status > 0 else 0.0


class RunQueue:
    """What is to be trained."""

    def __init__(self, context: HeadContext, table: MemberTable, drivers: Drivers, ending: HeadEnding) -> None:
        self._context, self._table, self._drivers, self._ending = context, table, drivers, ending
        self._queued = asyncio.Event()

    def add(self, run: str) -> None:
        """A run waits for its turn. One that waits already waits once."""
        if run not in self._context.memory.queue:
            self._context.memory.queue.append(run)
        self._queued.set()

    async def run(self) -> None:
        """One run after the other."""
        await self._context.ready.wait()
        if self._context.cluster.run is not None and not self._context.elected:  # else it trains already
            await self._all_aboard()
        self._queued.set()
        while await self._next():
            pass

    async def _next(self) -> bool:
        """The next run, from its turn to its end; whether another may follow."""
        await self._queued.wait()
        memory = self._context.memory
        if not memory.queue:
            self._queued.clear()
            return True
        name = memory.running = memory.queue.pop(0)
        self._context.remember()
        outcome = await self._outcome(name)
        if outcome == "fenced":  # the newer head has the run, and what is to be remembered of it
            self._context.resign("a newer incarnation has begun")
            return False
        self._over(name, outcome)
        return True

    async def _outcome(self, name: str) -> str:
        outcome = "failed"  # where a mistake of ours keeps it from being told: the cluster lives on
        making_way = asyncio.create_task(self.make_way(name))
        try:
            with self._context.errors.caught(f"run {name}"):
                try:
                    outcome = await self.drive(name)
                except Replaced:
                    outcome = "fenced"
                except EXPECTED as error:
                    self._context.event(RunEnded(name, outcome, error=str(error)))
                    raise
        finally:
            making_way.cancel()
        if outcome in runs.FINAL:
            with self._context.errors.caught(f"weights of run {name}"):
                run = runs.directory(self._context.directory, name)
                await self._context.off_loop(export_files.record_interrupted, run)
        return outcome

    def _over(self, name: str, outcome: str) -> None:
        memory, cluster = self._context.memory, self._context.cluster
        memory.running = ""
        if outcome == "queued":  # it goes on in another allocation
            memory.queue.insert(0, name)
            self._queued.clear()
        self._context.remember()
        self._table.all_drained()
        if cluster.run is not None and outcome != "queued":
            self._context.exit_code = 0 if outcome == "finished" else 1
            self._ending.begin(f"run {name} {outcome}")

    async def _all_aboard(self) -> None:
        """A submitted run begins with the minimum of nodes, and gives the others a moment."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._context.enough.wait(), ABOARD_LIMIT)
        deadline = time.monotonic() + LATE_LIMIT
        while time.monotonic() < deadline and self._table.ready() < self._context.cluster.max_nodes:
            await asyncio.sleep(0.1)

    # -- one run ---------------------------------------------------------------------------------------

    async def drive(self, name: str) -> str:
        """Drive a run until it ends; its last state. Raises Replaced."""
        context, run = self._context, runs.directory(self._context.directory, name)
        record = await context.retry_on_storage_error(Run.read, run)
        if record is None:
            return "failed"  # it was moved away while it waited
        if record.state in runs.FINAL:  # the head before this one went when its driver was about to
            context.event(RunEnded(name, record.state, 0))
            return str(record.state)
        if await context.retry_on_storage_error(runs.stop_continues, run):
            await context.retry_on_storage_error(runs.clear_stop, run)
        context.event(RunStarted(name))
        status, said = await self._drive(run, record)
        if status == runs.DRIVER_FENCED:
            raise Replaced
        outcome = str(await context.retry_on_storage_error(runs.finalize, run, status, record.id))
        if not said and outcome in runs.FINAL:
            with contextlib.suppress(*EXPECTED):
                await self._drivers.send_alerts(run, RUN_TELL_LIMIT)
        context.event(RunEnded(name, outcome, status))
        return outcome

    async def _drive(self, run: Path, record: Run) -> tuple[int, bool]:
        """One driver after the other; the last one's exit status, and whether it had a last word."""
        context, losses = self._context, Losses()
        last = await context.retry_on_storage_error(runs.last_metrics, run)
        while True:
            began, waits = time.monotonic(), context.waits
            status = await self._drivers.run(run)
            now = await context.retry_on_storage_error(Run.read, run)
            said = now is None or now.id != record.id or now.state in runs.FINAL
            if said or status in {0, runs.DRIVER_FENCED} or context.course.ending:
                return status, said
            context.event(DriverLost(run.name, status))
            before, last = last, await context.retry_on_storage_error(runs.last_metrics, run)
            if context.waits == waits:  # else it died of what kept us waiting, too
                losses = losses.and_one(last != before, time.monotonic() - began)
            if not losses.again:
                return status, said
            await asyncio.sleep(losses.pause(status))

    async def make_way(self, name: str, limit: float = SAVE_LIMIT) -> None:
        """Have a driver end that has other things to do when its run is over (its weights are written), `limit` seconds
        after another run began to wait for it; for as long as this is not cancelled."""
        context, run = self._context, runs.directory(self._context.directory, name)
        ours: Run | None = None
        since: float | None = None
        while True:
            with context.errors.caught("look for a driver that outlives its run"):
                ours = ours or await context.off_loop(Run.read, run)
                now = await context.off_loop(Run.read, run) if ours and context.memory.queue else None
                if not (ours and now and (now.state in runs.FINAL or now.id != ours.id)):
                    since = None
                elif since is None:
                    since = time.monotonic()
                elif time.monotonic() - since >= limit:
                    return await self._cut_short(run, asked=now.id == ours.id)
            await asyncio.sleep(LOOK_EVERY)

    async def _cut_short(self, run: Path, asked: bool) -> None:
        context = self._context
        context.event(DriverCutShort(run.name, "another run waits"))
        if asked:  # else the file is the next run's of that name
            await context.off_loop(context.tried, runs.request_stop, run, "another run waits")
            await asyncio.sleep(STOP_LIMIT)
        self._drivers.kill()
