"""The small decisions of an agent: whose head counts, who ends what when no head is left. No process is started."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raylaunch.cluster.agent import agent, entry, orphan, retry
from raylaunch.cluster.agent.agent import Agent
from raylaunch.cluster.agent.identity import NodeIdentity
from raylaunch.cluster.agent.node_setup import NodeSetup
from raylaunch.config.schema import Config
from raylaunch.errors import BringUpError, SlurmError, StateError
from raylaunch.host.ports import PortLease, Ports
from raylaunch.host.resources import Resources
from raylaunch.host.temp_dir import TempDir
from raylaunch.scheduler.slurm.client import SlurmUnavailable
from raylaunch.scheduler.slurm.rows import JobState
from raylaunch.state import files, records
from raylaunch.state.records import Head

HERE = NodeIdentity(Path("/nowhere"), "c1", "n2", 1, ("n1", "n2", "n3"), local=False, job="7", allocation="7:0")
HEAD = Head(canary="c1", incarnation=3, node="n1", hostname="n1", address="10.0.0.1", control_port=1, gcs="",
            dashboard_port=1, time=0.0, allocation="7:0")  # fmt: skip


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "AGAIN_PAUSE", 0.0)


@pytest.mark.parametrize(
    ("here", "head", "over"),
    [
        (HERE, HEAD, False),
        (HERE, replace(HEAD, canary="c0"), True),  # of another life of the cluster
        (HERE, replace(HEAD, allocation="7:1"), True),  # the job was requeued
        (replace(HERE, joiner=True, job="8", allocation="8:0"), HEAD, False),  # a joiner follows the base job's
        (replace(HERE, joiner=True), replace(HEAD, canary="c0"), True),
    ],
)
def test_whose_head_is_over(here: NodeIdentity, head: Head, over: bool) -> None:
    assert here.is_over(head) is over


def test_who_begins_a_life_as_its_head() -> None:
    first = replace(HERE, index=0)
    assert first.is_first and not HERE.is_first and not replace(first, joiner=True).is_first


def test_where_an_agent_is() -> None:
    common = {"RAYLAUNCH_CLUSTER_DIR": "/c", "RAYLAUNCH_CANARY": "c1"}
    base = {**common, "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NODEID": "1", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n2"}
    assert NodeIdentity.from_environment(base) == replace(HERE, directory=Path("/c"))
    requeued = NodeIdentity.from_environment({**base, "SLURM_RESTART_COUNT": "2", "RAYLAUNCH_JOINER": "1"})
    assert requeued.allocation == "7:2" and requeued.joiner
    local = NodeIdentity.from_environment({**common, "RAYLAUNCH_LOCAL_INDEX": "2", "RAYLAUNCH_LOCAL_COUNT": "2"})
    assert (local.node, local.peers, local.joiner, local.local) == ("local3", ("local1", "local2"), True, True)


class FakeSlurm:
    """Answers or fails as told, one after the other; remembers what was cancelled."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.cancelled = list(answers), list[str]()

    def __call__(self) -> FakeSlurm:
        return self

    def _next(self) -> Any:
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self, jobs: Sequence[str]) -> None:
        self._next()
        self.cancelled += jobs

    def jobs(self, jobs: Sequence[str]) -> Any:
        return self._next()


class Job:
    def __init__(self, *nodes: str) -> None:
        self.nodes = nodes


@pytest.mark.parametrize(
    ("here", "answer", "missing"),
    [
        (HERE, {"7": Job("n2", "n3")}, {"n1"}),
        (HERE, {"7": Job("n1", "n2", "n3")}, set()),
        (HERE, {"7": Job()}, set()),  # it does not run (again)
        (HERE, {}, set()),
        (HERE, SlurmUnavailable("no answer"), set()),
        (replace(HERE, joiner=True), {"7": Job("n2")}, set()),
        (replace(HERE, local=True), {"7": Job("n2")}, set()),
    ],
)
def test_which_nodes_slurm_has_taken_out(
    monkeypatch: pytest.MonkeyPatch, here: NodeIdentity, answer: Any, missing: set[str]
) -> None:
    monkeypatch.setattr(agent, "Slurm", FakeSlurm(answer))
    made = Agent.__new__(Agent)
    made.here = here
    assert made._missing() == missing


# -- the end of a job whose head is dead ------------------------------------------------------------


def give_back(monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm, read: Callable[[Path], Any], index: int = 0) -> None:
    async def main() -> None:
        terminated = asyncio.Event()
        async with asyncio.timeout(60):
            await orphan.give_back_orphaned(replace(HERE, index=index), terminated, {"SLURM_JOB_ID": "7"})

    monkeypatch.setattr(orphan, "Slurm", slurm)
    monkeypatch.setattr(files, "read_json", read)
    asyncio.run(main())


def failing(*answers: Any) -> Callable[[Path], Any]:
    """One answer after the other, the last one for ever."""
    left = list(answers)

    def read(path: Path) -> Any:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return read


HICCUP = StateError("cannot read members.json: stale file handle")
LOST = {"nodes": [{"name": "n2", "state": "lost"}]}
READY = {"nodes": [{"name": "n2", "state": "ready"}]}


