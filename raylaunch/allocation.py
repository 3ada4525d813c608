"""The Slurm allocation under a cluster, as the head sees it: how long it lasts, and the one after it.

A job that runs out of time or is preempted goes on as itself (requeue: same job id, dependencies and
accounting), or, where Slurm does not allow that, as a successor from the same script. Blocking calls.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from raylaunch import layout, locks
from raylaunch.errors import RaylaunchError
from raylaunch.layout import Cluster
from raylaunch.slurm.client import Slurm
from raylaunch.slurm.parse import JobState

log = logging.getLogger("raylaunch.allocation")

JOBS_LOCK = ".jobs.lock"
LOCK_LIMIT, LOCK_LIMIT_AT_END = 30.0, 5.0
"""Seconds to wait for that lock: longer than a command of Slurm may take; at the end there is less time."""
_ENDED = re.compile(r"CANCELLED AT \S+ DUE TO (PREEMPTION|TIME LIMIT|NODE FAILURE)")
_TAKEN = {"PREEMPTED", "TIMEOUT", "NODE_FAIL", "REQUEUED", "BOOT_FAIL", "DEADLINE"}
_BROKEN = {"JobLaunchFailure", "NodeDown", "SystemFailure", "NonZeroExitCode", "RaisedSignal"}
"""squeue's reasons of a job whose batch script is gone: when a batch host that Slurm held for down comes back,
Slurm ends the whole job, whatever --no-kill says (JobLaunchFailure)."""
_NO_SCRIPT = 1
"""The signal by which slurmctld marks a job whose batch host came back without its batch script, for it booted before it
was found dead; slurmctld then ends the whole job (NODE_FAIL, but squeue says COMPLETING for no reason). Of a job that a
person cancels it is SIGTERM or SIGKILL. Measured on 22.05."""
_PREEMPTED = {"preempted", "preemption"}
_COMES_BACK = {"requeued", "node_fail", "boot_fail", "node failure"}


class Onward(Enum):
    """How a cluster whose allocation ends goes on in another."""

    REQUEUE = "requeue"
    """Slurm is asked to run the job again, and where it refuses a successor is submitted."""
    ITSELF = "itself"
    """Slurm ends the job, and runs it again by itself."""
    SUCCESSOR = "successor"
    """Slurm ends the job for good: another one follows."""


@dataclass(frozen=True)
class Look:
    """One look at the job."""

    state: str
    seconds_left: float | None
    preempted: bool = False
    reason: str = ""
    signal: int = 0
    """That ended its batch script."""

    @property
    def taken(self) -> str:
        """Why Slurm ends it for reasons of its own: nobody asked for that; "" where it is not known to."""
        if self.preempted:
            return "preempted"
        if self.state in _TAKEN:
            return self.state.lower()
        if self.state == JobState.COMPLETING and self.signal == _NO_SCRIPT:
            return "node_fail"
        return self.reason if self.reason in _BROKEN else ""


def look(job: str) -> Look | None:
    """The job of this allocation now; None when Slurm does not say."""
    slurm = Slurm()
    try:
        row = slurm.jobs([job]).get(job) if job.isdigit() else None
        # squeue says COMPLETING of a job that is cancelled, of one that is preempted, of one whose host is new.
        detail = slurm.detail(job) if row is not None else None
    except RaylaunchError as error:
        log.warning("Slurm does not answer error=%r", str(error))
        return None
    if row is None:
        return None
    preempted, signal = (detail.preempted, detail.signal) if detail is not None else (False, 0)
    return Look(str(row.state), row.time_left, preempted, row.reason, signal)


def why_ended(directory: Path, job: str, patience: float = 2.0) -> str:
    """Why Slurm ends the job's step, by slurmstepd's own line in the job's output: "preemption", "time limit",
    "node failure", or "" for a cancel by a person and where it says nothing."""
    output, deadline = directory / layout.LOGS / f"slurm-{job}.out", time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError):
            found = _ENDED.findall(output.read_text(errors="replace")[-8192:])
            if found:
                return str(found[-1]).lower()
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.1)


def is_requeued_by_slurm(job: str, why: str) -> bool:
    """Whether Slurm itself runs a job again that it ended for this reason: one that may be requeued, after a failure of
    nodes, and after a preemption unless its partition cancels what it preempts. Yes, where Slurm does not answer."""
    if why not in _PREEMPTED | _COMES_BACK:
        return False
    slurm = Slurm()
    try:
        detail = slurm.detail(job)
        if detail is not None and not detail.requeue:
            return False
        return why in _COMES_BACK or slurm.preempt_mode(job) != "CANCEL"
    except RaylaunchError as error:
        log.warning("whether the job runs again is not known error=%r", str(error))
        return True


def go_on(directory: Path, job: str, why: str, how: Onward) -> Iterator[tuple[str, dict[str, Any]]]:
    """See to the cluster's next allocation; what was done, as events. The requeue ends this process, so
    its event comes first."""
    slurm = Slurm()
    if how is not Onward.SUCCESSOR:
        yield "requeued", {"job": job, "why": why}
    if how is Onward.ITSELF:
        return
    if how is Onward.REQUEUE:
        try:
            slurm.requeue(job)
            return
        except RaylaunchError as error:
            if _waits(slurm, job):  # Slurm was quicker: a successor would be a second allocation of this cluster
                return
            yield "requeue_refused", {"job": job, "error": str(error)}
    try:
        with locked(directory, LOCK_LIMIT_AT_END) as is_ours:
            if not is_ours:
                yield "lock_held", lock_was_held(directory)
            successor = slurm.submit((directory / layout.SCRIPT_FILE).read_text())
            cluster = Cluster.read(directory)
            if cluster is not None:
                replace(cluster, jobs=(*cluster.jobs, successor)).write(directory / layout.CLUSTER_FILE)
        yield "successor", {"job": successor, "why": why}
    except (RaylaunchError, OSError) as error:
        yield "successor_refused", {"error": str(error)}


def _waits(slurm: Slurm, job: str) -> bool:
    """Whether the job is in the queue (again)."""
    try:
        row = slurm.jobs([job]).get(job)
    except RaylaunchError as error:
        log.warning("Slurm does not answer error=%r", str(error))
        return False
    return row is not None and row.state in {JobState.PENDING, JobState.REQUEUED, JobState.REQUEUE_HOLD}


def give_back(jobs: Sequence[str]) -> None:
    """End these jobs, if there are any."""
    try:
        if jobs:
            Slurm().cancel(jobs)
    except RaylaunchError as error:
        log.error("jobs could not be given back jobs=%s error=%r", jobs, str(error))


@contextmanager
def locked(directory: Path, patience: float = LOCK_LIMIT) -> Iterator[bool]:
    """While cluster.json's list of jobs changes. False when somebody else has held the lock for all of `patience`:
    whoever that is, is frozen, for it holds the lock for one sbatch. Then things go on without the lock; a job whose
    record gets lost is found by its comment."""
    with locks.held(directory / JOBS_LOCK, patience) as is_ours:
        yield is_ours


def lock_was_held(directory: Path) -> dict[str, Any]:
    """The fields of the event for that."""
    path = directory / JOBS_LOCK
    return {"lock": str(path), "hint": f"A frozen `raylaunch watch` may hold it: find it with `fuser {path}`."}
