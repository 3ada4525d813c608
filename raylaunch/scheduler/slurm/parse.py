"""Slurm's text → rows. Pure: no command is run and no clock is read here.

Each `*_FORMAT` is what `client` asks a command for, and the function beside it reads the answer.
Fields are separated by the unit separator, which no sane name holds; free text comes last.
States that Slurm may add are UNKNOWN, never an error; a line of another shape is a SlurmError.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import hostlist

from raylaunch.errors import SlurmError

SEPARATOR = "\x1f"
JOB_FORMAT = SEPARATOR.join(("%i", "%T", "%P", "%u", "%D", "%N", "%S", "%L", "%x", "%k", "%r", "%j"))
"""For `squeue -o`."""
FINISHED_FORMAT = "JobID,State,ExitCode,NodeList,Reason"
"""For `sacct -o`."""
USAGE_FORMAT = "JobID,State,ElapsedRaw,AllocCPUS,NNodes,TotalCPU,MaxRSS,ConsumedEnergyRaw,AllocTRES"
"""For `sacct -o`, of jobs and their steps."""
PARTITION_FORMAT = SEPARATOR.join(("%P", "%a", "%l", "%D", "%T", "%c", "%m", "%G"))
"""For `sinfo -o`."""

NODE_FORMAT = SEPARATOR.join(("%N", "%P", "%a", "%T", "%E"))
"""For `sinfo -N -o`."""

_STATE_FLAGS = "*~#!%$@^-+"  # sinfo(1), NODE STATE CODES
_NOTHING = {"", "(null)", "N/A", "None", "None assigned", "Unknown"}


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
    "InvalidAccount": "there is no such account, or it is not yours: change slurm.account",
    "InvalidQOS": "there is no such QOS, or it is not yours: change slurm.qos",
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


def parse_submitted(text: str) -> str:
    """`sbatch --parsable` → the job id; "123;cluster" where several clusters share accounting."""
    lines = text.split()
    job = lines[-1].split(";")[0] if lines else ""
    if not job.isdigit():
        raise SlurmError(f"sbatch gave no job id but {text!r}", "Look with squeue whether a job was queued.")
    return job


def parse_jobs(text: str) -> list[JobRow]:
    """squeue with JOB_FORMAT → rows."""
    rows: list[JobRow] = []
    for line in text.removesuffix("\n").split("\n"):
        fields = line.split(SEPARATOR, JOB_FORMAT.count(SEPARATOR))
        if len(fields) == 1 and rows:  # a job name may hold a line break
            rows[-1] = replace(rows[-1], name=f"{rows[-1].name}\n{line}")
            continue
        if not line.strip():
            continue
        job, state, partition, user, count, nodes, start, left, exclude, comment, reason, name = _exactly(
            12, fields, line, "squeue"
        )
        rows.append(
            JobRow(
                id=job,
                state=parse_state(state),
                partition=partition,
                user=user,
                node_count=_number(count),
                nodes=parse_hosts(nodes),
                start=parse_when(start),
                time_left=parse_duration(left),
                reason="" if reason in _NOTHING else reason,
                name=name,
                exclude=parse_hosts(exclude),
                comment="" if comment in _NOTHING else comment,
            )
        )
    return rows


def parse_detail(text: str) -> JobDetail | None:
    """`scontrol show job --oneliner` of one job; None where it shows none."""
    _, known, fields = text.partition("\n")[0].partition(
        " JobState="
    )  # before it: the job's name, which may be anything
    says: dict[str, str] = {}
    for key, value in re.findall(r" (PreemptTime|Restarts|ExitCode|StdOut)=(.*?)(?= \w+=|$)", f" {fields}"):
        says.setdefault(key, value)  # behind them: a comment, which may be anything
    if not known:
        return None
    return JobDetail(
        preempted=says.get("PreemptTime", "None") not in _NOTHING,
        restarts=_number(says.get("Restarts", "0")),
        signal=_number(says.get("ExitCode", "0:0").partition(":")[2]),
        output=Path(says["StdOut"]) if says.get("StdOut", "").startswith("/") else None,
    )


def parse_finished(text: str) -> list[FinishedRow]:
    """sacct with FINISHED_FORMAT → rows."""
    rows = []
    for line in text.split("\n"):
        if not line.strip():
            continue
        fields = line.split(SEPARATOR, FINISHED_FORMAT.count(","))
        job, state, code, nodes, reason = _exactly(5, fields, line, "sacct")
        status, _, signal = code.partition(":")
        rows.append(
            FinishedRow(
                id=job,
                state=parse_state(state),
                exit_code=_number(status),
                signal=_number(signal),
                nodes=parse_hosts(nodes),
                reason="" if reason in _NOTHING else reason,
            )
        )
    return rows


def parse_usage(text: str) -> list[UsageRow]:
    """sacct with USAGE_FORMAT → rows."""
    rows = []
    for line in text.split("\n"):
        if not line.strip():
            continue
        fields = line.split(SEPARATOR)
        name, state, elapsed, cpus, nodes, cpu, rss, energy, tres = _exactly(9, fields, line, "sacct")
        job, _, step = name.partition(".")
        has = dict(part.split("=", 1) for part in tres.split(",") if "=" in part)
        typed = sorted(key for key in has if key.startswith("gres/gpu:"))
        joules = _number(energy)
        rows.append(
            UsageRow(
                job=job,
                step=step,
                state=parse_state(state),
                elapsed=_number(elapsed),
                cpus=_number(cpus),
                nodes=_number(nodes),
                cpu_seconds=_cpu_seconds(cpu),
                max_rss=_bytes(rss),
                joules=joules if 0 < joules < 1 << 62 else None,  # NO_VAL64 where there is no meter
                memory=_bytes(has.get("mem", "")),
                gpus=_number(has.get("gres/gpu", "")),
                gpu_type=typed[0].partition(":")[2] if typed else "",
            )
        )
    return rows


def parse_partitions(text: str) -> list[PartitionRow]:
    """sinfo with PARTITION_FORMAT → rows, in sinfo's order."""
    rows = []
    for line in text.split("\n"):
        if not line.strip():
            continue
        fields = line.split(SEPARATOR)
        name, up, limit, count, state, cpus, memory, gres = _exactly(8, fields, line, "sinfo")
        bare = state.rstrip(_STATE_FLAGS)
        rows.append(
            PartitionRow(
                name=name.removesuffix("*"),
                default=name.endswith("*"),
                up=up == "up",
                time_limit=parse_duration(limit),
                node_count=_number(count),
                state=bare,
                flags=state[len(bare) :],
                cpus=_number(cpus),
                memory=_number(memory),
                gres="" if gres in _NOTHING else gres,
            )
        )
    return rows


