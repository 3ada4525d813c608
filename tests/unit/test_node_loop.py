"""The node loop on a fake Slurm: what it asks, what it does, what it says, and who submits."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raylaunch.cluster.node_loop import node_loop, scheduler_view, submitter
from raylaunch.cluster.node_loop.node_loop import LoopResult, NodeLoop
from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.host import locks
from raylaunch.scheduler.backends import SlurmBackend
from raylaunch.scheduler.slurm import allocation
from raylaunch.scheduler.slurm.client import Completed, Slurm
from raylaunch.scheduler.slurm.parse import SEPARATOR
from raylaunch.state import files, records
from raylaunch.state.members import MemberRow
from raylaunch.state.node_events import JoinerRefused, NodeExcluded
from raylaunch.state.records import Cluster


class FakeSlurm:
    """Jobs and nodes by hand; sbatch and scancel are remembered."""

    def __init__(self) -> None:
        self.jobs: dict[str, list[str]] = {}
        self.nodes = {f"n{i}": "allocated" for i in (1, 2)} | {"n3": "idle", "n4": "idle"}
        self.refusal = ""
        self.missing = self.silent = False
        self.scripts: list[str] = []
        self.commands: list[list[str]] = []

    def add(self, job: str, condition: str, nodes: str, name: str = "raylaunch-main", comment: str = "") -> None:
        fields = [job, condition, "main", "me", "1", nodes, "N/A", "1:00:00", "", comment or "(null)", "None", name]
        self.jobs[job] = fields

    def __call__(self, command: Sequence[str], timeout: float, stdin: str | None, env: Mapping[str, str]) -> Completed:
        self.commands.append(list(command))
        if self.silent:
            raise subprocess.TimeoutExpired(list(command), timeout)
        match command[0]:
            case "squeue":
                return Completed(0, "".join(SEPARATOR.join(job) + "\n" for job in self.jobs.values()))
            case "sinfo":
                rows = (SEPARATOR.join([n, "main*", "up", s, "none"]) for n, s in self.nodes.items())
                return Completed(0, "\n".join(rows) + "\n")
            case "sbatch" if self.missing:
                raise FileNotFoundError(2, "No such file or directory")
            case "sbatch" if self.refusal and "--version" not in command:
                return Completed(1, "", f"sbatch: error: {self.refusal}\n")
            case "sbatch" if stdin is not None and "--test-only" not in command:
                self.scripts.append(stdin)
                job = str(100 + len(self.scripts))
                comment = next(line for line in stdin.splitlines() if "--comment" in line).split('"')[1]
                self.add(job, "PENDING", "", "raylaunch-main-join", comment)
                self.jobs[job][8] = next((line.split("=")[1] for line in stdin.splitlines() if "--exclude" in line), "")
                return Completed(0, job + "\n")
        return Completed(0)


class Place:
    """A cluster of two nodes, n1 (the head) and n2, with a loop."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.slurm, self.now = directory, FakeSlurm(), 1000.0
        self.config = Config.model_validate({"slurm": {"nodes": "2"}, "elastic": {"max_nodes": 4}})
        for part in (records.NODES, records.REQUESTS, records.LOGS):
            (directory / part).mkdir(parents=True)
        self.cluster = Cluster("main", "slurm", 1, "ab12", 0.0, 2, 2, 1, jobs=("7",))
        self.cluster.write(directory / records.CLUSTER_FILE)
        files.write_text(directory / records.CONFIG_FILE, loader.dump(self.config))
        files.write_text(directory / records.SCRIPT_FILE, "#!/bin/bash\n")
        self.slurm.add("7", "RUNNING", "n[1-2]")
        self.rows = [self.row("n1", role="head"), self.row("n2")]
        self.loop = self.new_loop()

    def new_loop(self, watcher: bool = False) -> NodeLoop:
        return NodeLoop(self.directory, self.config, SlurmBackend(Slurm(self.slurm)), watcher, lambda: self.now)

    def row(self, name: str, condition: str = "ready", job: str = "7", role: str = "worker") -> dict[str, Any]:
        return {"name": name, "state": condition, "job": job, "since": 1.0, "role": role}

    def lose(self, name: str) -> None:
        self.now += 100.0
        self.rows = [{**r, "state": "lost"} if r["name"] == name else r for r in self.rows]

    def turn(self, loop: NodeLoop | None = None, strikes: dict[str, int] | None = None, wanted: int = 2) -> LoopResult:
        self.now += 2.0
        return (loop or self.loop).turn([MemberRow(**row) for row in self.rows], wanted, strikes or {})

    def jobs(self) -> tuple[str, ...]:
        found = Cluster.read(self.directory)
        assert found is not None
        return found.jobs


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "main")


