"""The Slurm allocation under a cluster, as the head sees it: how long it lasts, and the one after it.

A job that runs out of time or is preempted goes on as itself (requeue: same job id, dependencies and
accounting), or, where Slurm does not allow that, as a successor from the same script. Blocking calls.
"""

from __future__ import annotations

import contextlib
import logging
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TypeVar

from raylaunch.checkpoint.events import Event
from raylaunch.errors import RaylaunchError, SlurmUnavailable
from raylaunch.host import locks
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.scheduler.slurm.parse import parse_when
from raylaunch.scheduler.slurm.rows import JobState
from raylaunch.state import records
from raylaunch.state.node_events import LockHeld, Requeued, RequeueRefused, Successor, SuccessorRefused
from raylaunch.state.records import Cluster

log = logging.getLogger("raylaunch.allocation")

T = TypeVar("T")

JOBS_LOCK = ".jobs.lock"
LOCK_LIMIT, LOCK_LIMIT_AT_END = 30.0, 5.0
"""Seconds to wait for that lock: longer than a command of Slurm may take; at the end there is less time."""
AGAIN_AFTER = 1.0
"""Seconds after which slurmctld is asked again that did not answer."""
SKEW = 2.0
"""Seconds by which the clocks of two nodes may differ."""
_IS_REQUEUED = "pending execution"
"""slurmctld's answer when a job is to be requeued that waits already, or will when it has ended."""
_ENDED = re.compile(r"CANCELLED AT (\S+)(?: DUE TO ([A-Z]+(?: [A-Z]+)*))?")
_TAKEN = {"PREEMPTED", "TIMEOUT", "NODE_FAIL", "REQUEUED", "BOOT_FAIL", "DEADLINE"}
_REASONS = {"TimeLimit", "JobLaunchFailure", "NodeDown", "SystemFailure", "NonZeroExitCode", "RaisedSignal"}
"""squeue's, of a job whose time is up, or whose batch script is gone: when a batch host that Slurm held for down comes
back, Slurm ends the whole job, whatever --no-kill says (JobLaunchFailure)."""
_NO_SCRIPT = 1
"""The signal by which slurmctld marks a job whose batch host came back without its batch script, for it booted before it
was found dead; slurmctld then ends the whole job (NODE_FAIL, but squeue says COMPLETING for no reason). Of a job that a
person cancels it is SIGTERM or SIGKILL. Measured on 22.05."""


class Continuation(Enum):
    """How a cluster whose allocation ends goes on in another."""

    REQUEUE = "requeue"
    """Slurm is asked to run the job again, and where it refuses a successor is submitted."""
    ITSELF = "itself"
    """Slurm ends the job, and runs it again by itself."""
    SUCCESSOR = "successor"
    """Slurm ends the job for good: another one follows."""


@dataclass(frozen=True)
class JobSnapshot:
    """One look at the job."""

    state: str
    seconds_left: float | None
    preempted: bool = False
    reason: str = ""
    signal: int = 0
    """That ended its batch script."""
    again: bool | None = None
    """Slurm runs it again by itself; None where it does not say."""

    @property
    def taken(self) -> str:
        """Why Slurm ends it for reasons of its own: nobody asked for that; "" where it is not known to."""
        if self.preempted:
            return "preempted"
        if self.state in _TAKEN:
            return self.state.lower()
        if self.state == JobState.COMPLETING and self.signal == _NO_SCRIPT:
            return "node_fail"
        if self.again:  # of a job that is preempted and requeued, Slurm says no more
            return "requeued"
        return self.reason if self.reason in _REASONS else ""


def snapshot(job: str, restarts: int = 0) -> JobSnapshot | None:
    """The job of this allocation now, which had been requeued so often before; None when Slurm does not say."""
    if not job.isdigit():
        return None
    slurm = Slurm()
    try:
        row = _twice(lambda: slurm.jobs([job])).get(job)
    except RaylaunchError as error:
        log.warning("Slurm does not answer error=%r", str(error))
        return None
    if row is None:
        return None
    known = JobSnapshot(str(row.state), row.time_left, reason=row.reason)
    try:
        # squeue says COMPLETING of a job that is cancelled, preempted, requeued, or has lost its batch host.
        detail = slurm.detail(job)
    except RaylaunchError as error:
        log.warning("Slurm reports no reason for the end of the job error=%r", str(error))
        return known
    if detail is None:
        return known
    return replace(known, preempted=detail.preempted, signal=detail.signal, again=detail.restarts > restarts)


