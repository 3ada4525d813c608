"""Requests are taken, done, remembered, and only then deleted (see `raylaunch.state.requests`)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from raylaunch.cluster.head.allocation_policy import JOB_ENDS
from raylaunch.cluster.head.context import HeadContext
from raylaunch.cluster.head.ending import HeadEnding
from raylaunch.cluster.head.member_table import MemberTable
from raylaunch.cluster.head.run_queue import RunQueue
from raylaunch.state import requests
from raylaunch.state.cluster_events import ClusterScaled, RequestSetAside
from raylaunch.state.requests import (
    Ask,
    DownAsk,
    DrainAsk,
    DrainedAsk,
    NoticeAsk,
    Request,
    RunAsk,
    ScaleAsk,
    StrikeAsk,
    WalltimeAsk,
)

log = logging.getLogger("raylaunch.head")

LOOK_EVERY = 0.3


class RequestLoop:
    """What is asked of this head."""

    def __init__(self, context: HeadContext, table: MemberTable, queue: RunQueue, ending: HeadEnding) -> None:
        self._context, self._table, self._queue, self._ending = context, table, queue, ending
        self._taken: dict[str, Request] = {}
        """Those that lie there yet, by name."""

    async def run(self) -> None:
        while True:
            with self._context.errors.caught("requests"):
                await self.turn()
            await asyncio.sleep(LOOK_EVERY)

    async def turn(self) -> None:
        """Do what is asked for, write down what must outlive this head, then delete the requests."""
        context, memory = self._context, self._context.memory
        incarnation = context.head.incarnation
        for request in await context.off_loop(requests.take, context.directory, incarnation, [*self._taken]):
            self._taken[request.name] = request
            if request.name not in memory.taken:  # else the head before this one has done it
                await self._answer(request)
        over = [request for name, request in self._taken.items() if name in memory.taken]
        if not over:
            return
        if await context.off_loop(self._finish, memory.values(), over):
            for request in over:
                del self._taken[request.name]
                memory.taken.remove(request.name)

    async def _answer(self, request: Request) -> None:
        taken = self._context.memory.taken
        taken.append(request.name)  # first: what the request changes may be written down at once
        try:
            what = request.what
        except ValueError as error:
            taken.remove(request.name)
            del self._taken[request.name]
            self._context.event(RequestSetAside(request.name, str(error)))
            await self._context.off_loop(request.set_aside)
            return
        if self.do(what):
            taken.remove(request.name)

    def _finish(self, memory: dict[str, Any], over: list[Request]) -> bool:
        """Remember, and delete the requests; not when this head was replaced before they were remembered for sure."""
        if self._context.is_fenced():
            return False
        self._context.duties_file.write(memory)
        if self._context.is_fenced():
            return False
        for request in over:
            request.done()
        return True

    def do(self, what: Ask) -> bool:
        """What a request asks for; whether it stays. Found twice, or by the next head, each is harmless:

        - `run`, `scale`, `strike`, `drain` and `notice` change what duties.json has, once for each name of a request. A
          run that waits already is not queued again.
        - `drained` is of the present driver: a node that does not drain is not ended, and one that does is free.
        - `down` and `walltime` ask for an end: they stay until it has come, so that the next head goes on with it. Of
          another allocation, `walltime` is over; `up` removes what the last life left.
        """
        log.info("request %r", what)
        match what:
            case RunAsk(run=run):
                self._queue.add(run)
            case DownAsk(save_limit=seconds):
                self._ending.down(seconds)
                return True
            case WalltimeAsk(allocation=allocation):
                if allocation in {None, self._context.head.allocation}:
                    self._ending.notice()
                    return True
            case ScaleAsk(nodes=nodes):
                self._scale(nodes)
            case StrikeAsk(node=node, reason=reason):
                self._table.strike(node, reason)
            case NoticeAsk(job=job):
                self._ending.joiner_ends(job, JOB_ENDS)
            case DrainAsk(node=node, reason=reason):
                self._table.drain(node, reason)
            case DrainedAsk(node=node):
                self._table.drained(node)
        return False

    def _scale(self, nodes: int) -> None:
        memory = self._context.memory
        memory.wanted, memory.scaled = nodes, True
        self._context.event(ClusterScaled(nodes))
        self._context.table_changed.set()
        self._context.nodes_changed.set()
