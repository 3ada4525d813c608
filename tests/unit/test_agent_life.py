"""An agent's life, in virtual time with a made-up Ray and head: restarts of Ray, a lost head, a newer one, the end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import virtual

from raylaunch.cluster.agent import agent, cluster_files, entry, ray_keeper, retry
from raylaunch.cluster.agent.agent import Agent
from raylaunch.cluster.agent.identity import NodeIdentity
from raylaunch.cluster.agent.node_setup import NodeSetup
from raylaunch.cluster.head.context import Replaced
from raylaunch.cluster.membership.control_channel import Closed
from raylaunch.config.schema import Config
from raylaunch.errors import BringUpError, ConfigError, RaylaunchError, StateError
from raylaunch.host.ports import PortLease, Ports
from raylaunch.host.resources import Resources
from raylaunch.host.temp_dir import TempDir
from raylaunch.state import event_log, files, records
from raylaunch.state.members import NodeInfo
from raylaunch.state.records import Head

HERE = NodeIdentity(Path("/nowhere"), "c", "n2", 1, ("n1", "n2"), local=False, job="7", allocation="7:0")
HEAD = Head(canary="c", incarnation=1, node="n1", hostname="n1", address="a1", control_port=1, gcs="a1:2",
            dashboard_port=1, time=0.0, allocation="7:0")  # fmt: skip
NEWER = replace(HEAD, incarnation=2, node="n3")


class Ray:
    """Starts (or not), and ends after so many seconds."""

    pid = 4711

    def __init__(self, starts: bool = True, lives: float = 1e6) -> None:
        self.starts, self.lives = starts, lives
        self.started, self.begun, self.dashboard = asyncio.Event(), False, False

    async def begin(self, node: Any) -> None:
        self.begun = True
        self.ends = time.monotonic() + self.lives
        if self.starts:
            self.started.set()

    async def exited(self) -> int:
        await asyncio.sleep(max(0.0, self.ends - time.monotonic()))
        return 1

    async def own_words(self, temp: Path) -> str:
        return "port in use"

    def start_dashboard(self) -> None:
        self.dashboard = True


class FakeLink:
    """Gives these orders; then it is lost (`error`), or silent."""

    ahead = None

    def __init__(self, *orders: str, error: Exception | None = None) -> None:
        self.left, self.error = list(orders), error
        self.told: list[NodeInfo] = []
        self.closed = False

    async def orders(self) -> str:
        if self.left:
            return self.left.pop(0)
        if self.error is not None:
            raise self.error
        await asyncio.Event().wait()
        raise AssertionError

    def report(self, info: NodeInfo) -> None:
        self.told.append(info)

    def close(self) -> None:
        self.closed = True


def made(link: FakeLink, here: NodeIdentity = HERE) -> Any:
    setup = NodeSetup(
        "token", TempDir("/nowhere", "/c", None), "10.0.0.2", Resources(8, 1, 1, ()),
        PortLease(Ports(10240), None),  # type: ignore[arg-type]
    )  # fmt: skip
    found: Any = Agent(here, records.Cluster("c", "slurm", 1, "c", 0.0, 1, 2, workers_per_node=1), Config(), setup)
    found.link = link
    found.may_join.set()
    found.keeper._fresh_ground = lambda same_ports: None
    found.temp = type("Temp", (), {"path": Path("/nowhere"), "is_whole": lambda self: True})()
    return found


def live(
    monkeypatch: pytest.MonkeyPatch, scenario: Callable[[list[Any]], Awaitable[None]], ended: list[int] | None = None
) -> None:
    """`scenario` gets the list of the Rays that are started one after the other; `ended`: who was spared each time when
    our processes were ended."""

    def end_tree(*_: Any, spare: int = 0, **__: Any) -> int:
        if ended is not None:
            ended.append(spare)
        return 0

    async def main() -> None:
        rays: list[Any] = []

        async def prepare(*_: Any) -> Any:
            return rays.pop(0)

        monkeypatch.setattr(agent.RayProcess, "prepare", prepare)
        monkeypatch.setattr(agent.processes, "end_tree", end_tree)
        await scenario(rays)

    virtual.run(monkeypatch, main)


def states(link: FakeLink) -> list[str]:
    return [told.state for told in link.told]


def test_ray_that_ends_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(rays: list[Any]) -> None:
        link = FakeLink()
        rays += [second := Ray()]
        keeping = asyncio.create_task(made(link).keeper.keep(Ray(lives=10.0), HEAD))
        await asyncio.sleep(30.0)
        assert states(link) == ["ready", "restarting", "restarting", "ready"]
        assert link.told[1].error == "port in use" and not second.dashboard
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    live(monkeypatch, scenario)


def test_ray_that_never_starts_is_the_node_s_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(rays: list[Any]) -> None:
        rays += [Ray(starts=False, lives=1.0) for _ in range(ray_keeper.RAY_TRIES)]
        with pytest.raises(BringUpError, match=r"Ray on n2 ended \(exit code 1\): port in use"):
            await made(FakeLink()).keeper.keep(rays.pop(0), HEAD)
        assert not rays

    live(monkeypatch, scenario)


def test_a_head_whose_ray_ends_resigns(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(rays: list[Any]) -> None:
        head = made(FakeLink())
        head.duties = type("Duties", (), {"enough": asyncio.Event()})()
        ray = Ray(lives=100.0)
        await head.keeper.keep(ray, replace(HEAD, node="n2"))
        assert head.again and "the head's Ray ended" in head.reason
        assert ray.dashboard  # without the minimum of nodes, after a while all the same

    live(monkeypatch, scenario)


def test_ray_waits_for_the_head_s_order(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(rays: list[Any]) -> None:
        node, ray = made(FakeLink()), Ray()
        node.may_join.clear()
        keeping = asyncio.create_task(node.keeper.keep(ray, HEAD))
        await asyncio.sleep(100.0)
        assert not ray.begun
        node.may_join.set()
        await asyncio.sleep(0.1)
        assert ray.begun
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    live(monkeypatch, scenario)


async def serve(node: Any, found: Any) -> Head | None:
    """Follow HEAD until that is over; `found`: what the search for another one brings."""

    async def seek(lost: Head, gone: bool) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    node._seek = seek
    keeping: asyncio.Task[None] = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
    try:
        return await node._serve(HEAD, keeping)
    finally:
        keeping.cancel()


def test_the_head_s_order_ends_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        node = made(FakeLink("join", "end"))
        node.may_join.clear()
        assert await serve(node, None) is None
        assert node.may_join.is_set() and node.end.is_set() and not node.orphaned

    virtual.run(monkeypatch, main)


def test_a_newer_head_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        first, second = FakeLink(error=Closed("gone")), FakeLink("end")
        node = made(first)
        assert await serve(node, (second, NEWER)) == NEWER
        assert first.closed and node.link is second and not node.end.is_set()

    virtual.run(monkeypatch, main)


def test_the_same_head_after_a_hiccup_is_told_how_the_node_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        again = FakeLink("end")
        node = made(FakeLink(error=ConnectionError("silent")))
        node.state = "ready"
        assert await serve(node, (again, HEAD)) is None
        assert states(again) == ["ready"]

    virtual.run(monkeypatch, main)


def test_a_head_that_finds_a_newer_one_resigns(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        node = made(FakeLink(error=Closed("gone")))
        node.duties = type("Duties", (), {"head": HEAD})()
        assert await serve(node, (FakeLink(), NEWER)) is None
        assert node.again and "incarnation 2" in node.reason

    virtual.run(monkeypatch, main)


def test_no_head_at_all_orphans_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        node = made(FakeLink(error=Closed("gone")))
        assert await serve(node, BringUpError("no other was elected")) is None
        assert node.orphaned and node.reason == "no other was elected"

    virtual.run(monkeypatch, main)


def test_a_node_whose_job_ends_looks_for_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        node = made(FakeLink(error=Closed("gone")))
        node.terminated.set()
        assert await serve(node, AssertionError()) is None
        assert node.reason == "signal SIGTERM" and not node.orphaned

    virtual.run(monkeypatch, main)


def test_under_a_newer_head_ray_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next Ray imports while the old one ends, and waits for the newer head's order."""
    ended: list[int] = []

    async def scenario(rays: list[Any]) -> None:
        first, second = Ray(), Ray()
        second.pid = 4712
        rays += [first, second]
        kept: list[tuple[Any, Head, bool]] = []
        node, link, heads = made(FakeLink()), FakeLink(), [NEWER, None]

        async def first_head() -> Any:
            return link, HEAD

        async def serve_(head: Head, keeping: Any) -> Head | None:
            await asyncio.sleep(1.0)
            return heads.pop(0)

        async def keep(ray: Any, head: Head) -> None:
            kept.append((ray, head, node.may_join.is_set()))
            await asyncio.Event().wait()

        async def nothing(*_: Any) -> None: ...

        node._first_head, node._serve, node.keeper.keep, node.members.serve = first_head, serve_, keep, nothing
        node.temp.claim = lambda: None
        await node.run()
        assert kept == [(first, HEAD, True), (second, NEWER, False)] and states(link) == ["starting"]

    monkeypatch.setattr(agent.sample, "start", lambda *_: None)
    live(monkeypatch, scenario, ended)
    assert ended == [4712]