def kinds(turn: LoopResult) -> list[str]:
    return [str(event.values().get("decision", event.kind)) for event in turn.events]


def test_two_questions_a_turn_and_silence_when_nothing_changes(place: Place) -> None:
    assert kinds(place.turn()) == ["hold"] and place.turn().events == []
    assert [c[0] for c in place.slurm.commands] == ["squeue", "sinfo"] * 2
    assert place.turn().pause == node_loop.QUIET and place.turn().time_left == {"7": 3600}


def test_a_lost_node_costs_one_joiner(place: Place) -> None:
    place.lose("n2")
    turn = place.turn()
    assert kinds(turn) == ["join", "joiner_submitted"] and turn.pause == node_loop.BUSY
    assert place.jobs() == ("7", "101") and "--exclude=n1\n" in place.slurm.scripts[0]
    assert "#SBATCH --job-name=raylaunch-main-join\n" in place.slurm.scripts[0]
    assert kinds(place.turn()) == ["hold"] and place.turn().events == [] and len(place.slurm.scripts) == 1
    place.slurm.jobs["101"][1:6] = ["RUNNING", "main", "me", "1", "n3"]
    place.rows.append(place.row("n3", job="101"))
    assert place.turn().job_nodes == {"7": ("n1", "n2"), "101": ("n3",)} and len(place.slurm.scripts) == 1


def test_a_node_that_comes_back_by_itself_costs_none(place: Place) -> None:
    place.turn()
    place.rows[1]["state"] = "lost"
    assert [k for _ in range(2) for k in kinds(place.turn())] == ["hold"]
    place.rows[1]["state"] = "ready"
    assert all(k == "hold" for _ in range(3) for k in kinds(place.turn())) and place.slurm.scripts == []


def test_nothing_is_submitted_twice_by_two_loops(place: Place) -> None:
    place.lose("n2")
    raced = place.slurm.__call__

    def other_first(command: Sequence[str], timeout: float, stdin: str | None, env: Mapping[str, str]) -> Completed:
        done = raced(command, timeout, stdin, env)
        if command[0] == "sinfo":  # between this loop's facts and its deed
            replace(place.cluster, jobs=("7", "99")).write(place.directory / records.CLUSTER_FILE)
        return done

    loop = NodeLoop(place.directory, place.config, SlurmBackend(Slurm(other_first)), False, lambda: place.now)
    assert kinds(place.turn(loop)) == ["join"] and place.slurm.scripts == []


def test_a_joiner_whose_submitter_was_killed_is_found(place: Place) -> None:
    place.lose("n2")
    place.slurm.add("55", "PENDING", "", "raylaunch-main-join", "raylaunch cluster=main life=ab12 nodes=1")
    place.slurm.add("56", "PENDING", "", "raylaunch-main-join", "raylaunch cluster=main life=OLD nodes=1")
    assert "joiner_adopted" in kinds(place.turn()) and place.jobs() == ("7", "55") and place.slurm.scripts == []
    assert scheduler_view.unrecorded(SlurmBackend(Slurm(place.slurm)), place.cluster, place.config) == ("55",)