def _twice(work: Callable[[], T], harmless: bool = True) -> T:
    """slurmctld may be busy, or just being restarted. `harmless`: also where it may have done it without an answer."""
    try:
        return work()
    except SlurmUnavailable as error:
        if isinstance(error.__cause__, subprocess.TimeoutExpired) and not harmless:
            raise
        time.sleep(AGAIN_AFTER)
        return work()


@dataclass(frozen=True)
class Word:
    """slurmstepd's, on why a step was ended: for a cause ("preemption", "time limit", "node failure", "job requeue"); or,
    if it names none, by a person. Neither, where it says nothing."""

    cause: str = ""
    cancelled: bool = False


def why_ended(directory: Path, job: str, since: float, patience: float = 2.0) -> Word:
    """Why Slurm ends the job's step, by the last line on that in the job's output. Lines before `since` are of an earlier
    allocation: a job that is requeued writes on into the same file."""
    output, deadline = directory / records.LOGS / f"slurm-{job}.out", time.monotonic() + patience
    while True:
        causes = list[str]()
        with contextlib.suppress(OSError):
            found = _ENDED.findall(output.read_text(errors="replace")[-8192:])
            causes = [cause for moment, cause in found if _is_fresh(moment, since)]
        if any(causes):
            return Word([cause for cause in causes if cause][-1].lower())
        if time.monotonic() > deadline:
            return Word(cancelled=bool(causes))
        time.sleep(0.1)


def _is_fresh(moment: str, since: float) -> bool:
    when = parse_when(moment)
    return when is None or when.timestamp() > since - SKEW


def go_on(directory: Path, job: str, why: str, how: Continuation) -> Iterator[Event]:
    """See to the cluster's next allocation; what was done, as events. The requeue ends this process, so
    its event comes first."""
    slurm = Slurm()
    if how is not Continuation.SUCCESSOR:
        yield Requeued(job, why)
    if how is Continuation.ITSELF:
        return
    if how is Continuation.REQUEUE:
        try:
            return _twice(lambda: slurm.requeue(job))
        except RaylaunchError as error:
            # Slurm was quicker: a successor would be a second allocation of this cluster
            if _IS_REQUEUED in str(error).lower() or _waits(slurm, job):
                return
            yield RequeueRefused(job, str(error))
    try:
        script = (directory / records.SCRIPT_FILE).read_text()
        with locked(directory, LOCK_LIMIT_AT_END) as is_ours:
            if not is_ours:
                yield lock_was_held(directory)
            successor = _twice(lambda: slurm.submit(script), harmless=False)
            yield Successor(successor, why)
            _record(directory, successor)
    except (RaylaunchError, OSError) as error:
        yield SuccessorRefused(str(error))


def _record(directory: Path, job: str) -> None:
    """Among the cluster's jobs. One whose record gets lost is found by its comment."""
    try:
        cluster = Cluster.read(directory)
        if cluster is not None:
            replace(cluster, jobs=(*cluster.jobs, job)).write(directory / records.CLUSTER_FILE)
    except (RaylaunchError, OSError) as error:
        log.error("the successor could not be recorded job=%s error=%r", job, str(error))


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
        log.error("jobs could not be cancelled jobs=%s error=%r", jobs, str(error))


@contextmanager
def locked(directory: Path, patience: float = LOCK_LIMIT) -> Iterator[bool]:
    """While cluster.json's list of jobs changes. False when somebody else has held the lock for all of `patience`:
    whoever that is, is frozen, for it holds the lock for one sbatch. Then things go on without the lock; a job whose
    record gets lost is found by its comment."""
    with locks.held(directory / JOBS_LOCK, patience) as is_ours:
        yield is_ours


def lock_was_held(directory: Path) -> LockHeld:
    """The event for that."""
    path = directory / JOBS_LOCK
    return LockHeld(str(path), f"A frozen `raylaunch watch` may hold it: find it with `fuser {path}`.")