# -- a storage that hiccups while a node begins -------------------------------------------------------


def storage_error(number: int, kind: type[RaylaunchError] = StateError) -> RaylaunchError:
    """As `files` and `loader` tell of it."""
    error = kind("cannot read that")
    error.__cause__ = OSError(number, "from the storage")
    return error


def hiccup(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, *errors: Exception, after: bool = False) -> None:
    """The first calls raise these. `after`: only when their work is done."""
    work, left = getattr(place, name), list(errors)

    def failing(*arguments: Any) -> Any:
        if left and not after:
            raise left.pop(0)
        answer = work(*arguments)
        if left:
            raise left.pop(0)
        return answer

    monkeypatch.setattr(place, name, failing)


class Duties:
    """Leads, after it failed with these."""

    failures: list[Exception] = []  # noqa: RUF012
    begun: list[tuple[int, str]] = []  # noqa: RUF012

    def __init__(self, directory: Path, cluster: Any, config: Any, head: Head, *_: Any, **__: Any) -> None:
        self.head = head

    async def open(self, why: str) -> None:
        self.begun.append((self.head.incarnation, why))
        if self.failures:
            raise self.failures.pop(0)


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The first node of a requeued job: a head.json of the allocation before it is there."""
    assert records.claim(tmp_path, 1, "n1", "7:0")
    HEAD.write(tmp_path / records.HEAD_FILE)
    node = made(FakeLink(), replace(HERE, directory=tmp_path, node="n1", index=0, allocation="7:1"))

    async def connect(head: Head) -> Any:
        return node.link

    node._connect = connect
    monkeypatch.setattr(agent, "HeadController", Duties)
    monkeypatch.setattr(Duties, "failures", [])
    monkeypatch.setattr(Duties, "begun", [])
    return node


def test_a_storage_that_hiccups_ends_no_cluster_that_begins(monkeypatch: pytest.MonkeyPatch, first: Any) -> None:
    """Neither reading, nor the claim, nor what a head writes as it begins."""
    stale = OSError(errno.ESTALE, "stale file handle")
    hiccup(monkeypatch, Head, "read", storage_error(errno.EIO), StateError("half a file"))
    hiccup(monkeypatch, records, "began", stale)
    hiccup(monkeypatch, records, "claims", stale)
    hiccup(monkeypatch, records, "claim", storage_error(errno.EIO))
    Duties.failures += [storage_error(errno.EIO), stale]
    _, head = virtual.run(monkeypatch, first._first_head)
    assert (head.incarnation, head.allocation) == (2, "7:1") and Duties.begun == [(2, "")] * 3


def test_a_claim_that_was_made_though_it_failed_is_ours(monkeypatch: pytest.MonkeyPatch, first: Any) -> None:
    hiccup(monkeypatch, records, "claim", OSError(errno.EIO, "the answer got lost"), after=True)
    _, head = virtual.run(monkeypatch, first._first_head)
    assert head.incarnation == 2 and records.claims(first.here.directory) == [1, 2]


def test_another_s_claim_is_not(first: Any) -> None:
    directory = first.here.directory
    assert records.claim(directory, 2, "n1", "7:2") and records.claim(directory, 3, "n9", "7:1")
    assert [cluster_files.claim(first.here, number) for number in (1, 2, 3, 4)] == [False, False, False, True]


def test_a_first_head_that_is_fenced_is_told_at_once(monkeypatch: pytest.MonkeyPatch, first: Any) -> None:
    """What it would write again is the newer one's by now."""
    Duties.failures += [Replaced()]
    with pytest.raises(Replaced):
        virtual.run(monkeypatch, first._first_head)
    assert Duties.begun == [(2, "")] and first.again


