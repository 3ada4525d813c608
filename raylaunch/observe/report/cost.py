"""The cost of a run: node-hours, GPU-hours, money, energy; and how efficiently its jobs used their allocation.

    the cluster's events → holds → node-hours, GPU-hours held (`node_hours`)   attempts → GPU-hours at work
    prices * what was held → money                                       sacct, once → energy, efficiency

Money is computed from held hours, like a site's bill. Accounting is per job: if a cluster trained several runs, energy
and efficiency are those of all of them. Without accounting, energy is the sum of the nodes' meters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from raylaunch.config.schema import CostConfig
from raylaunch.errors import SlurmError, SlurmUnavailable
from raylaunch.observe.history.node_hours import Interval, NodeUse, gpu_seconds, node_seconds
from raylaunch.observe.history.timeline import Attempt
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.scheduler.slurm.rows import TERMINAL, UsageRow


@dataclass
class Cost:
    """Hours; joules; shares from 0 to 1. None: unknown."""

    node_hours: float | None = None
    gpu_hours: float | None = None
    """Of workers in attempts, one GPU each."""
    gpu_hours_held: float | None = None
    """Of all GPUs of the nodes that were held."""
    gpu_hour: float | None = None
    node_hour: float | None = None
    """The prices."""
    currency: str = ""
    money: float | None = None
    joules: float | None = None
    energy_from: str = ""
    """accounting, or meters (of the nodes, as the cluster's load.jsonl has them)."""
    cpu_efficiency: float | None = None
    """CPU time divided by the allocated CPU time."""
    memory_efficiency: float | None = None
    """The memory of the task that used most, divided by the memory allocated on its node."""
    jobs: list[str] = field(default_factory=list)
    unknown: str = ""
    """Why there are no accounting data."""
    gpu_type: str = ""


def of_run(
    held: Sequence[tuple[Sequence[NodeUse], Sequence[Interval]]],
    attempts: Sequence[Attempt],
    gpus: Mapping[str, int],
    prices: CostConfig,
    until: float,
) -> Cost:
    """From events alone. `held`: for each cluster of the run, its holds and the run's time there; `gpus`: GPUs of each
    node, empty if unknown."""
    found = Cost(gpu_hour=prices.gpu_hour, node_hour=prices.node_hour, currency=prices.currency)
    most = max(gpus.values(), default=0)
    seconds = [node_seconds(holds, intervals) for holds, intervals in held]
    if any(seconds):
        found.node_hours = sum(sum(one.values()) for one in seconds) / 3600
        if gpus:
            found.gpu_hours_held = sum(s * gpus.get(n, most) for one in seconds for n, s in one.items()) / 3600
    if gpus and attempts:
        found.gpu_hours = gpu_seconds(attempts, gpus, until) / 3600
    charged = found.gpu_hours_held if found.gpu_hours_held is not None else found.gpu_hours
    bills = [
        price * amount
        for price, amount in ((prices.node_hour, found.node_hours), (prices.gpu_hour, charged))
        if price is not None and amount
    ]
    found.money = sum(bills) if bills else None
    return found


def ask_accounting(found: Cost, jobs: Sequence[str], since: float, slurm: Slurm) -> None:
    """Add the data of Slurm's accounting for these jobs, or the reason why there are none."""
    found.jobs = list(jobs)
    try:
        rows = slurm.usage(jobs, datetime.fromtimestamp(since - 60.0)) if jobs else []
    except SlurmUnavailable:
        found.unknown = "Slurm does not respond"
        return
    except SlurmError:
        found.unknown = "sacct failed"
        return
    if rows is None:
        found.unknown = "Slurm accounting is not enabled"
        return
    if not rows:
        found.unknown = "its jobs are not in Slurm's accounting" if jobs else "its jobs are not recorded"
        return
    found.cpu_efficiency, found.memory_efficiency, joules = efficiency(rows)
    found.gpu_type = next((row.gpu_type for row in rows if row.gpu_type), "")
    if joules:
        found.joules, found.energy_from = joules, "accounting"
    if found.cpu_efficiency is None and found.memory_efficiency is None:
        ended = all(row.state in TERMINAL for row in rows if not row.step)
        found.unknown = "Slurm's accounting has no usage of its jobs" if ended else "available after its job has ended"


def efficiency(rows: Sequence[UsageRow]) -> tuple[float | None, float | None, float | None]:
    """(CPU, memory, joules) of jobs and their steps. A job with running steps has no CPU time yet: it is skipped."""
    jobs = [row for row in rows if not row.step]
    told = [row for row in jobs if row.cpu_seconds is not None and row.elapsed and row.cpus]
    room = sum(row.elapsed * row.cpus for row in told)
    cpu = sum(row.cpu_seconds or 0.0 for row in told) / room if room else None
    given = {row.job: row.memory / row.nodes for row in jobs if row.memory and row.nodes}
    used = [row.max_rss / given[row.job] for row in rows if row.max_rss and row.job in given]
    joules = sum(row.joules or 0 for row in jobs) or sum(row.joules or 0 for row in rows if row.step != "extern")
    return cpu, max(used, default=None), float(joules) or None
