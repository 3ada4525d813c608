"""What the head makes of the end of its allocation."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from raylaunch import allocation, layout, locks
from raylaunch.allocation import Look, Onward, is_requeued_by_slurm
from raylaunch.errors import SlurmUnavailable
from raylaunch.layout import Cluster
from raylaunch.slurm.parse import JobDetail


@pytest.mark.parametrize(
    ("look", "why"),
    [
        (Look("RUNNING", 60.0), ""),
        (Look("COMPLETING", None), ""),  # of a job that a person cancels
        (Look("COMPLETING", None, preempted=True), "preempted"),
        (Look("TIMEOUT", 0.0), "timeout"),
        (Look("COMPLETING", None, reason="JobLaunchFailure"), "JobLaunchFailure"),
        (Look("COMPLETING", None, reason="Dependency"), ""),
        (Look("COMPLETING", None, signal=1), "node_fail"),  # its batch host booted before it was found dead
        (Look("RUNNING", 60.0, signal=1), ""),
        (Look("COMPLETING", None, signal=15), ""),
        (Look("COMPLETING", None, signal=9), ""),
    ],
)
def test_why_slurm_ends_a_job(look: Look, why: str) -> None:
    assert look.taken == why


class FakeSlurm:
    """It knows the job; `mode` is how its partition preempts."""

    def __init__(self, requeue: bool | None, mode: str = "REQUEUE") -> None:
        self._requeue, self._mode = requeue, mode

    def detail(self, _: str) -> JobDetail | None:
        if self._requeue is None:
            raise SlurmUnavailable("slurmctld does not answer")
        return JobDetail(False, self._requeue, 0, None)

    def preempt_mode(self, _: str) -> str:
        return self._mode


@pytest.mark.parametrize(
    ("why", "slurm", "again"),
    [
        ("node_fail", FakeSlurm(True), True),
        ("node_fail", FakeSlurm(False), False),  # a cluster of `up`
        ("node failure", FakeSlurm(True), True),
        ("requeued", FakeSlurm(True), True),
        ("preempted", FakeSlurm(True), True),
        ("preempted", FakeSlurm(True, "CANCEL"), False),
        ("preemption", FakeSlurm(False), False),
        ("node_fail", FakeSlurm(None), True),
        ("timeout", FakeSlurm(True), False),
        ("time limit", FakeSlurm(True), False),
        ("JobLaunchFailure", FakeSlurm(True), False),
        ("its job was told to end", FakeSlurm(True), False),
    ],
)
def test_what_slurm_runs_again_by_itself(
    monkeypatch: pytest.MonkeyPatch, why: str, slurm: FakeSlurm, again: bool
) -> None:
    monkeypatch.setattr(allocation, "Slurm", lambda: slurm)
    assert is_requeued_by_slurm("1", why) == again


def test_a_lock_that_somebody_frozen_holds_keeps_no_successor_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster("main", "slurm", 1, "canary", 0.0, 1, 1, 1, ("7",))
    cluster.write(tmp_path / layout.CLUSTER_FILE)
    (tmp_path / layout.SCRIPT_FILE).write_text("#!/bin/sh\n")
    monkeypatch.setattr(allocation, "Slurm", lambda: SimpleNamespace(submit=lambda _: "8"))
    seconds = count(0.0, 1.0)
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: None))
    with allocation.locked(tmp_path):
        done = list(allocation.go_on(tmp_path, "7", "timeout", Onward.SUCCESSOR))
    assert [kind for kind, _ in done] == ["lock_held", "successor"]
    assert Cluster.read(tmp_path) == replace(cluster, jobs=("7", "8"))