@pytest.mark.parametrize("error", [storage_error(errno.EIO), TypeError("a mistake of ours")])
def test_an_elected_head_that_cannot_begin_resigns_at_once(
    monkeypatch: pytest.MonkeyPatch, first: Any, error: Exception
) -> None:
    Duties.failures += [error]
    with pytest.raises(type(error)):
        virtual.run(monkeypatch, lambda: first._lead(2, "elected"))
    assert Duties.begun == [(2, "elected")] and first.again


@pytest.mark.parametrize("error", [Replaced(), storage_error(errno.EIO), TypeError("a mistake of ours")])
def test_a_node_that_could_not_lead_begins_again_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, first: Any, error: Exception
) -> None:
    """It resigned as it raised that. A failure would be a strike, and the end of the run for its followers."""
    files.make_dir(first.here.directory / records.LOGS)

    async def nothing(*_: Any) -> Any: ...

    async def replaced() -> None:
        first.resign("this node cannot lead")
        raise error

    first.run, first.until_gpus_fail, first.close = replaced, asyncio.Event().wait, nothing
    for name in ("check_canary", "retry_storage"):
        monkeypatch.setattr(entry, name, nothing)
    for name in ("_log_to", "_handle_signals"):
        monkeypatch.setattr(entry, name, lambda _: None)
    monkeypatch.setattr(entry.thread_deaths, "record", lambda *_, **__: None)
    monkeypatch.setattr(NodeSetup, "prepare", lambda *_: None)
    monkeypatch.setattr(entry, "Agent", lambda *_: first)
    monkeypatch.setattr(entry, "_report", None)  # what tells a failure
    with contextlib.ExitStack() as at_end:
        assert asyncio.run(entry.supervise(first.here, at_end)) == agent.AGAIN
    (told,) = event_log.read(first.here.directory, "could_not_lead")
    assert told["node"] == "n1" and told["error"].startswith(type(error).__name__)