def parse_nodes(text: str) -> dict[str, NodeRow]:
    """sinfo -N with NODE_FORMAT, a line a node and partition → node → row."""
    rows: dict[str, NodeRow] = {}
    for line in text.split("\n"):
        if not line.strip():
            continue
        fields = line.split(SEPARATOR, NODE_FORMAT.count(SEPARATOR))
        name, partition, up, state, reason = _exactly(5, fields, line, "sinfo")
        bare = state.rstrip(_STATE_FLAGS)
        known = rows.get(name)
        rows[name] = NodeRow(
            name=name,
            partitions=(*(known.partitions if known else ()), *([partition.removesuffix("*")] if up == "up" else [])),
            default=(known is not None and known.default) or partition.endswith("*"),
            state=bare,
            flags=state[len(bare) :],
            reason="" if reason in _NOTHING or reason == "none" else reason,
        )
    return rows


def parse_state(text: str) -> JobState:
    """`CANCELLED by 1000` and `CANCELLED+` are CANCELLED."""
    word = text.split(" ")[0].rstrip("+").upper()
    return JobState(word) if word in JobState.__members__ else JobState.UNKNOWN


def parse_hosts(text: str) -> tuple[str, ...]:
    """`node[1-3,7],gpu1` → names in that order; () for none."""
    if text.strip() in _NOTHING:
        return ()
    try:
        return tuple(hostlist.expand_hostlist(text.strip()))
    except hostlist.BadHostlist as error:
        raise SlurmError(f"not a list of hosts: {text!r} ({error})") from error


def parse_duration(text: str) -> int | None:
    """squeue's and sinfo's `[days-]hours:minutes:seconds` → seconds; None for no limit or none known."""
    days, dash, rest = text.strip().rpartition("-")
    parts = rest.split(":")
    if len(parts) > 3 or not all(part.isdigit() for part in parts) or (dash and not days.isdigit()):
        return None  # UNLIMITED, infinite, NOT_SET, INVALID, n/a
    numbers = [int(part) for part in parts]
    hours_first = dash or len(numbers) == 3
    hours, minutes, seconds = ([*numbers, 0, 0] if hours_first else [0, *numbers, 0])[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_when(text: str) -> datetime | None:
    """`2026-11-21T02:24:31`, in this machine's zone; None for N/A."""
    try:
        return datetime.fromisoformat(text.strip()).astimezone()
    except ValueError:
        return None


def _cpu_seconds(text: str) -> float | None:
    """sacct's `[days-][hours:]minutes:seconds[.fraction]`; None for none at all."""
    whole, _, fraction = text.strip().partition(".")
    seconds = parse_duration(whole)
    found = None if seconds is None else seconds + (float(f"0.{fraction}") if fraction.isdigit() else 0.0)
    return found or None


def _bytes(text: str) -> int | None:
    """`5266672K`, `16G`, `0.5M`; None for none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)", text.strip())
    amount = float(match[1]) * 1024 ** " KMGTP".index(match[2] or " ") if match is not None else 0.0
    return int(amount) or None


def _number(text: str) -> int:
    """`4`, and `4+` where nodes differ; 0 for what is no number."""
    digits = text.strip().rstrip("+")
    return int(digits) if digits.isdigit() else 0


def _exactly(count: int, fields: list[str], line: str, command: str) -> list[str]:
    if len(fields) != count:
        raise SlurmError(
            f"{command} answered with a line that raylaunch does not understand: {line!r}",
            f"Please report it, with the version from `{command} --version`.",
        )
    return fields
