"""The connection between the head's agent and each other agent: who is alive, and orders.

One TCP connection per agent, JSON lines, both sides proving that they know the cluster's token
(HMAC over the other's nonce; the token itself never travels). The head pings twice a second; a
closed connection or PING_LIMIT seconds of silence means that the other side is gone. Every agent
listens, for it may be elected, and answers one question until then: whether it still sees the head.
Nothing here decides what follows from all that: it calls back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raylaunch.host import wire
from raylaunch.state.members import NodeInfo
from raylaunch.timing import ASK_LIMIT, HANDSHAKE_LIMIT, PING_EVERY, PING_LIMIT

_LINE_LIMIT = 1 << 16

log = logging.getLogger(__name__)


class Refused(Exception):
    """The other side does not know this cluster's token."""


class AlreadyHere(Refused):
    """Another job's agent has this node in the cluster already."""


class NotHead(Refused):
    """The other side is not the head of this incarnation (any more, or yet)."""


class Closed(ConnectionError):
    """The other side's process, or its kernel for it, has closed the connection: it is gone for sure."""


class AgentHello(wire.Message):
    """What the side that connects sends then: to join, or to `ask`."""

    node: str
    nonce: str
    proof: str
    ask: str | None = None
    incarnation: int | None = None
    """Of the head that it looks for."""
    info: NodeInfo | None = None


class Answer(wire.Message):
    """To a hello."""

    proof: str | None = None
    time: float | None = None
    """The head's clock: welcome."""
    refused: str | None = None
    """Why not."""
    already: bool = False
    """It is refused because another job's agent has this node."""
    head_of: int | None = None
    """It is not the head of that incarnation, but of this (0: no head)."""
    answer: str | None = None
    """To the question whether it sees the head: sees or lost."""


class FromAgent(wire.Message):
    """From an agent to the head, one of these."""

    info: NodeInfo | None = None
    load: dict[str, Any] | None = None
    """See `telemetry/sample`."""
    pong: float | None = None


class FromHead(wire.Message):
    """From the head to an agent, one of these."""

    order: str | None = None
    """join or end."""
    ping: float | None = None


async def _receive(reader: asyncio.StreamReader, limit: float, kind: type[wire.M]) -> wire.M:
    """One message; ConnectionError when the other side is gone, silent for `limit` seconds, or says anything else."""
    try:
        line = await asyncio.wait_for(reader.readline(), limit)
        if not line:
            raise Closed("the connection was closed")
        return wire.decoded(line, kind)
    except ConnectionResetError as error:
        raise Closed("the connection was reset") from error
    except (TimeoutError, ValueError) as error:
        raise ConnectionError(f"no usable message in {limit:g} s") from error


def _send(writer: asyncio.StreamWriter, message: wire.Message) -> None:
    writer.write(wire.encoded(message))


@dataclass
class Member:
    """One node as the head sees it. `info` is what its agent has reported. `since`: when it came into this state."""

    node: str
    info: NodeInfo
    alive: bool = True
    since: float = field(default_factory=time.time)
    writer: asyncio.StreamWriter | None = None


class ControlServer:
    """An agent's listening side. Until `lead` it is a witness only; then it is the head's: it accepts
    agents, keeps the table of members, sends them orders."""

    def __init__(self, token: str, witness: Callable[[], str]) -> None:
        self._token, self._witness = token, witness
        self._incarnation = 0
        self._changed: Callable[[Member, str], None] = lambda member, what: None
        self._loaded: Callable[[str, dict[str, Any]], None] = lambda node, load: None
        self.table: dict[str, Member] = {}
        self._server: asyncio.Server | None = None

    async def serve(self, address: str, port: int) -> None:
        self._server = await asyncio.start_server(self._attend, address, port, limit=_LINE_LIMIT)

    def lead(
        self,
        incarnation: int,
        changed: Callable[[Member, str], None],
        loaded: Callable[[str, dict[str, Any]], None] = lambda node, load: None,
    ) -> None:
        """Be the head of this incarnation from now on. `loaded`: a node has measured its load."""
        self._incarnation, self._changed, self._loaded = incarnation, changed, loaded

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for member in self.table.values():
            if member.writer is not None:
                member.writer.close()

    def order(self, command: str, only: Member | None = None) -> None:
        """Send an order to every living member, or to one."""
        for member in self.table.values() if only is None else [only]:
            if member.alive and member.writer is not None:
                _send(member.writer, FromHead(order=command))

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            member = await self._admit(reader, writer)
        except (ConnectionError, OSError) as error:
            log.info("connection refused peer=%s reason=%r", writer.get_extra_info("peername"), str(error))
            writer.close()
            return
        except asyncio.CancelledError:  # this agent ends; asyncio's server (3.11) logs a cancelled handler as an error
            writer.close()
            return
        pinger = asyncio.create_task(self._ping(writer))
        reason = "connection closed"
        try:
            while True:
                message = await _receive(reader, PING_LIMIT, FromAgent)
                if message.load is not None:
                    self._loaded(member.node, message.load)
                elif message.info is not None:
                    if message.info.state != member.info.state:
                        member.since = time.time()
                    member.info = member.info.changed(message.info)
                    self._changed(member, "changed")
        except (ConnectionError, OSError) as error:
            reason = str(error) or reason
        except asyncio.CancelledError:
            reason = "this agent ends"
        finally:
            pinger.cancel()
            writer.close()
            if self.table.get(member.node) is member:  # not replaced by a newer connection
                member.alive, member.since = False, time.time()
                self._changed(member, reason)

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Member:
        nonce = wire.nonce()
        _send(writer, wire.Greeting(nonce=nonce))
        hello = await _receive(reader, HANDSHAKE_LIMIT, AgentHello)
        node, info = hello.node, hello.info
        if not wire.proves(hello.proof, wire.proof(self._token, "agent", nonce, node)):
            _send(writer, Answer(refused="wrong token: this is another cluster's head"))
            raise ConnectionError("wrong token")
        proof = wire.proof(self._token, "head", hello.nonce)
        if hello.ask:
            _send(writer, Answer(proof=proof, answer="sees" if self._incarnation else self._witness()))
            raise ConnectionError("answered")
        if not self._incarnation or hello.incarnation != self._incarnation:
            _send(writer, Answer(proof=proof, head_of=self._incarnation))
            raise ConnectionError("not the head that was asked for")
        if info is None:
            raise ConnectionError("no usable message: info is missing")
        there = self.table.get(node)
        if there is not None and there.alive and there.info.job != info.job:
            # Two small jobs may land on one shared node; a second agent there would fight over it.
            _send(writer, Answer(refused=f"{node} is in the cluster already, by job {there.info.job}", already=True))
            raise ConnectionError("a second agent on this node")
        _send(writer, Answer(proof=proof, time=time.time()))
        member = Member(node, info, writer=writer)
        self.table[node] = member
        self._changed(member, "joined")
        return member

    @staticmethod
    async def _ping(writer: asyncio.StreamWriter) -> None:
        while True:
            _send(writer, FromHead(ping=time.time()))
            await asyncio.sleep(PING_EVERY)