def test_a_look_for_the_head_that_fails_saw_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    HEAD.write(tmp_path / records.HEAD_FILE)
    hiccup(monkeypatch, Head, "read", storage_error(errno.ESTALE), OSError(errno.EIO, "input/output error"))
    assert virtual.run(monkeypatch, lambda: cluster_files.wait_for_head(replace(HERE, directory=tmp_path))) == HEAD


@pytest.mark.parametrize(
    ("number", "limit"), [(errno.EIO, cluster_files.HEAD_PATIENCE), (errno.EACCES, 0.0), (errno.ENOTDIR, 0.0)]
)
def test_when_looking_for_the_head_fails_for_good(monkeypatch: pytest.MonkeyPatch, number: int, limit: float) -> None:
    """A wrong setup is told at once."""

    async def main() -> float:
        began = time.monotonic()
        with pytest.raises(StateError, match="cannot read"):
            await cluster_files.wait_for_head(HERE)
        return time.monotonic() - began

    hiccup(monkeypatch, Head, "read", *[storage_error(number)] * 10000)
    assert limit <= virtual.run(monkeypatch, main) < limit + 1.0


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (storage_error(errno.EIO), 4),  # for READ_LIMIT
        (storage_error(errno.EIO, ConfigError), 4),
        (OSError(errno.ETIMEDOUT, "time-out"), 4),
        (storage_error(errno.EACCES), 1),
        (storage_error(errno.ENOENT, BringUpError), 1),  # the token is gone
        (PermissionError(errno.EPERM, "no hard links here"), 1),
        (ConfigError("config.yaml:3: no such key"), 1),
    ],
)
def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception, tries: int) -> None:
    monkeypatch.setattr(retry, "READ_LIMIT", 3 * retry.AGAIN_PAUSE)
    made_tries: list[int] = []

    async def work() -> None:
        made_tries.append(1)
        raise error

    with pytest.raises(type(error)):
        virtual.run(monkeypatch, lambda: retry.retry_storage(work))
    assert len(made_tries) == tries
