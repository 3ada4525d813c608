"""What the head makes of the end of its allocation."""

from __future__ import annotations

import pytest

from raylaunch.allocation import Look, is_requeued_by_slurm


@pytest.mark.parametrize(
    ("look", "why"),
    [
        (Look("RUNNING", 60.0), ""),
        (Look("COMPLETING", None), ""),  # of a job that a person cancels
        (Look("COMPLETING", None, preempted=True), "preempted"),
        (Look("TIMEOUT", 0.0), "timeout"),
        (Look("COMPLETING", None, reason="JobLaunchFailure"), "JobLaunchFailure"),
        (Look("COMPLETING", None, reason="Dependency"), ""),
    ],
)
def test_why_slurm_ends_a_job(look: Look, why: str) -> None:
    assert look.taken == why


@pytest.mark.parametrize(
    ("why", "again"),
    [("node_fail", True), ("node failure", True), ("requeued", True), ("timeout", False), ("time limit", False),
     ("JobLaunchFailure", False), ("its job was told to end", False)],
)  # fmt: skip
def test_what_slurm_runs_again_by_itself(why: str, again: bool) -> None:
    assert is_requeued_by_slurm("1", why) == again
