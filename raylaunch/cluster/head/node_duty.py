"""The node loop's turns on the head: lost nodes are replaced, what Slurm drains is left, and so on."""

from __future__ import annotations

import asyncio
import contextlib
import time

from raylaunch.cluster.head.context import HeadContext
from raylaunch.cluster.head.ending import HeadEnding
from raylaunch.cluster.head.member_table import MemberTable
from raylaunch.cluster.node_loop import submitter
from raylaunch.cluster.node_loop.node_loop import LoopResult, NodeLoop
from raylaunch.scheduler import backends
from raylaunch.scheduler.backends import Backend
from raylaunch.scheduler.slurm.client import TIMEOUT

ABOARD_LIMIT = 300.0
"""Seconds that the first turn waits for the minimum of nodes."""
LEAST, AFTER_FAILURE = 1.0, 5.0
"""Seconds between two turns, at the least, and after one that failed."""
END_MOVES = 30.0
"""Seconds by which the end of the job's time must have moved to be told anew: squeue is no clock."""
TURN_LIMIT = TIMEOUT + 2.0
"""Seconds that the end waits for a job that is being submitted: as long as a command of Slurm may take."""


class NodeDuty:
    """Turns the loop in a thread, and does what it leaves to the head."""

    def __init__(self, context: HeadContext, table: MemberTable, ending: HeadEnding) -> None:
        self._context, self._table, self._ending = context, table, ending
        self._loop: NodeLoop | None = None
        self._turn: asyncio.Future[LoopResult] | None = None
        """The last turn, in its thread."""

    async def run(self) -> None:
        context, backend = self._context, backends.of(self._context.cluster.backend)
        loop = self._loop = await self._begin(backend)
        await context.ready.wait()
        if not context.elected:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(context.enough.wait(), ABOARD_LIMIT)
        with context.errors.caught("check whether jobs can be submitted"):
            await self._ask_whether_it_may_submit(loop, backend)
        while True:
            context.nodes_changed.clear()
            pause = AFTER_FAILURE
            with context.errors.caught("node loop"):
                turn = await self._take_turn(loop)
                self.carry_out(turn)
                pause = turn.pause
            await asyncio.sleep(LEAST)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(context.nodes_changed.wait(), pause)

    async def _begin(self, backend: Backend) -> NodeLoop:
        """It reads what lies there already."""
        context, begun = self._context, None
        while begun is None:
            with context.errors.caught("begin of the node loop"):
                begun = await context.off_loop(NodeLoop, context.directory, context.config, backend)
            if begun is None:
                await asyncio.sleep(AFTER_FAILURE)
        return begun

    async def _ask_whether_it_may_submit(self, loop: NodeLoop, backend: Backend) -> None:
        """Before the first joiner is needed."""
        context = self._context
        why = await asyncio.to_thread(submitter.may_submit, backend, context.directory, context.cluster, context.config)
        for event in await context.off_loop(loop.cannot_submit, context.cluster, why) if why else ():
            context.event(event)

    async def _take_turn(self, loop: NodeLoop) -> LoopResult:
        """In a thread, which goes on when the wait for it is cancelled: see `end`."""
        memory = self._context.memory
        self._turn = asyncio.get_running_loop().run_in_executor(
            None, loop.turn, self._table.rows(), memory.wanted, dict(memory.strikes), set(memory.draining),
            memory.scaled, memory.continued,
        )  # fmt: skip
        return await asyncio.shield(self._turn)

    def stop(self) -> None:
        """Submit nothing any more."""
        if self._loop is not None:
            self._loop.stop()

    async def end(self) -> None:
        """No job is submitted after this; one that is being submitted is waited for, as long as that may take."""
        self.stop()
        if self._turn is not None:
            await asyncio.wait({self._turn}, timeout=TURN_LIMIT)

    def carry_out(self, turn: LoopResult) -> None:
        """What the node loop leaves to the head."""
        if self._context.course.ending:
            return
        for event in turn.events:
            self._context.event(event)
        for node, reason in turn.strikes:
            self._table.strike(node, reason)
        for node, reason in [*turn.drain, *((node, "more nodes than wanted") for node in turn.release_nodes)]:
            self._table.drain(node, reason)
        self._look_at_the_time(turn)
        if turn.give_up is not None:
            self._context.exit_code = 1
            self._ending.begin(turn.give_up)

    def _look_at_the_time(self, turn: LoopResult) -> None:
        """Of each job. The batch script, whose notice it is, may be gone, or late."""
        base = self._context.head.job
        left = turn.time_left.get(base)
        ends = time.time() + left if left is not None else None
        if ends is not None and abs(ends - (self._table.ends or 0.0)) > END_MOVES:
            self._table.ends = ends
            self._context.table_changed.set()
        for job, left in turn.time_left.items():
            if left is not None and left <= self._context.notice:
                if job == base:
                    self._ending.notice()
                else:
                    self._ending.joiner_ends(job, "its job's time is up")
