"""The table of nodes: who is here, who was lost and whose fault that was, who is to leave. Written to members.json."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from raylaunch.cluster.head.context import HeadContext
from raylaunch.cluster.membership.control_channel import ControlServer, Member
from raylaunch.cluster.node_loop import policy
from raylaunch.state import records
from raylaunch.state.head_state import Draining
from raylaunch.state.members import OVER, MemberRow, Members, NodeInfo
from raylaunch.state.node_events import (
    NodeDraining,
    NodeEnded,
    NodeFailed,
    NodeJoined,
    NodeLost,
    NodeReady,
    NodeRestarting,
    NodeStarting,
    NodeStrike,
)
from raylaunch.state.published import Published
from raylaunch.timing import BLAME_AFTER, FOLLOW_LIMIT

log = logging.getLogger("raylaunch.head")

AT_ONCE = 10.0
"""Seconds between two losses that may be one cut of the network: silence is noticed node by node."""
KEEP_GONE = 500
"""Rows of nodes that are gone, in the table: accounts and reports ask what they had."""
WRITE_AGAIN = 1.0


def most_were_lost(when: float, losses: Sequence[float], here: int) -> bool:
    """Whether most of the nodes that were here were lost at once, at about `when`: then this node's network is at
    fault. `losses`: when those were lost that are; `here`: nodes that are not."""
    at_once = sum(abs(one - when) < AT_ONCE for one in losses)
    return 2 * at_once > at_once + here


class MemberTable:
    """The nodes that this head leads. `members` holds the connections, and calls `changed`."""

    def __init__(self, context: HeadContext, members: ControlServer) -> None:
        self._context, self.members = context, members
        self._file = Published(context.directory / records.MEMBERS_FILE)
        self.ends: float | None = None
        """When the base job's time is up (Unix)."""
        self.closed = False
        self._rows: dict[str, tuple[NodeInfo, MemberRow]] = {}
        """As they were made last: a large table would keep the event loop busy, and most of it is as it was."""

    # -- who is here -----------------------------------------------------------------------------------

    def rows(self) -> tuple[MemberRow, ...]:
        """The nodes as members.json has them."""
        self._rows = {m.node: (m.info, self._row(m)) for m in self.members.table.values()}
        return tuple(row for _, row in self._rows.values())

    def _row(self, m: Member) -> MemberRow:
        state = self.state_of(m)
        info, row = self._rows.get(m.node, (None, None))
        if row is not None and info is m.info and (row.state, row.since) == (state, m.since):
            return row
        role = "head" if m.node == self._context.head.node else "worker"
        return MemberRow(**{**dict(m.info), "state": state}, name=m.node, role=role, since=m.since)

    def state_of(self, member: Member) -> str:
        now = member.info.state
        if now in OVER:
            return now
        if not member.alive:
            return "lost"
        return "draining" if member.node in self._context.memory.draining else now

    def alive(self) -> list[str]:
        return [m.node for m in self.members.table.values() if m.alive]

    def ready(self, beside: str | None = None) -> int:
        """Nodes that are ready; with `beside`, those of other jobs than this."""
        ready = [m for m in self.members.table.values() if m.alive and m.info.state == "ready"]
        return sum(beside is None or m.info.job != beside for m in ready)

    def own_job(self) -> str:
        """The job of the head's own node; "" while its agent has not reported it."""
        member = self.members.table.get(self._context.head.node)
        return member.info.job if member is not None else ""

    def of_job(self, job: str) -> list[str]:
        return [m.node for m in self.members.table.values() if m.info.job == job]

    # -- what is heard of them -------------------------------------------------------------------------

    def changed(self, member: Member, what: str) -> None:
        """A node joined, said something, or is gone (`what`: why)."""
        if self.closed:
            return  # our own node's farewell, after the last word
        log.info("member node=%s alive=%s state=%s what=%r", member.node, member.alive, member.info.state, what)
        self._context.table_changed.set()
        self._context.nodes_changed.set()
        if what == "joined":
            self._joined(member)
        elif what == "changed":
            self._told(member)
        elif not self._context.course.ending and member.info.state not in OVER:
            self._context.event(NodeLost(member.node, what))
            self._context.spawn(self.record_loss(member, what))

    def _joined(self, member: Member) -> None:
        self._context.event(NodeJoined(member.node, member.info.address))
        if self._context.ready.is_set():
            self.members.order("join", only=member)
        self._drain_again(member)

    def _told(self, member: Member) -> None:
        now = member.info.state
        if member.node == self._context.head.node and now == "ready":
            self._context.ready.set()
            self.members.order("join")
        if now in OVER:
            self._forget_draining(member.node)
        if self.ready() >= self._context.cluster.min_nodes:
            self._context.enough.set()
        error = member.info.error
        match now:
            case "starting":
                self._context.event(NodeStarting(member.node))
            case "ready":
                self._context.event(NodeReady(member.node))
            case "restarting":
                self._context.event(NodeRestarting(member.node, error))
            case "failed":
                self._context.event(NodeFailed(member.node, error))
            case "ended":
                self._context.event(NodeEnded(member.node))

    # -- whose fault it was ----------------------------------------------------------------------------

    async def record_loss(self, member: Member, reason: str, after: float | None = None) -> None:
        """A strike for a lost node; none when most are lost at once, nor when the same agent is back: the network had
        a hiccup. Nor where the storage does not say whether this head was replaced."""
        node, pid = member.node, member.info.pid
        await asyncio.sleep(BLAME_AFTER if after is None else after)
        now = self.members.table.get(node)
        if now is not None and now.alive and now.info.pid == pid:
            return
        losses = [m.since for m in self.members.table.values() if self.state_of(m) == "lost"]
        if most_were_lost(member.since, losses, len(self.alive())):
            return
        with self._context.errors.caught(f"strike of node {node}"):
            if not await self._context.off_loop(self._context.is_fenced):
                self.strike(node, reason)

    def strike(self, node: str, reason: str) -> None:
        """A node was lost, or is broken: remembered over elections."""
        memory = self._context.memory
        count = memory.strikes[node] = memory.strikes.get(node, 0) + 1
        memory.excluded = sorted(policy.excluded(memory.strikes, self._context.config.elastic))
        self._context.event(NodeStrike(node, count, reason))
        self._context.remember()

    def inherit(self, rows: Sequence[MemberRow]) -> None:
        """The nodes that the head before this one knew: lost, until they come by themselves."""
        now = time.time()
        for row in rows:
            # Its own state matters once it is connected.
            known = row if row.state in OVER else row.model_copy(update={"state": "starting"})
            since = row.since if row.state in {*OVER, "lost"} else now
            self.members.table[row.name] = Member(row.name, known.info(), alive=False, since=since)
        self._context.spawn(self._mark_unreturned_lost(now))

    async def _mark_unreturned_lost(self, began: float) -> None:
        """Whoever was there when this head began and did not follow to it is lost; who was lost before, was."""
        await asyncio.sleep(FOLLOW_LIMIT)
        for member in list(self.members.table.values()):
            if self.state_of(member) == "lost" and member.since >= began:
                self._context.event(NodeLost(member.node, "it did not follow to the new head"))
                await self.record_loss(member, "it did not follow to the new head", after=0.0)

    # -- who is to leave -------------------------------------------------------------------------------

    def drain(self, node: str, reason: str) -> None:
        """Have the run leave this node at its next step, then end its agent."""
        memory, member = self._context.memory, self.members.table.get(node)
        if node in memory.draining or member is None or member.info.state in OVER:
            return
        memory.draining[node] = Draining(reason, member.info.pid)
        self._context.event(NodeDraining(node, reason))
        self._context.remember()
        self._context.table_changed.set()
        if not memory.running:
            self.drained(node)

    def drained(self, node: str) -> None:
        """No attempt uses the node any more: its agent may go; that is said once, so an agent which does not hear it
        is told when it is back. The head's own end would be the cluster's: it resigns, comes back as a member, and its
        successor drains it."""
        memory, member = self._context.memory, self.members.table.get(node)
        draining = memory.draining.get(node)
        if draining is None:
            return
        if node == self._context.head.node:
            self._context.resign(f"this node is drained: {draining.reason}")
            return
        memory.draining[node] = replace(draining, left=True)
        self._context.remember()
        if member is not None:
            self.members.order("end", only=member)

    def all_drained(self) -> None:
        """There is no run any more."""
        for node in list(self._context.memory.draining):
            self.drained(node)

    def _drain_again(self, member: Member) -> None:
        """A node that drains is connected anew, to this head or to another: it drains on, if it is the same agent."""
        draining = self._context.memory.draining.get(member.node)
        if draining is not None and draining.agent != member.info.pid:
            self._forget_draining(member.node)
        elif draining is not None and (draining.left or not self._context.memory.running):
            self.drained(member.node)

    def _forget_draining(self, node: str) -> None:
        if self._context.memory.draining.pop(node, None) is not None:
            self._context.remember()

    # -- members.json ----------------------------------------------------------------------------------

    async def keep_written(self) -> None:
        """Write the table whenever it changes."""
        while True:
            await self._context.table_changed.wait()
            self._context.table_changed.clear()
            written = False
            with self._context.errors.caught("node table"):
                self.forget_the_longest_gone()
                await self._context.off_loop(self.write, self.rows())
                written = True
            if not written:
                await asyncio.sleep(WRITE_AGAIN)
                self._context.table_changed.set()

    def forget_the_longest_gone(self) -> None:
        """The table has who is here, and the last of those who were: names may never come again."""
        gone = [m for m in self.members.table.values() if self.state_of(m) in {*OVER, "lost"}]
        for member in sorted(gone, key=lambda m: m.since)[: max(0, len(gone) - KEEP_GONE)]:
            del self.members.table[member.node]
            self._forget_draining(member.node)

    def write(self, rows: tuple[MemberRow, ...]) -> None:
        """In the files' thread."""
        context = self._context
        if context.is_fenced():
            return
        table = Members(
            canary=context.cluster.canary, incarnation=context.head.incarnation, wanted=context.memory.wanted,
            internal_errors=dict(context.errors.present), ends=self.ends, nodes=rows,
        )  # fmt: skip
        self._file.write(table.model_dump())

    def restore(self) -> bool:
        """See `Published`."""
        return self._file.restore()