def test_where_nodes_may_not_submit_it_is_said_once_and_a_watcher_does_it(place: Place) -> None:
    place.lose("n2")
    place.slurm.refusal = "Access denied: submit from a login node"
    watcher = place.new_loop(watcher=True)
    assert isinstance(place.turn(watcher).events[-1], JoinerRefused)  # of its own accord nobody lives there
    first = place.turn()
    assert kinds(first) == ["join", "joiner_refused"] and "raylaunch watch" in first.events[-1].values()["hint"]
    assert "Access denied" in submitter.head_refusal(place.directory, place.cluster)
    assert [k for _ in range(5) for k in kinds(place.turn())] == ["hold"]
    place.slurm.refusal = ""
    assert "joiner_submitted" in kinds(place.turn(place.new_loop(watcher=True)))


def test_a_watcher_leaves_submitting_to_a_head_that_can(place: Place) -> None:
    place.lose("n2")
    records.Head("ab12", 1, "n1", "n1", "1.2.3.4", 1, "1.2.3.4:2", 3, 0.0).write(place.directory / records.HEAD_FILE)
    watcher = place.new_loop(watcher=True)
    turn = place.turn(watcher)
    assert kinds(turn) == ["hold"] and "the head submits itself" in turn.events[0].values()["reason"]
    place.slurm.jobs["7"][5] = "n2"  # Slurm says that its node is gone
    assert "joiner_submitted" in kinds(place.turn(watcher))


def test_no_sbatch_at_all(place: Place) -> None:
    backend = SlurmBackend(Slurm(place.slurm))
    assert submitter.may_submit(backend, place.directory, place.cluster, place.config) == ""
    place.slurm.refusal = "nope"
    assert "nope" in submitter.may_submit(backend, place.directory, place.cluster, place.config)
    place.slurm.missing = True
    why = submitter.may_submit(backend, place.directory, place.cluster, place.config)
    assert why == "sbatch is not installed here"
    assert [event.kind for event in place.loop.cannot_submit(place.cluster, why)] == ["joiner_refused"]
    assert submitter.head_refusal(place.directory, place.cluster) == why
    place.lose("n2")
    assert kinds(place.turn()) == ["hold"]


def test_no_further_node_is_no_refusal(place: Place) -> None:
    place.lose("n2")
    place.slurm.refusal = "Batch job submission failed: Requested node configuration is not available"
    assert kinds(place.turn()) == ["join"] and submitter.head_refusal(place.directory, place.cluster) == ""
    assert [k for _ in range(20) for k in kinds(place.turn())] == ["hold"]
    place.slurm.refusal = ""
    assert "joiner_submitted" in [k for _ in range(6) for k in kinds(place.turn())]


def test_a_silent_slurm_is_asked_less_and_less(place: Place) -> None:
    place.lose("n2")
    place.slurm.silent = True
    turns = [place.turn() for _ in range(8)]
    assert [t.pause for t in turns] == [2, 4, 8, 16, 32, 60, 60, 60]
    assert [k for t in turns for k in kinds(t)] == ["hold"]
    place.slurm.silent = False
    assert "joiner_submitted" in kinds(place.turn())


def test_joiners_that_fail_come_slower_and_their_nodes_get_strikes(place: Place) -> None:
    place.lose("n2")
    place.turn()
    for number in (1, 2):
        place.slurm.jobs[f"10{number}"][1] = "FAILED"
        waited = 0
        while "joiner_submitted" not in kinds(place.turn()):
            waited += 1
        assert waited == 5 * number - 1
    files.write_json(place.directory / records.NODES / "n3.json", {"node": "n3", "error": "bad disk"})
    assert place.turn().strikes == [("n3", "could not start: bad disk")] and place.turn().strikes == []
    assert place.turn(place.new_loop()).strikes == []  # another head does not count it again
    turn = place.turn(strikes={"n3": 3})
    assert turn.exclude == ["n3"] and NodeExcluded("n3") in turn.events
    assert any(c[:2] == ["scontrol", "update"] and c[-1] == "ExcNodeList=n[1,3]" for c in place.slurm.commands)


