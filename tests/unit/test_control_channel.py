"""The link between agents, over real loopback sockets: admission, orders, loss."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
from collections.abc import Awaitable, Callable

import pytest

from raylaunch.cluster.membership.control_channel import (
    AlreadyHere,
    Closed,
    ControlClient,
    ControlServer,
    Member,
    Refused,
)
from raylaunch.host.wire import proof
from raylaunch.state.members import NodeInfo

TOKEN = "correct horse"


async def until(condition: Callable[[], bool], limit: float = 60.0) -> None:
    async with asyncio.timeout(limit):
        while not condition():
            await asyncio.sleep(0.01)


def run(scenario: Callable[[ControlServer, int, list[tuple[str, str]]], Awaitable[None]]) -> None:
    async def main() -> None:
        seen: list[tuple[str, str]] = []
        members = ControlServer(TOKEN, lambda: "lost")
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
    async def scenario(members: ControlServer, port: int, seen: list[tuple[str, str]]) -> None:
        link = await ControlClient.connect("127.0.0.1", port, TOKEN, 7, "node1", NodeInfo(state="starting"))
        link.report(NodeInfo(state="ready"))
        await until(lambda: "node1" in members.table and members.table["node1"].info.state == "ready")
        members.order("end")
        assert await link.orders() == "end"
        link.close()
        await until(lambda: not members.table["node1"].alive)
        assert [what for _, what in seen][:2] == ["joined", "changed"]

    run(scenario)


@pytest.mark.parametrize(("token", "incarnation", "why"), [("wrong", 7, "wrong token"), (TOKEN, 6, "incarnation")])
def test_refuses_at_once(token: str, incarnation: int, why: str) -> None:
    async def scenario(members: ControlServer, port: int, seen: list[tuple[str, str]]) -> None:
        async with asyncio.timeout(60):
            with pytest.raises(Refused, match=why):
                await ControlClient.connect("127.0.0.1", port, token, incarnation, "node1", NodeInfo(state="starting"))
        assert not members.table and not seen

    run(scenario)


def test_another_job_s_agent_does_not_get_a_node_that_is_taken() -> None:
    """The same job's does: it was killed and came back."""

    async def scenario(members: ControlServer, port: int, seen: list[tuple[str, str]]) -> None:
        first = await ControlClient.connect("127.0.0.1", port, TOKEN, 7, "node1", NodeInfo(state="ready", job="1"))
        with pytest.raises(AlreadyHere, match="by job 1"):
            await ControlClient.connect("127.0.0.1", port, TOKEN, 7, "node1", NodeInfo(state="starting", job="2"))
        second = await ControlClient.connect("127.0.0.1", port, TOKEN, 7, "node1", NodeInfo(state="starting", job="1"))
        first.close()
        await until(lambda: len(seen) >= 2)
        assert members.table["node1"].alive and members.table["node1"].info.state == "starting"
        second.close()

    run(scenario)


def test_an_impostor_head_is_refused() -> None:
    async def main() -> None:
        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'{"nonce": "00", "incarnation": 7}\n')
            await reader.readline()
            writer.write(b'{"proof": "made up"}\n')
            writer.close()

        server = await asyncio.start_server(impostor, "127.0.0.1", 0)
        with pytest.raises(Refused, match="does not know"):
            await ControlClient.connect(
                "127.0.0.1", server.sockets[0].getsockname()[1], TOKEN, 7, "node1", NodeInfo(state="starting")
            )
        server.close()

    asyncio.run(main())


def test_a_returning_node_replaces_itself_and_is_not_lost_by_its_old_connection() -> None:
    async def scenario(members: ControlServer, port: int, seen: list[tuple[str, str]]) -> None:
        first = await ControlClient.connect("127.0.0.1", port, TOKEN, 7, "node1", NodeInfo(state="starting"))
        second = await ControlClient.connect("127.0.0.1", port, TOKEN, 7, "node1", NodeInfo(state="ready"))
        await until(lambda: members.table["node1"].info.state == "ready")
        first.close()
        await asyncio.sleep(0)
        assert members.table["node1"].alive
        second.close()

    run(scenario)


def test_garbage_does_no_harm() -> None:
    async def scenario(members: ControlServer, port: int, seen: list[tuple[str, str]]) -> None:
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\xff\xfe\n", b"x" * 200_000):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(garbage)
            writer.write_eof()
            writer.close()
        link = await ControlClient.connect("127.0.0.1", port, TOKEN, 7, "node1", NodeInfo(state="ready"))
        await until(lambda: "node1" in members.table)
        assert set(members.table) == {"node1"}
        link.close()

    run(scenario)


