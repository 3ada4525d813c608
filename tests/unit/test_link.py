"""The link between agents, over real loopback sockets: admission, orders, loss."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from raylaunch.link import AlreadyHere, Link, Member, Members, Refused

TOKEN = "correct horse"


async def until(condition: Callable[[], bool], limit: float = 60.0) -> None:
    async with asyncio.timeout(limit):
        while not condition():
            await asyncio.sleep(0.01)


def run(scenario: Callable[[Members, int, list[tuple[str, str]]], Awaitable[None]]) -> None:
    async def main() -> None:
        seen: list[tuple[str, str]] = []
        members = Members(TOKEN, lambda: "lost")
        members.lead(7, lambda m, what: seen.append((m.node, what)))
        await members.serve("127.0.0.1", 0)
        assert members._server is not None
        port = members._server.sockets[0].getsockname()[1]
        try:
            await scenario(members, port, seen)
        finally:
            members.close()

    asyncio.run(main())


def test_joins_tells_and_leaves() -> None:
    async def scenario(members: Members, port: int, seen: list[tuple[str, str]]) -> None:
        link = await Link.connect("127.0.0.1", port, TOKEN, 7, "node1", {"state": "starting"})
        link.tell(state="ready")
        await until(lambda: "node1" in members.table and members.table["node1"].info["state"] == "ready")
        members.order("end")
        assert await link.orders() == "end"
        link.close()
        await until(lambda: not members.table["node1"].alive)
        assert [what for _, what in seen][:2] == ["joined", "changed"]

    run(scenario)


@pytest.mark.parametrize(("token", "incarnation", "why"), [("wrong", 7, "wrong token"), (TOKEN, 6, "incarnation")])
def test_refuses_at_once(token: str, incarnation: int, why: str) -> None:
    async def scenario(members: Members, port: int, seen: list[tuple[str, str]]) -> None:
        async with asyncio.timeout(60):
            with pytest.raises(Refused, match=why):
                await Link.connect("127.0.0.1", port, token, incarnation, "node1", {})
        assert not members.table and not seen

    run(scenario)


def test_another_job_s_agent_does_not_get_a_node_that_is_taken() -> None:
    """The same job's does: it was killed and came back."""

    async def scenario(members: Members, port: int, seen: list[tuple[str, str]]) -> None:
        first = await Link.connect("127.0.0.1", port, TOKEN, 7, "node1", {"state": "ready", "job": "1"})
        with pytest.raises(AlreadyHere, match="by job 1"):
            await Link.connect("127.0.0.1", port, TOKEN, 7, "node1", {"state": "starting", "job": "2"})
        await Link.connect("127.0.0.1", port, TOKEN, 7, "node1", {"state": "starting", "job": "1"})
        first.close()
        await until(lambda: len(seen) >= 2)
        assert members.table["node1"].alive and members.table["node1"].info["state"] == "starting"

    run(scenario)


def test_an_impostor_head_is_refused() -> None:
    async def main() -> None:
        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'{"nonce": "00", "incarnation": 7}\n')
            await reader.readline()
            writer.write(b'{"proof": "made up"}\n')

        server = await asyncio.start_server(impostor, "127.0.0.1", 0)
        with pytest.raises(Refused, match="does not know"):
            await Link.connect("127.0.0.1", server.sockets[0].getsockname()[1], TOKEN, 7, "node1", {})
        server.close()

    asyncio.run(main())


def test_a_returning_node_replaces_itself_and_is_not_lost_by_its_old_connection() -> None:
    async def scenario(members: Members, port: int, seen: list[tuple[str, str]]) -> None:
        first = await Link.connect("127.0.0.1", port, TOKEN, 7, "node1", {"state": "starting"})
        await Link.connect("127.0.0.1", port, TOKEN, 7, "node1", {"state": "ready"})
        await until(lambda: members.table["node1"].info["state"] == "ready")
        first.close()
        await asyncio.sleep(0)
        assert members.table["node1"].alive

    run(scenario)


def test_garbage_does_no_harm() -> None:
    async def scenario(members: Members, port: int, seen: list[tuple[str, str]]) -> None:
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\xff\xfe\n", b"x" * 200_000):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(garbage)
            writer.write_eof()
            writer.close()
        link = await Link.connect("127.0.0.1", port, TOKEN, 7, "node1", {"state": "ready"})
        await until(lambda: "node1" in members.table)
        assert set(members.table) == {"node1"}
        link.close()

    run(scenario)


def test_member_states_are_per_node() -> None:
    assert Member("a", {}).info is not Member("b", {}).info