def test_a_joiner_that_was_let_go_is_no_failure(place: Place) -> None:
    place.slurm.add("9", "RUNNING", "n3", "raylaunch-main-join", "raylaunch cluster=main life=ab12 nodes=1")
    place.rows.append(place.row("n3", job="9"))
    place.turn(wanted=3)
    assert place.turn().release_nodes == ["n3"]
    place.rows[-1]["state"] = "ended"
    del place.slurm.jobs["9"]
    place.turn()
    assert "joiner_submitted" in kinds(place.turn(wanted=3))


def test_scaled_down_and_drained(place: Place) -> None:
    place.lose("n2")
    place.turn()
    place.rows = [place.row("n1", role="head"), place.row("n2"), place.row("n3", job="9")]
    turn = place.turn(wanted=1)
    assert turn.release_nodes == ["n3", "n2"] or set(turn.release_nodes) == {"n2", "n3"}
    assert ["scancel", "101"] in place.slurm.commands
    place.slurm.nodes["n2"] = "draining"
    place.rows = place.rows[:2]
    assert place.turn().drain == [("n2", "Slurm drains n2")]


def test_a_successor_when_the_allocation_was_taken(place: Place) -> None:
    place.slurm.jobs["7"][1] = "PREEMPTED"
    place.lose("n1")
    place.lose("n2")
    watcher = place.new_loop(watcher=True)
    files.write_text(
        place.directory / records.SCRIPT_FILE, '#!/bin/bash\n#SBATCH --comment="raylaunch cluster=main life=ab12"\n'
    )
    assert kinds(place.turn(watcher)) == ["resume", "successor"] and place.jobs() == ("7", "101")
    place.slurm.jobs["7"][1] = "CANCELLED"
    del place.slurm.jobs["101"]
    assert "cancelled" in str(place.turn(place.new_loop(watcher=True)).give_up)


def test_a_requeued_job_brings_its_nodes_itself_and_is_started_at_once(place: Place) -> None:
    watcher = place.new_loop(watcher=True)
    place.slurm.jobs["7"][1:6] = ["PENDING", "main", "me", "1", ""]
    place.slurm.jobs["7"][10] = "BeginTime"
    assert kinds(place.turn(watcher)) == ["hold"]  # though nobody has written yet that its nodes are lost
    assert ["scontrol", "update", "jobid=7", "StartTime=now"] in place.slurm.commands
    place.slurm.jobs["7"][1:6] = ["RUNNING", "main", "me", "2", "n[3-4]"]
    assert all(k == "hold" for _ in range(5) for k in kinds(place.turn(watcher))) and place.slurm.scripts == []


def test_one_watcher(place: Place) -> None:
    assert not submitter.is_watched(place.directory)
    with submitter.watching(place.directory) as held:
        assert held and submitter.is_watched(place.directory)
        with submitter.watching(place.directory, patience=0) as second:
            assert not second
    assert not submitter.is_watched(place.directory)


def test_a_lock_that_a_frozen_watcher_holds_is_not_waited_for_without_end(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = count(0.0, 1.0)
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: None))
    place.lose("n2")
    with allocation.locked(place.directory) as first:
        assert first
        turn = place.turn()
    assert kinds(turn) == ["join", "lock_held", "joiner_submitted"] and place.jobs() == ("7", "101")
    assert turn.events[1].values()["lock"].endswith(".jobs.lock")


def test_no_lock_is_waited_for_without_a_limit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a limit"), locks.held(tmp_path / "lock", patience=float("inf")):
        pass


def test_nothing_is_submitted_once_the_end_has_begun(place: Place) -> None:
    """Though the turn had begun before, and has decided."""
    place.lose("n2")
    ask = place.slurm.__call__

    def then_ends(command: Sequence[str], timeout: float, stdin: str | None, env: Mapping[str, str]) -> Completed:
        if command[0] == "sinfo":
            loop.stop()
        return ask(command, timeout, stdin, env)

    loop = NodeLoop(place.directory, place.config, SlurmBackend(Slurm(then_ends)), False, lambda: place.now)
    assert kinds(place.turn(loop)) == ["join"] and place.slurm.scripts == []
