"""What Slurm's commands list: jobs and their states, nodes, partitions, usage."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path


class JobState(StrEnum):
    """squeue's and sacct's long job states, as of Slurm 24.11."""

    BOOT_FAIL = "BOOT_FAIL"
    CANCELLED = "CANCELLED"
    COMPLETED = "COMPLETED"
    COMPLETING = "COMPLETING"
    CONFIGURING = "CONFIGURING"
    DEADLINE = "DEADLINE"
    FAILED = "FAILED"
    LAUNCH_FAILED = "LAUNCH_FAILED"
    NODE_FAIL = "NODE_FAIL"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    PENDING = "PENDING"
    PREEMPTED = "PREEMPTED"
    RECONFIG_FAIL = "RECONFIG_FAIL"
    REQUEUED = "REQUEUED"
    REQUEUE_FED = "REQUEUE_FED"
    REQUEUE_HOLD = "REQUEUE_HOLD"
    RESIZING = "RESIZING"
    RESV_DEL_HOLD = "RESV_DEL_HOLD"
    REVOKED = "REVOKED"
    RUNNING = "RUNNING"
    SIGNALING = "SIGNALING"
    SPECIAL_EXIT = "SPECIAL_EXIT"
    STAGE_OUT = "STAGE_OUT"
    STOPPED = "STOPPED"
    SUSPENDED = "SUSPENDED"
    TIMEOUT = "TIMEOUT"
    UNKNOWN = "UNKNOWN"


TERMINAL = frozenset(
    {
        JobState.BOOT_FAIL,
        JobState.CANCELLED,
        JobState.COMPLETED,
        JobState.DEADLINE,
        JobState.FAILED,
        JobState.LAUNCH_FAILED,
        JobState.NODE_FAIL,
        JobState.OUT_OF_MEMORY,
        JobState.PREEMPTED,
        JobState.RECONFIG_FAIL,
        JobState.REVOKED,
        JobState.TIMEOUT,
    }
)
"""The job has ended and holds nothing. (A requeued one shows as PENDING, not by its old end.)"""


WAITING = frozenset(
    {
        JobState.PENDING,
        JobState.REQUEUED,
        JobState.REQUEUE_FED,
        JobState.REQUEUE_HOLD,
        JobState.RESV_DEL_HOLD,
        JobState.SPECIAL_EXIT,
    }
)
"""The job holds no nodes yet."""


ENDING = frozenset({JobState.COMPLETING, JobState.STAGE_OUT})
"""The job's processes have ended or are being ended, its nodes are not free yet."""
_BLOCKED = {
    "AccountNotAllowed": "the account may not use this partition: change slurm.account or slurm.partition",
    "BadConstraints": "no node has what is asked for: check slurm.constraint, mem, cpus_per_task and GPUs",
    "DependencyNeverSatisfied": "the job it depends on has failed: check slurm.extra",
    "InvalidAccount": "the account does not exist, or you may not use it: change slurm.account",
    "InvalidQOS": "the QOS does not exist, or you may not use it: change slurm.qos",
    "JobHeldAdmin": "an administrator holds the job back",
    "JobHeldUser": "the job is held: `scontrol release` lets it go",
    "JobHoldMaxRequeue": "the job failed to start too often; Slurm holds it",
    "PartitionConfig": "the partition does not allow this job: check slurm.nodes, time, cpus_per_task, mem and GPUs",
    "PartitionDown": "the partition is down: choose another slurm.partition",
    "PartitionInactive": "the partition is inactive: choose another slurm.partition",
    "PartitionNodeLimit": "the partition has or allows fewer nodes: lower slurm.nodes",
    "PartitionTimeLimit": "the partition allows less time: lower slurm.time",
    "QOSNotAllowed": "the partition does not take this QOS: change slurm.qos or slurm.partition",
}


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job as squeue shows it."""

    id: str
    state: JobState
    partition: str
    user: str
    node_count: int
    """Held, or asked for."""
    nodes: tuple[str, ...]
    """Held now; empty while it waits."""
    start: datetime | None
    """When it started; for a waiting job Slurm's estimate, None where it has none."""
    time_left: int | None
    """Seconds to the time limit; None: no limit."""
    reason: str
    """Why it waits, or how it ended; "" where Slurm says None."""
    name: str
    exclude: tuple[str, ...] = ()
    """Nodes that it must not get."""
    comment: str = ""

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def waiting(self) -> bool:
        return self.state in WAITING

    @property
    def blocked(self) -> str:
        """Why a waiting job will not start by waiting, and what to change; "" where it may."""
        if not self.waiting:
            return ""
        if self.reason.endswith("PerJob") or self.reason.endswith("PerJobLimit"):
            return f"a limit of your account or QOS forbids a job like this ({self.reason})"
        return _BLOCKED.get(self.reason, "")


@dataclass(frozen=True, slots=True)
class JobDetail:
    """What `scontrol show job` says of a job, and squeue does not."""

    preempted: bool
    """Slurm has decided to give its nodes to another job."""
    restarts: int
    """How often it was requeued. Slurm counts at the very moment in which it decides to run a job again."""
    signal: int
    """That ended its batch script, 0: none has."""
    output: Path | None
    """Where its standard output goes."""


@dataclass(frozen=True, slots=True)
class FinishedRow:
    """One job as sacct remembers it."""

    id: str
    state: JobState
    exit_code: int
    signal: int
    """That ended the batch script; 0: none."""
    nodes: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one job, or one of its steps, used. None: the accounting does not say (yet)."""

    job: str
    step: str
    """batch, extern, 0, …; "" for the job itself."""
    state: JobState
    elapsed: int
    """Seconds."""
    cpus: int
    nodes: int
    cpu_seconds: float | None
    """User and system time; of a job, what its ended steps used."""
    max_rss: int | None
    """Bytes, of the task that used most."""
    joules: int | None
    memory: int | None
    """Bytes that were allocated, on all nodes together."""
    gpus: int
    gpu_type: str


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node as sinfo shows it."""

    name: str
    partitions: tuple[str, ...]
    """Those that are up."""
    default: bool
    """One of them is the default one."""
    state: str
    """idle, allocated, mixed, draining, drained, down, … without sinfo's flags."""
    flags: str
    """`*` does not answer, `~` powered off, `^` reboots, and so on."""
    reason: str
    """Why it drains or is down."""

    @property
    def drains(self) -> bool:
        """Somebody wants its jobs to leave."""
        return self.state in {"draining", "drained", "drain", "failing", "fail"}

    @property
    def down(self) -> bool:
        return self.state in {"down", "error"}

    @property
    def idle(self) -> bool:
        """It would start a job now."""
        return self.state == "idle" and "*" not in self.flags


@dataclass(frozen=True, slots=True)
class PartitionRow:
    """Some nodes of a partition that are alike and in one state; a partition may have several rows."""

    name: str
    default: bool
    up: bool
    time_limit: int | None
    """Seconds; None: no limit."""
    node_count: int
    state: str
    """idle, allocated, mixed, down, drained, … without sinfo's flags."""
    flags: str
    """sinfo's flags: `*` does not answer, `~` powered off, and so on."""
    cpus: int
    """Per node; the least of them, where nodes differ."""
    memory: int
    """MiB per node."""
    gres: str

    @property
    def gpus(self) -> int:
        """Per node: `gpu:a100:4(S:0-1)` has 4."""
        total = 0
        for part in self.gres.split(","):
            words = part.split("(")[0].split(":")
            if words[0] == "gpu":
                total += int(words[-1]) if words[-1].isdigit() else 1
        return total