@pytest.mark.parametrize("table", [READY, None, {"nodes": []}, {"nodes": [{}]}, {}, [1]])
def test_an_orphaned_job_is_cancelled(monkeypatch: pytest.MonkeyPatch, table: Any) -> None:
    """Whatever members.json looks like."""
    slurm = FakeSlurm()
    give_back(monkeypatch, slurm, failing(table))
    assert slurm.cancelled == ["7"]


def test_a_node_that_was_cut_off_cancels_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head, which outlived it, wrote that down: one hiccup of the storage does not hide it."""
    slurm = FakeSlurm()
    give_back(monkeypatch, slurm, failing(HICCUP, HICCUP, LOST))
    assert slurm.cancelled == []


def test_storage_that_does_not_answer_keeps_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphan, "READ_LIMIT", 0.0)
    slurm = FakeSlurm()
    give_back(monkeypatch, slurm, failing(HICCUP))
    assert slurm.cancelled == ["7"]


def test_slurm_that_is_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = FakeSlurm(SlurmUnavailable("time-out"), SlurmError("busy"))
    give_back(monkeypatch, slurm, failing(READY))
    assert slurm.cancelled == ["7"] and not slurm.answers


def test_a_job_that_is_told_to_end_is_not_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = FakeSlurm()

    async def main() -> None:
        terminated = asyncio.Event()
        terminated.set()
        await orphan.give_back_orphaned(replace(HERE, index=9), terminated, {"SLURM_JOB_ID": "7"})

    monkeypatch.setattr(orphan, "Slurm", slurm)
    monkeypatch.setattr(files, "read_json", failing(READY))
    asyncio.run(main())
    assert slurm.cancelled == []


# -- the word of a node that cannot go on -------------------------------------------------------------


def report(here: NodeIdentity, made: Agent | None) -> None:
    asyncio.run(entry._report(here, made, BringUpError("no ports", "Use another node.")))


def test_a_first_node_that_fails_ends_the_life(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / records.NODES).mkdir()
    report(replace(HERE, directory=tmp_path, index=0), None)
    assert capsys.readouterr().out == f"{records.FAILED_LINE} n2: no ports. Use another node.\n"
    assert files.read_json(tmp_path / records.NODES / "n2.json")["error"] == "no ports. Use another node."
    assert files.read_json(tmp_path / records.ENDED_FILE)["reason"] == "no ports. Use another node."


@pytest.mark.parametrize("reigning", [None, HEAD])
def test_another_node_does_not(tmp_path: Path, reigning: Head | None) -> None:
    (tmp_path / records.NODES).mkdir()
    if reigning is not None:  # the first node led, and another one does
        reigning.write(tmp_path / records.HEAD_FILE)
    report(replace(HERE, directory=tmp_path, index=0 if reigning else 1), None)
    assert not (tmp_path / records.ENDED_FILE).exists()


@pytest.mark.parametrize(
    ("now", "over"), [(JobState.RUNNING, False), (JobState.PENDING, False), (JobState.COMPLETING, True), (None, True)]
)
def test_a_first_node_that_fails_ends_no_other_allocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: JobState | None, over: bool
) -> None:
    """Slurm may run two of one cluster for a while: only where the one that leads is over, the cluster is."""
    rows = {} if now is None else {"8": type("Row", (), {"state": now})}
    monkeypatch.setattr(entry, "Slurm", lambda: type("Fake", (), {"jobs": lambda self, ids: rows})())
    (tmp_path / records.NODES).mkdir()
    replace(HEAD, allocation="8:0").write(tmp_path / records.HEAD_FILE)
    report(replace(HERE, directory=tmp_path, index=0), None)
    assert (tmp_path / records.ENDED_FILE).exists() == over


def test_one_hiccup_does_not_hide_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / records.NODES).mkdir()
    write, errors = files.write_json, [OSError(errno.EIO, "input/output error"), HICCUP]

    def write_json(path: Path, value: Any) -> None:
        if errors and path.name == records.ENDED_FILE:
            raise errors.pop()
        write(path, value)

    monkeypatch.setattr(files, "write_json", write_json)
    made = Agent.__new__(Agent)
    made.duties, made.link, made.end = None, None, asyncio.Event()
    report(replace(HERE, directory=tmp_path, index=0), made)
    assert files.read_json(tmp_path / records.ENDED_FILE)["reason"].startswith("no ports")
    assert made.reason.startswith("no ports") and made.end.is_set()


def test_a_directory_that_is_not_there_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(replace(HERE, directory=tmp_path / "not shared", index=0), None)
    assert capsys.readouterr().out.startswith(records.FAILED_LINE)


def test_an_agent_s_constructor_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it needs of its node is found before (`NodeSetup.prepare`), in a thread."""
    setup = NodeSetup(
        "token", TempDir("/nowhere", "/c", None), "10.0.0.2", Resources(8, 1, 1, ()),
        PortLease(Ports(10240), None),  # type: ignore[arg-type]
    )  # fmt: skip
    cluster = records.Cluster("c", "slurm", 1, "c1", 0.0, 1, 3, workers_per_node=2)
    made = Agent(HERE, cluster, Config(), setup)
    info = made.info()
    assert (info.state, info.ports, made.workers_cpus) == ("starting", (10240, 10751), 4)
    made.resign("fenced")
    made.stop("another reason")
    assert made.again and made.reason == "fenced" and made.end.is_set()