async def _greet(
    address: str, port: int, token: str, node: str, limit: float, **more: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Answer]:
    """Connect and prove each other: the streams and the other's answer."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(address, port, limit=_LINE_LIMIT), limit)
    try:
        greeting = await _receive(reader, limit, wire.Greeting)
        nonce = wire.nonce()
        proof = wire.proof(token, "agent", greeting.nonce, node)
        _send(writer, AgentHello(node=node, nonce=nonce, proof=proof, **more))
        answer = await _receive(reader, limit, Answer)
        if answer.refused is not None:
            raise (AlreadyHere if answer.already else Refused)(answer.refused)
        if not wire.proves(answer.proof, wire.proof(token, "head", nonce)):
            raise Refused(f"{address}:{port} does not know this cluster's token")
    except BaseException:
        writer.close()
        raise
    return reader, writer, answer


async def ask(address: str, port: int, token: str, node: str) -> str:
    """Ask another agent whether it sees the head: "sees" or "lost"; OSError when it cannot be reached."""
    _, writer, answer = await _greet(address, port, token, node, ASK_LIMIT, ask="head")
    writer.close()
    return str(answer.answer)


class ControlClient:
    """An agent's side: one connection to the head. Pings are answered until `close`, whatever else the agent does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ahead: float | None = None) -> None:
        self._reader, self._writer = reader, writer
        self.ahead = ahead
        """Seconds by which our clock is at least before the head's (behind: negative); None: it did not say."""
        self._orders: asyncio.Queue[str | OSError] = asyncio.Queue()
        """The last one is why there are no more."""
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def connect(
        cls,
        address: str,
        port: int,
        token: str,
        incarnation: int,
        node: str,
        info: NodeInfo,
        limit: float = HANDSHAKE_LIMIT,
    ) -> ControlClient:
        """Connect and prove each other; Refused for a wrong token, NotHead for an agent that is not the head of
        this incarnation, OSError when nobody answers."""
        began = time.time()
        reader, writer, answer = await _greet(address, port, token, node, limit, incarnation=incarnation, info=info)
        ended = time.time()
        if answer.head_of is not None:
            writer.close()
            raise NotHead(f"{address}:{port} is not the head of incarnation {incarnation}")
        told = answer.time
        # The head said it in between, whatever took so long.
        ahead = max(0.0, began - told) + min(0.0, ended - told) if told is not None else None
        return cls(reader, writer, ahead)

    def report(self, info: NodeInfo) -> None:
        """Report this node to the head, whenever something about it has changed."""
        _send(self._writer, FromAgent(info=info))

    def report_load(self, load: dict[str, Any]) -> None:
        """Report to the head how busy this node is."""
        _send(self._writer, FromAgent(load=load))

    async def orders(self) -> str:
        """The head's next order; ConnectionError when it is gone."""
        found = await self._orders.get()
        if isinstance(found, OSError):
            self._orders.put_nowait(found)  # whoever asks again is told the same
            raise found
        return found

    async def _listen(self) -> None:
        """Answer pings and keep orders, until the head is gone."""
        try:
            while True:
                message = await _receive(self._reader, PING_LIMIT, FromHead)
                if message.order is not None:
                    self._orders.put_nowait(message.order)
                else:
                    _send(self._writer, FromAgent(pong=message.ping))
        except OSError as error:
            self._orders.put_nowait(error)

    def close(self) -> None:
        self._listening.cancel()
        self._writer.close()
