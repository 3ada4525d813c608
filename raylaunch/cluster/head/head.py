"""The head's duties, beside its own node's: the parts, from their begin to their end.

The head's agent publishes where it is (head.json), admits the other agents (`control_channel`), writes what it
knows of them (members.json) and what its successor must know (duties.json), takes requests from the
cluster directory, and runs one driver at a time, run after run. All file work is done off the event
loop: shared storage that stalls must not look like a dead head. A head that finds a newer incarnation
resigns at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from raylaunch.cluster.head import metrics_process
from raylaunch.cluster.head.context import HeadContext
from raylaunch.cluster.head.drivers import Drivers
from raylaunch.cluster.head.ending import HeadEnding
from raylaunch.cluster.head.member_table import MemberTable
from raylaunch.cluster.head.node_duty import NodeDuty
from raylaunch.cluster.head.request_loop import RequestLoop
from raylaunch.cluster.head.run_queue import RunQueue
from raylaunch.cluster.membership.control_channel import ControlServer
from raylaunch.cluster.telemetry.collect import Collector
from raylaunch.config.schema import Config
from raylaunch.errors import StateError
from raylaunch.host.ports import Ports
from raylaunch.state import records
from raylaunch.state.cluster_events import Election, FileRestored, HeadFenced, HeadStarted
from raylaunch.state.members import MemberRow, Members
from raylaunch.state.published import Published
from raylaunch.state.records import Cluster, Head

log = logging.getLogger("raylaunch.head")
FENCE_EVERY = 0.5


class HeadController:
    """What the head's agent does for the whole cluster. `stop` ends this node and with it the cluster,
    `resign` ends this node as head only. `nodes`: how many the base job got."""

    def __init__(
        self, directory: Path, cluster: Cluster, config: Config, head: Head, members: ControlServer,
        env: Mapping[str, str], stop: Callable[[str], None], resign: Callable[[str], None], nodes: int,
    ) -> None:  # fmt: skip
        self.head, self._members, self._env, self._nodes = head, members, env, nodes
        self.context = context = HeadContext(directory, cluster, config, head, stop, resign)
        self._file = Published(directory / records.HEAD_FILE)
        self.table = MemberTable(context, members)
        to_ray = {"RAY_ADDRESS": head.gcs, "RAYLAUNCH_INCARNATION": str(head.incarnation)}
        self.drivers = Drivers(context, {**env, **to_ray})
        self.ending = HeadEnding(context, self.table, self.drivers)
        self.queue = RunQueue(context, self.table, self.drivers, self.ending)
        self.requests = RequestLoop(context, self.table, self.queue, self.ending)
        self.nodes = NodeDuty(context, self.table, self.ending)
        self._collector = Collector(directory, cluster.canary, context.off_loop, context.event, self.table.alive)

    # -- for the agent ---------------------------------------------------------------------------------

    @property
    def enough(self) -> asyncio.Event:
        """The minimum of nodes is ready: what is not needed for that may start now."""
        return self.context.enough

    @property
    def exit_code(self) -> int:
        return self.context.exit_code

    @exit_code.setter
    def exit_code(self, code: int) -> None:
        self.context.exit_code = code

    def notice(self) -> None:
        """Slurm's notice came."""
        self.ending.notice()

    def terminated(self) -> bool:
        """SIGTERM came; whether the head sees to the end itself."""
        return self.ending.terminated()

    # -- the begin -------------------------------------------------------------------------------------

    async def open(self, why: str) -> None:
        """Begin: admit agents, publish head.json, take requests. `why`: of an election."""
        context, head = self.context, self.head
        await context.still_leads()
        await context.off_loop(context.recall, self._nodes)
        context.elected = bool(why)
        if why:
            self.table.inherit(await context.off_loop(self._nodes_before))
        self._members.lead(head.incarnation, self.table.changed, self._collector.take)
        await context.still_leads()
        await context.off_loop(self._file.write, head.values())
        if why:
            context.event(Election(head.incarnation, head.node, why))
        context.event(HeadStarted(head.node, head.address, head.incarnation))
        for duty in (
            self.table.keep_written(), self.requests.run(), self._watch_for_newer(), self.queue.run(),
            self.nodes.run(), self._collector.run(), self._serve_metrics(),
        ):  # fmt: skip
            context.spawn(duty)

    def _nodes_before(self) -> tuple[MemberRow, ...]:
        """What the head before this one wrote of its nodes. A file that nobody can read keeps nobody from leading: the
        nodes come by themselves."""
        try:
            return Members.read(self.context.directory).nodes
        except StateError as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            log.error("the former node table cannot be used error=%r", error.message)
            return ()

    async def _serve_metrics(self) -> None:
        await self.enough.wait()
        ports = Ports(self.head.control_port - 1)
        await metrics_process.keep(self.context.directory, self.head.address, ports.metrics, self._env)

    # -- the fence -------------------------------------------------------------------------------------

    async def _watch_for_newer(self) -> None:
        """A head that was thought dead (frozen, cut off) finds that others went on, and makes way."""
        context = self.context
        while True:
            with context.errors.caught("check for newer heads"):
                if await context.off_loop(context.is_fenced):
                    context.resign("a newer incarnation has begun")
                    return
                await context.off_loop(self.restore)
            await asyncio.sleep(FENCE_EVERY)

    def restore(self) -> None:
        """Put back what an older head's late words lie over."""
        for name, file in (
            (records.HEAD_FILE, self._file), (records.MEMBERS_FILE, self.table), (records.DUTIES_FILE, self.context.duties_file),
        ):  # fmt: skip
            if file.restore():
                self.context.event(FileRestored(name))

    # -- the end ---------------------------------------------------------------------------------------

    async def abandon(self) -> None:
        """Stop being the head, at once and without orders to anybody: they follow, or have, another."""
        context = self.context
        self.table.closed, context.course = True, context.course.begin("another head leads")
        context.cancel_all()
        self.drivers.kill()
        self.nodes.stop()
        with context.errors.caught("check for newer heads"):
            if await context.off_loop(context.is_fenced):  # told here, whichever part found it
                context.event(HeadFenced(self.head.node, self.head.incarnation))
        await context.off_loop(lambda: None)  # what was to be written is
        context.close_files()

    async def close(self, reason: str) -> None:
        """Send the other agents home and wait for their word, bounded."""
        self.context.cancel_all()
        submitting = asyncio.create_task(self.nodes.end())
        await self.ending.close(reason)
        await submitting

    def write_end(self, reason: str, left_here: int) -> None:
        """The last word, in a thread."""
        self.ending.write_end(reason, left_here)
