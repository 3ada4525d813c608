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


def _text(message: dict[str, Any], key: str) -> str:
    """A field that has to be a string: the other side may be anybody."""
    value = message.get(key)
    if not isinstance(value, str):
        raise ConnectionError(f"no usable message: {key} is missing or not a string")
    return value


async def _receive(reader: asyncio.StreamReader, limit: float) -> dict[str, Any]:
    """One message; ConnectionError when the other side is gone or silent for `limit` seconds."""
    try:
        line = await asyncio.wait_for(reader.readline(), limit)
        if not line:
            raise Closed("the connection was closed")
        return wire.decoded(line)
    except ConnectionResetError as error:
        raise Closed("the connection was reset") from error
    except (TimeoutError, ValueError) as error:
        raise ConnectionError(f"no usable message in {limit:g} s") from error


def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(wire.encoded(message))


@dataclass
class Member:
    """One node as the head sees it. `info` is what its agent says: state, address, ports, resources.
    `since`: when it came into this state."""

    node: str
    info: dict[str, Any]
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
                _send(member.writer, {"order": command})

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
                message = await _receive(reader, PING_LIMIT)
                if "load" in message:
                    self._loaded(member.node, message["load"])
                elif isinstance(message.get("info"), dict):
                    if message["info"].get("state") != member.info.get("state"):
                        member.since = time.time()
                    member.info |= message["info"]
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
        _send(writer, {"nonce": nonce})
        hello = await _receive(reader, HANDSHAKE_LIMIT)
        node, theirs = _text(hello, "node"), _text(hello, "nonce")
        if not wire.proves(hello.get("proof"), wire.proof(self._token, "agent", nonce, node)):
            _send(writer, {"refused": "wrong token: this is another cluster's head"})
            raise ConnectionError("wrong token")
        proof = wire.proof(self._token, "head", theirs)
        if hello.get("ask"):
            _send(writer, {"proof": proof, "answer": "sees" if self._incarnation else self._witness()})
            raise ConnectionError("answered")
        if not self._incarnation or hello.get("incarnation") != self._incarnation:
            _send(writer, {"proof": proof, "head_of": self._incarnation})
            raise ConnectionError("not the head that was asked for")
        there, info = self.table.get(node), hello.get("info")
        if not isinstance(info, dict):
            raise ConnectionError("no usable message: info is not an object")
        if there is not None and there.alive and there.info.get("job") != info.get("job"):
            # Two small jobs may land on one shared node; a second agent there would fight over it.
            why = f"{node} is in the cluster already, by job {there.info.get('job')}"
            _send(writer, {"refused": why, "already": True})
            raise ConnectionError("a second agent on this node")
        _send(writer, {"proof": proof, "time": time.time()})
        member = Member(node, info, writer=writer)
        self.table[node] = member
        self._changed(member, "joined")
        return member

    @staticmethod
    async def _ping(writer: asyncio.StreamWriter) -> None:
        while True:
            _send(writer, {"ping": time.time()})
            await asyncio.sleep(PING_EVERY)


async def _greet(
    address: str, port: int, token: str, node: str, limit: float, **more: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, dict[str, Any]]:
    """Connect and prove each other: the streams and the other's answer."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(address, port, limit=_LINE_LIMIT), limit)
    try:
        greeting = await _receive(reader, limit)
        nonce = wire.nonce()
        proof = wire.proof(token, "agent", _text(greeting, "nonce"), node)
        _send(writer, {"node": node, "nonce": nonce, "proof": proof, **more})
        answer = await _receive(reader, limit)
        if "refused" in answer:
            raise (AlreadyHere if answer.get("already") else Refused)(_text(answer, "refused"))
        if not wire.proves(answer.get("proof"), wire.proof(token, "head", nonce)):
            raise Refused(f"{address}:{port} does not know this cluster's token")
    except BaseException:
        writer.close()
        raise
    return reader, writer, answer


async def ask(address: str, port: int, token: str, node: str) -> str:
    """Ask another agent whether it sees the head: "sees" or "lost"; OSError when it cannot be reached."""
    _, writer, answer = await _greet(address, port, token, node, ASK_LIMIT, ask="head")
    writer.close()
    return str(answer.get("answer"))


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
        info: dict[str, Any],
        limit: float = HANDSHAKE_LIMIT,
    ) -> ControlClient:
        """Connect and prove each other; Refused for a wrong token, NotHead for an agent that is not the head of
        this incarnation, OSError when nobody answers."""
        began = time.time()
        reader, writer, answer = await _greet(address, port, token, node, limit, incarnation=incarnation, info=info)
        ended = time.time()
        if "head_of" in answer:
            writer.close()
            raise NotHead(f"{address}:{port} is not the head of incarnation {incarnation}")
        told = answer.get("time")
        # The head said it in between, whatever took so long.
        ahead = max(0.0, began - told) + min(0.0, ended - told) if isinstance(told, float) else None
        return cls(reader, writer, ahead)

    def tell(self, **info: Any) -> None:
        """Tell the head what changed on this node."""
        _send(self._writer, {"info": info})

    def tell_load(self, load: dict[str, Any]) -> None:
        """Tell the head how busy this node is."""
        _send(self._writer, {"load": load})

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
                message = await _receive(self._reader, PING_LIMIT)
                if "order" in message:
                    self._orders.put_nowait(str(message["order"]))
                else:
                    _send(self._writer, {"pong": message.get("ping")})
        except OSError as error:
            self._orders.put_nowait(error)

    def close(self) -> None:
        self._listening.cancel()
        self._writer.close()
