"""The connection between the head's agent and each other agent: who is alive, and orders.

One TCP connection per agent, JSON lines, both sides proving that they know the cluster's token
(HMAC over the other's nonce; the token itself never travels). The head pings every second; a
closed connection or PING_LIMIT seconds of silence means that the other side is gone. Nothing here
decides what follows from that: it calls back.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PING_EVERY = 1.0
PING_LIMIT = 5.0
HANDSHAKE_LIMIT = 5.0
_LINE_LIMIT = 1 << 16

log = logging.getLogger(__name__)


class Refused(Exception):
    """The other side does not know this cluster's token, or is of another incarnation."""


def _proof(token: str, *parts: object) -> str:
    return hmac.new(token.encode(), "\x1f".join(map(str, parts)).encode(), hashlib.sha256).hexdigest()


async def _receive(reader: asyncio.StreamReader, limit: float) -> dict[str, Any]:
    """One message; ConnectionError when the other side is gone or silent for `limit` seconds."""
    try:
        line = await asyncio.wait_for(reader.readline(), limit)
        message = json.loads(line) if line else None
    except (TimeoutError, ValueError) as error:
        raise ConnectionError(f"no usable message in {limit:g} s") from error
    if not isinstance(message, dict):
        raise ConnectionError("the connection was closed")
    return message


def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")


@dataclass
class Member:
    """One node as the head sees it. `info` is what its agent says: state, address, ports, resources."""

    node: str
    info: dict[str, Any]
    alive: bool = True
    since: float = field(default_factory=time.time)
    writer: asyncio.StreamWriter | None = None


class Members:
    """The head's side: accepts agents, keeps the table of members, sends them orders."""

    def __init__(self, token: str, incarnation: int, changed: Callable[[Member, str], None]) -> None:
        self._token, self._incarnation, self._changed = token, incarnation, changed
        self.table: dict[str, Member] = {}
        self._server: asyncio.Server | None = None

    async def serve(self, address: str, port: int) -> None:
        self._server = await asyncio.start_server(self._attend, address, port, limit=_LINE_LIMIT)

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
        pinger = asyncio.create_task(self._ping(writer))
        reason = "connection closed"
        try:
            while True:
                message = await _receive(reader, PING_LIMIT)
                if "info" in message:
                    member.info |= message["info"]
                    self._changed(member, "changed")
        except (ConnectionError, OSError) as error:
            reason = str(error) or reason
        finally:
            pinger.cancel()
            writer.close()
            if self.table.get(member.node) is member:  # not replaced by a newer connection
                member.alive = False
                self._changed(member, reason)

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Member:
        nonce = secrets.token_hex(16)
        _send(writer, {"nonce": nonce, "incarnation": self._incarnation})
        hello = await _receive(reader, HANDSHAKE_LIMIT)
        node = str(hello.get("node"))
        if not hmac.compare_digest(str(hello.get("proof")), _proof(self._token, "agent", nonce, node)):
            _send(writer, {"refused": "wrong token: this is another cluster's head"})
            raise ConnectionError("wrong token")
        _send(writer, {"proof": _proof(self._token, "head", hello.get("nonce"))})
        member = Member(node, dict(hello.get("info") or {}), writer=writer)
        self.table[node] = member
        self._changed(member, "joined")
        return member

    @staticmethod
    async def _ping(writer: asyncio.StreamWriter) -> None:
        while True:
            _send(writer, {"ping": time.time()})
            await asyncio.sleep(PING_EVERY)


class Link:
    """An agent's side: one connection to the head."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(
        cls, address: str, port: int, token: str, incarnation: int, node: str, info: dict[str, Any]
    ) -> Link:
        """Connect and prove each other; Refused for a wrong token, OSError when nobody answers."""
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(address, port, limit=_LINE_LIMIT), HANDSHAKE_LIMIT
        )
        try:
            greeting = await _receive(reader, HANDSHAKE_LIMIT)
            if greeting.get("incarnation") != incarnation:
                raise Refused(f"the head at {address}:{port} is of another incarnation")
            nonce = secrets.token_hex(16)
            proof = _proof(token, "agent", greeting.get("nonce"), node)
            _send(writer, {"node": node, "nonce": nonce, "proof": proof, "info": info})
            answer = await _receive(reader, HANDSHAKE_LIMIT)
            if "refused" in answer:
                raise Refused(str(answer["refused"]))
            if not hmac.compare_digest(str(answer.get("proof")), _proof(token, "head", nonce)):
                raise Refused(f"the head at {address}:{port} does not know this cluster's token")
        except BaseException:
            writer.close()
            raise
        return cls(reader, writer)

    def tell(self, **info: Any) -> None:
        """Tell the head what changed on this node."""
        _send(self._writer, {"info": info})

    async def orders(self) -> str:
        """Answer pings until the head gives an order, which is returned; ConnectionError when it is gone."""
        while True:
            message = await _receive(self._reader, PING_LIMIT)
            if "order" in message:
                return str(message["order"])
            _send(self._writer, {"pong": message.get("ping")})

    def close(self) -> None:
        self._writer.close()
