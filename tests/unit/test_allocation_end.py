"""What the head makes of the end of its allocation."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from datetime import datetime
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raylaunch.errors import SlurmError, SlurmUnavailable
from raylaunch.host import locks
from raylaunch.scheduler.slurm import allocation
from raylaunch.scheduler.slurm.allocation import Continuation, JobSnapshot, Word
from raylaunch.scheduler.slurm.rows import JobDetail, JobRow, JobState
from raylaunch.state import records
from raylaunch.state.records import Cluster


@pytest.mark.parametrize(
    ("look", "why"),
    [
        (JobSnapshot("RUNNING", 60.0), ""),
        (JobSnapshot("COMPLETING", None), ""),  # of a job that a person cancels
        (JobSnapshot("COMPLETING", None, preempted=True), "preempted"),
        (JobSnapshot("TIMEOUT", 0.0), "timeout"),
        (JobSnapshot("COMPLETING", None, reason="JobLaunchFailure"), "JobLaunchFailure"),
        (JobSnapshot("COMPLETING", None, reason="TimeLimit"), "TimeLimit"),
        (JobSnapshot("COMPLETING", None, reason="Dependency"), ""),
        (JobSnapshot("COMPLETING", None, again=True), "requeued"),  # preempted, or by a person's `scontrol requeue`
        (JobSnapshot("COMPLETING", None, again=False), ""),
        (JobSnapshot("COMPLETING", None, signal=1), "node_fail"),  # its batch host booted before it was found dead
        (JobSnapshot("RUNNING", 60.0, signal=1), ""),
        (JobSnapshot("COMPLETING", None, signal=15), ""),
        (JobSnapshot("COMPLETING", None, signal=9), ""),
    ],
)
def test_why_slurm_ends_a_job(look: JobSnapshot, why: str) -> None:
    assert look.taken == why


class FakeSlurm:
    """Its answers, one after the other: an exception is raised."""

    def __init__(self, **answers: Any) -> None:
        self._answers = {name: iter(answer) for name, answer in answers.items()}
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def answer(*_: object) -> Any:
            self.done.append(name)
            found = next(self._answers[name])
            if isinstance(found, Exception):
                raise found
            return found

        return answer


SILENT = SlurmUnavailable("slurmctld does not answer")


def asked(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> FakeSlurm:
    slurm = FakeSlurm(**answers)
    monkeypatch.setattr(allocation, "Slurm", lambda: slurm)
    monkeypatch.setattr(allocation, "AGAIN_AFTER", 0.0)
    return slurm


def row(state: str, reason: str = "") -> dict[str, JobRow]:
    return {"7": JobRow("7", JobState(state), "main", "me", 1, (), None, 60, reason, "x")}


def test_what_squeue_says_counts_where_scontrol_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, jobs=[row("COMPLETING", "JobLaunchFailure")], detail=[SILENT])
    assert allocation.snapshot("7") == JobSnapshot("COMPLETING", 60, reason="JobLaunchFailure")


def test_slurm_may_be_silent_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, jobs=[SILENT, row("COMPLETING")], detail=[JobDetail(False, 3, 0, None)])
    assert allocation.snapshot("7", restarts=2) == JobSnapshot("COMPLETING", 60, again=True)
    asked(monkeypatch, jobs=[SILENT, SILENT])
    assert allocation.snapshot("7") is None


OLD, NEW = "2026-11-30T10:00:00", "2026-11-30T12:00:00"


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        ([f"{NEW} DUE TO TIME LIMIT ***"], Word("time limit")),
        ([f"{NEW} DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***"], Word("node failure")),
        ([f"{NEW} DUE TO JOB REQUEUE ***"], Word("job requeue")),
        ([f"{NEW} ***"], Word(cancelled=True)),
        ([f"{NEW} ***", f"{NEW} DUE TO PREEMPTION ***"], Word("preemption")),  # of the grace, and of its end
        ([f"{OLD} DUE TO TIME LIMIT ***"], Word()),  # of the allocation before: the job was requeued
        ([f"{OLD} DUE TO PREEMPTION ***", f"{NEW} ***"], Word(cancelled=True)),
        (["yesterday DUE TO TIME LIMIT ***"], Word("time limit")),  # SLURM_TIME_FORMAT
        ([], Word()),
    ],
)
def test_slurmstepd_s_word(tmp_path: Path, lines: list[str], word: Word) -> None:
    output = tmp_path / records.LOGS / "slurm-7.out"
    output.parent.mkdir()
    output.write_text("".join(f"slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT {line}\n" for line in lines))
    since = datetime.fromisoformat("2026-11-30T11:00:00").timestamp()
    assert allocation.why_ended(tmp_path, "7", since, patience=0.0) == word


PENDING = SlurmError("`scontrol requeue 7` failed (exit 1)\n  Job is pending execution")


@pytest.mark.parametrize(
    ("answers", "done"),
    [
        ({"requeue": [None]}, ["requeued"]),
        ({"requeue": [SILENT, None]}, ["requeued"]),
        ({"requeue": [PENDING]}, ["requeued"]),  # Slurm was quicker
        ({"requeue": [SlurmError("no")], "jobs": [row("PENDING")]}, ["requeued"]),
        ({"requeue": [SlurmError("no")], "jobs": [row("RUNNING")], "submit": [SILENT, "8"]},
         ["requeued", "requeue_refused", "successor"]),
        ({"requeue": [SlurmError("no")], "jobs": [row("RUNNING")], "submit": [SILENT, SILENT]},
         ["requeued", "requeue_refused", "successor_refused"]),
    ],
)  # fmt: skip
def test_the_next_allocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], done: list[str]
) -> None:
    asked(monkeypatch, **answers)
    (tmp_path / records.SCRIPT_FILE).write_text("#!/bin/sh\n")
    assert [event.kind for event in allocation.go_on(tmp_path, "7", "walltime", Continuation.REQUEUE)] == done


def test_a_submission_that_may_have_been_taken_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = SlurmUnavailable("no answer within 10 s")
    late.__cause__ = subprocess.TimeoutExpired("sbatch", 10)
    slurm = asked(monkeypatch, submit=[late, "8"])
    (tmp_path / records.SCRIPT_FILE).write_text("#!/bin/sh\n")
    done = [event.kind for event in allocation.go_on(tmp_path, "7", "timeout", Continuation.SUCCESSOR)]
    assert done == ["successor_refused"] and slurm.done == ["submit"]


def test_a_successor_that_cannot_be_written_down_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, submit=["8"])
    (tmp_path / records.SCRIPT_FILE).write_text("#!/bin/sh\n")
    (tmp_path / records.CLUSTER_FILE).write_text("{")
    assert [event.kind for event in allocation.go_on(tmp_path, "7", "timeout", Continuation.SUCCESSOR)] == ["successor"]


def test_a_lock_that_somebody_frozen_holds_keeps_no_successor_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster("main", "slurm", 1, "canary", 0.0, 1, 1, 1, ("7",))
    cluster.write(tmp_path / records.CLUSTER_FILE)
    (tmp_path / records.SCRIPT_FILE).write_text("#!/bin/sh\n")
    monkeypatch.setattr(allocation, "Slurm", lambda: SimpleNamespace(submit=lambda _: "8"))
    seconds = count(0.0, 1.0)
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: None))
    with allocation.locked(tmp_path):
        done = list(allocation.go_on(tmp_path, "7", "timeout", Continuation.SUCCESSOR))
    assert [event.kind for event in done] == ["lock_held", "successor"]
    assert Cluster.read(tmp_path) == replace(cluster, jobs=("7", "8"))