NOBODY = '"node": "n", "nonce": "00"'
BAD_GREETINGS = {
    "closed at once": b"",
    "not JSON": b"GET / HTTP/1.1\r\n",
    "not UTF-8": b"\xff\xfe\n",
    "not an object": b"[1]\n",
    "null": b"null\n",
    "too long": b"x" * 200_000 + b"\n",
    "too deep": b"[" * 60_000 + b"\n",
    "nothing in it": b"{}\n",
    "a number as node": b'{"node": 1, "nonce": "00", "proof": "00"}\n',
    "a number as nonce": b'{"node": "n", "nonce": 1, "proof": "00"}\n',
    "no proof": f"{{{NOBODY}}}\n".encode(),
    "a list as proof": f'{{{NOBODY}, "proof": [[[1]]]}}\n'.encode(),
    "a proof that is not ASCII": f'{{{NOBODY}, "proof": "h\u00e9"}}\n'.encode(),
    "half a surrogate as proof": f'{{{NOBODY}, "proof": "\\ud800"}}\n'.encode(),
    "half a surrogate as node": b'{"node": "\\ud800", "nonce": "\\udfff", "proof": "00"}\n',
}


@pytest.mark.parametrize("greeting", BAD_GREETINGS.values(), ids=BAD_GREETINGS)
def test_who_cannot_greet_is_refused_with_one_line(greeting: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def scenario(members: ControlServer, port: int, seen: list[tuple[str, str]]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(greeting)
        writer.write_eof()
        with contextlib.suppress(ConnectionResetError):  # it need not read all of it
            await reader.read()  # until the other side closes
        writer.close()
        await until(lambda: bool(caplog.records))
        gc.collect()  # asyncio (3.11) tells of a handler's exception when its task goes
        assert not members.table and not seen

    run(scenario)
    assert [(r.levelname, r.exc_info) for r in caplog.records] == [("INFO", None)], caplog.text
    assert "connection refused" in caplog.text


@pytest.mark.parametrize(
    ("nonce", "answer"),
    [
        ('"00"', '{"proof": "h\u00e9"}'), ('"00"', '{"proof": "\\ud800"}'), ('"00"', '{"proof": [1]}'), ('"00"', '{"refused": [1]}'),
        ("[[1]]", "{}"), ("null", "{}"),
    ],
)  # fmt: skip
def test_an_impostor_that_says_nonsense_is_no_head(nonce: str, answer: str) -> None:
    async def main() -> None:
        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.CancelledError), contextlib.closing(writer):
                writer.write(f'{{"nonce": {nonce}}}\n'.encode())
                await reader.readline()
                writer.write(answer.encode() + b"\n")

        async with asyncio.timeout(60), await asyncio.start_server(impostor, "127.0.0.1", 0) as server:
            with pytest.raises((Refused, OSError)):
                await ControlClient.connect(
                    "127.0.0.1", server.sockets[0].getsockname()[1], TOKEN, 7, "node1", NodeInfo(state="starting")
                )

    asyncio.run(main())


def test_member_states_are_per_node() -> None:
    """What is heard of one changes nothing of another, nor what it was before."""
    first, second = (Member(node, NodeInfo(state="starting", job="1")) for node in "ab")
    first.info = first.info.changed(NodeInfo(state="ready"))
    assert (first.info.state, first.info.job, second.info.state) == ("ready", "1", "starting")


def test_pings_are_answered_while_the_agent_does_something_else() -> None:
    """As it does while a change of head ends its old Ray. Orders that come meanwhile are kept."""

    async def main() -> None:
        answers: asyncio.Queue[bytes] = asyncio.Queue()

        async def head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'{"nonce": "00"}\n')
            hello = json.loads(await reader.readline())
            writer.write(json.dumps({"proof": proof(TOKEN, "head", hello["nonce"])}).encode() + b"\n")
            writer.write(b'{"ping": 1}\n{"order": "join"}\n{"ping": 2}\n')
            for _ in range(2):
                answers.put_nowait(await reader.readline())
            writer.close()

        async with asyncio.timeout(60), await asyncio.start_server(head, "127.0.0.1", 0) as server:
            link = await ControlClient.connect(
                "127.0.0.1", server.sockets[0].getsockname()[1], TOKEN, 7, "node1", NodeInfo(state="starting")
            )
            assert [json.loads(await answers.get()) for _ in range(2)] == [{"pong": 1}, {"pong": 2}]
            assert await link.orders() == "join"
            for _ in range(2):
                with pytest.raises(Closed):
                    await link.orders()
            link.close()

    asyncio.run(main())
