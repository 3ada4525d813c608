"""Looking for a head after the one that was is lost: reconnect, ask the others, elect, follow the new one.

Three things go on side by side: the old head is tried again (a hiccup of the network is no end), the
other agents are asked what they see, and the cluster directory is watched for a newer head.
`election.decide` judges; what it says is done here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from raylaunch.cluster.membership import control_channel, election
from raylaunch.cluster.membership.control_channel import AlreadyHere, ControlClient, Refused
from raylaunch.cluster.membership.election import Claim, Leave
from raylaunch.errors import BringUpError, RaylaunchError
from raylaunch.state import records
from raylaunch.state.members import MemberRow, Members, NodeInfo
from raylaunch.state.records import Head
from raylaunch.timing import ALREADY_LIMIT, CONNECT_LIMIT, FILES_EVERY, PUBLISH_LIMIT, SLURM_EVERY, TURN

log = logging.getLogger("raylaunch.seek")

LOOK_EVERY = 0.1
ASK_EVERY = 0.4
RECONNECT_EVERY = 0.2
SLURM_AFTER = 4.0
STORAGE_PAUSE = 1.0
EAGER = 5
"""So many candidates ask at once; the others only when these bring nothing about."""


@dataclass
class HeadSearch:
    """One search for the head after `lost`; `gone`: its process has ended for sure. `lead` is called with the incarnation
    and the voters of a won claim; `missing` asks Slurm which nodes are gone."""

    directory: Path
    canary: str
    node: str
    token: str
    info: Callable[[], NodeInfo]
    lead: Callable[[int, str], Awaitable[Head]]
    missing: Callable[[], frozenset[str]]
    lost: Head
    gone: bool
    _began: float = 0.0
    _answers: dict[str, election.Answer] = field(default_factory=dict)
    _refusing: set[str] = field(default_factory=set)
    _down: frozenset[str] = frozenset()
    _rows: tuple[MemberRow, ...] = ()
    _disowned: bool = False
    _newer: Head | None = None
    _found: tuple[ControlClient, Head] | None = None
    _reason: str = ""
    _claimed: tuple[int, float] = (0, 0.0)
    """The newest claim that was seen, and since when."""

    async def search(self) -> tuple[ControlClient, Head]:
        """The connection to the head that is, old or new; BringUpError when there will be none, AlreadyHere
        when it has this node by another job's agent."""
        self._began = time.monotonic()
        with contextlib.suppress(RaylaunchError, OSError):
            await self._look_at_files()
        helpers = [asyncio.create_task(work) for work in (self._files(), self._reconnect(), self._ask(), self._slurm())]
        try:
            while self._found is None:
                for helper in helpers:
                    if helper.done():
                        helper.result()
                if self._newer is None or time.monotonic() - self._began > PUBLISH_LIMIT:
                    await self._judge()
                await asyncio.sleep(LOOK_EVERY)
            return self._found
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    def _candidates(self) -> tuple[str, ...]:
        return election.candidates(self._rows, self.node, self.lost.node)

    async def _judge(self) -> None:
        facts = election.ElectionFacts(
            me=self.node, candidates=self._candidates(), answers=self._answers,
            silent=time.monotonic() - self._began, gone=self.gone, disowned=self._disowned,
            down=self._down | frozenset(self._refusing), head=self.lost.node,
        )  # fmt: skip
        decision = election.decide(facts)
        if decision.reason != self._reason:
            self._reason = decision.reason
            log.info("no head: %s: %s", type(decision).__name__.lower(), decision.reason)
        if isinstance(decision, Leave):
            raise BringUpError(f"the head {self.lost.node} is gone, and no other was elected: {decision.reason}")
        if isinstance(decision, Claim):
            try:
                if number := await self._claim():
                    head = await self.lead(number, f"{decision.reason} ({', '.join(decision.voters)})")
                    self._take(await self._connected(head), head)
            except (RaylaunchError, OSError) as error:  # storage that is full or gone may be back at the next look
                log.error("this node cannot lead error=%r", str(error))
                await asyncio.sleep(STORAGE_PAUSE)

    def _take(self, link_: ControlClient, head: Head) -> None:
        """Follow this one; a connection that was found meanwhile would keep an old head's table wrong."""
        if self._found is not None:
            self._found[0].close()
        self._found = link_, head

    async def _claim(self) -> int:
        """Try to be the next head; the incarnation, 0 when somebody else was first.

        Storage that fails is a turn that saw nothing. A claim that failed may have been made all the same; nobody leads
        with it then, and like a winner's who died it is passed over after PUBLISH_LIMIT: by the next number, ours or not.
        """
        newest = max([self.lost.incarnation, *await asyncio.to_thread(records.claims, self.directory)])
        if newest > self.lost.incarnation and newest != self._claimed[0]:
            self._began = time.monotonic()  # a new patience for that one
            self._claimed = newest, self._began
        if not election.may_claim(self.lost.incarnation, newest, time.monotonic() - self._claimed[1]):
            return 0
        return newest + 1 if await asyncio.to_thread(records.claim, self.directory, newest + 1, self.node) else 0

    async def _connected(self, head: Head, limit: float = CONNECT_LIMIT) -> ControlClient:
        return await ControlClient.connect(
            head.address, head.control_port, self.token, head.incarnation, self.node, self.info(), limit
        )

    async def _files(self) -> None:
        while True:
            await asyncio.sleep(FILES_EVERY)
            with contextlib.suppress(RaylaunchError, OSError):  # shared storage hiccups: the next look counts
                await self._look_at_files()

    async def _look_at_files(self) -> None:
        """What the lost head wrote last, and whether there is a newer one."""
        head = await asyncio.to_thread(Head.read, self.directory)
        if head is not None and head.canary == self.canary and head.incarnation > self.lost.incarnation:
            if self._newer is None or head.incarnation > self._newer.incarnation:
                self._newer, self._began = head, time.monotonic()
                log.info("a newer head node=%s incarnation=%d", head.node, head.incarnation)
            return
        table = await asyncio.to_thread(Members.read, self.directory)
        if table.canary == self.canary:
            self._rows, mine = table.nodes, table.node(self.node)
            of_lost = table.incarnation == self.lost.incarnation
            self._disowned = of_lost and mine is not None and mine.state == "lost"

    async def _reconnect(self) -> None:
        """Try the head that is: the newer one, else the lost one."""
        already: float | None = None
        while self._found is None:
            head = self._newer or self.lost
            try:
                found = await self._connected(head)
                if self._found is None and head.incarnation >= (self._newer or head).incarnation:
                    self._take(found, head)
                    return
                found.close()
            except AlreadyHere:
                already = already or time.monotonic()
                if time.monotonic() - already > ALREADY_LIMIT:
                    raise
            except Refused as error:
                self.gone = self.gone or isinstance(error, control_channel.NotHead)
                log.info("not the head: %s", error)
            except OSError as error:
                log.debug("no answer node=%s error=%r", head.node, str(error))
            if head is self._newer and time.monotonic() - self._began > PUBLISH_LIMIT:
                self.lost, self._newer, self.gone = head, None, False  # it died right after its election
                self._began = time.monotonic()
            await asyncio.sleep(RECONNECT_EVERY)

    async def _ask(self) -> None:
        """Ask the other candidates, over and over."""
        while True:
            names = self._candidates()
            others = [row for row in self._rows if row.name in names and row.name != self.node]
            late = self.node in names and names.index(self.node) >= EAGER
            if not late or time.monotonic() - self._began > 4 * TURN:
                gate = asyncio.Semaphore(64)
                await asyncio.gather(*(self._ask_one(row, gate) for row in others))
            await asyncio.sleep(ASK_EVERY)

    async def _ask_one(self, row: MemberRow, gate: asyncio.Semaphore) -> None:
        name = row.name
        async with gate:
            try:
                answer = await control_channel.ask(row.address, row.control_port, self.token, self.node)
            except ConnectionRefusedError:
                self._refusing.add(name)
                self._answers.pop(name, None)
                return
            except (OSError, Refused):
                self._answers.pop(name, None)
                return
        self._refusing.discard(name)
        self._answers[name] = "sees" if answer == "sees" else "lost"

    async def _slurm(self) -> None:
        """Slurm's word on who is gone: slow, and for when the agents' own is not enough."""
        await asyncio.sleep(SLURM_AFTER)
        while True:
            self._down = await asyncio.to_thread(self.missing)
            await asyncio.sleep(SLURM_EVERY)
