"""Slurm's text → rows. Pure: no command is run and no clock is read here.

Each `*_FORMAT` is what `client` asks a command for, and the function beside it reads the answer.
Fields are separated by the unit separator, which no sane name holds; free text comes last.
States that Slurm may add are UNKNOWN, never an error; a line of another shape is a SlurmError.
"""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import hostlist

from raylaunch.errors import SlurmError
from raylaunch.scheduler.slurm.rows import FinishedRow, JobDetail, JobRow, JobState, NodeRow, PartitionRow, UsageRow

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


def parse_submitted(text: str) -> str:
    """`sbatch --parsable` → the job id; "123;cluster" where several clusters share accounting."""
    lines = text.split()
    job = lines[-1].split(";")[0] if lines else ""
    if not job.isdigit():
        raise SlurmError(f"sbatch printed no job id but {text!r}", "Check with squeue whether a job was submitted.")
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
            f"{command} printed a line that raylaunch cannot parse: {line!r}",
            f"Please report it, with the version from `{command} --version`.",
        )
    return fields
