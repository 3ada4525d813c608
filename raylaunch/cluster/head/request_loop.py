"""Requests are taken, done, remembered, and only then deleted (see `raylaunch.state.requests`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from raylaunch.cluster.head.allocation_policy import JOB_ENDS
from raylaunch.cluster.head.context import HeadContext
from raylaunch.cluster.head.ending import HeadEnding
from raylaunch.cluster.head.member_table import MemberTable
from raylaunch.cluster.head.run_queue import RunQueue
from raylaunch.state import requests
from raylaunch.state.cluster_events import ClusterScaled, RequestSetAside
from raylaunch.state.requests import Request
from raylaunch.timing import SAVE_LIMIT

log = logging.getLogger("raylaunch.head")

LOOK_EVERY = 0.3
LARGEST = 1e9
"""Beyond it, as 1e999 and NaN are, a number is no number of nodes or seconds."""


class RequestRefused(ValueError):
    """The request says nothing that can be done."""


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
        if await context.off_loop(self._finish, asdict(memory), over):
            for request in over:
                del self._taken[request.name]
                memory.taken.remove(request.name)

    async def _answer(self, request: Request) -> None:
        taken = self._context.memory.taken
        taken.append(request.name)  # first: what the request changes may be written down at once
        try:
            if self.do(request.kind, request.values):
                taken.remove(request.name)
        except RequestRefused as error:
            taken.remove(request.name)
            del self._taken[request.name]
            self._context.event(RequestSetAside(request.name, str(error)))
            await self._context.off_loop(request.set_aside)

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

    def do(self, kind: str, wanted: Mapping[str, Any]) -> bool:
        """What a request asks for; whether it stays. Found twice, or by the next head, each is harmless:

        - `run`, `scale`, `strike`, `drain` and `notice` change what duties.json has, once for each name of a request. A
          run that waits already is not queued again.
        - `drained` is of the present driver: a node that does not drain is not ended, and one that does is free.
        - `down` and `walltime` ask for an end: they stay until it has come, so that the next head goes on with it. Of
          another allocation, `walltime` is over; `up` removes what the last life left.
        """
        log.info("request %s %s", kind, dict(wanted))
        match kind:
            case "run":
                self._queue.add(_text(wanted, "run"))
            case "down":
                self._ending.down(_number(wanted, "save_limit", SAVE_LIMIT))
                return True
            case "walltime":
                if wanted.get("life", self._context.head.life) == self._context.head.life:
                    self._ending.notice()
                    return True
            case "scale":
                self._scale(int(_number(wanted, "nodes")))
            case "strike":
                self._table.strike(_text(wanted, "node"), _text(wanted, "reason"))
            case "notice":
                self._ending.joiner_ends(_text(wanted, "job"), JOB_ENDS)
            case "drain":
                self._table.drain(_text(wanted, "node"), _text(wanted, "reason"))
            case "drained":
                self._table.drained(_text(wanted, "node"))
            case _:
                raise RequestRefused(f"there is no request {kind}")
        return False

    def _scale(self, nodes: int) -> None:
        memory = self._context.memory
        memory.wanted, memory.scaled = nodes, True
        self._context.event(ClusterScaled(nodes))
        self._context.table_changed.set()
        self._context.nodes_changed.set()


def _text(wanted: Mapping[str, Any], key: str) -> str:
    if key not in wanted:
        raise RequestRefused(f"{key} is missing")
    return str(wanted[key])


def _number(wanted: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = wanted.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise RequestRefused(f"{key} is no number: {value!r}")
    return value
