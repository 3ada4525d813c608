"""What the scheduler says of a cluster: its jobs of this life and all nodes, as the node loop needs them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from raylaunch.cluster.node_loop.facts import Base, Joiner
from raylaunch.config.schema import Config
from raylaunch.scheduler.backends import Backend, SlurmBackend
from raylaunch.scheduler.slurm import batch_script
from raylaunch.scheduler.slurm.rows import ENDING, JobRow, JobState, NodeRow
from raylaunch.state.records import Cluster
from raylaunch.timing import BOOT_LIMIT

_TAKEN = {JobState.PREEMPTED: "preempted", JobState.TIMEOUT: "timeout", JobState.NODE_FAIL: "node_fail",
          JobState.BOOT_FAIL: "node_fail"}  # fmt: skip


@dataclass(frozen=True)
class SchedulerView:
    """What the scheduler says: this life's jobs, oldest first, and all nodes."""

    base: Base
    joiners: tuple[Joiner, ...]
    nodes: Mapping[str, NodeRow]
    waits_needlessly: bool = False
    """The base job was requeued and only sits out Slurm's pause."""
    time_left: Mapping[str, int | None] = field(default_factory=dict)
    unrecorded: tuple[str, ...] = ()
    """Jobs that are this life's by their comment, but not in cluster.json: their submission was cut off."""


def snapshot(backend: Backend, directory: Path, cluster: Cluster, config: Config) -> SchedulerView:
    """The jobs of this life of the cluster and all nodes, in two questions. Raises SlurmUnavailable."""
    if isinstance(backend, SlurmBackend):
        return view_of(backend.slurm.named(_names(config, cluster)), backend.slurm.nodes(), cluster)
    jobs = backend.states(directory, cluster.jobs)
    first, *others = cluster.jobs or ("",)
    base = jobs.get(first)
    state_, nodes = ("running", base.nodes) if base is not None and base.alive else ("gone", ())
    joiners = tuple(Joiner(j, False, len(jobs[j].nodes), jobs[j].nodes) for j in others if j in jobs and jobs[j].alive)
    return SchedulerView(Base(first, state_, 0, nodes, BOOT_LIMIT, "cancelled"), joiners, {})


def _names(config: Config, cluster: Cluster) -> list[str]:
    return [batch_script.job_name(config.slurm, cluster.name), batch_script.joiner_name(cluster.name)]


def unrecorded(backend: Backend, cluster: Cluster, config: Config) -> tuple[str, ...]:
    """Living jobs of this life of the cluster that cluster.json does not have."""
    if not isinstance(backend, SlurmBackend):
        return ()
    return view_of(backend.slurm.named(_names(config, cluster)), {}, cluster).unrecorded


def view_of(rows: Mapping[str, JobRow], nodes: Mapping[str, NodeRow], cluster: Cluster) -> SchedulerView:
    """Slurm's rows → what the node loop needs of them."""
    mark = f"raylaunch cluster={cluster.name} life={cluster.canary}"
    ours = [r for r in rows.values() if r.id in cluster.jobs or r.comment.startswith(mark)]
    ours.sort(key=lambda r: int(r.id) if r.id.isdigit() else 0)
    is_joiner = {r.id: r.name == batch_script.joiner_name(cluster.name) for r in ours}
    bases = [r for r in ours if not is_joiner[r.id]]
    row = next((r for r in reversed(bases) if not r.terminal), bases[-1] if bases else None)
    joiners = tuple(
        Joiner(r.id, r.waiting or r.state is JobState.CONFIGURING, _asked(r), r.nodes, _age(r), r.exclude, r.blocked)
        for r in ours
        if is_joiner[r.id] and not r.terminal and r.state not in ENDING
    )
    return SchedulerView(
        base=_base(row, cluster.max_nodes),
        joiners=joiners,
        nodes=nodes,
        waits_needlessly=row is not None and row.waiting and row.reason == "BeginTime" and row.id in cluster.jobs,
        time_left={r.id: r.time_left for r in ours if not r.terminal},
        unrecorded=tuple(r.id for r in ours if r.id not in cluster.jobs and not r.terminal),
    )


def _base(row: JobRow | None, most: int) -> Base:
    if row is None:
        return Base(state="gone")
    if row.terminal:
        return Base(row.id, "gone", ended=_TAKEN.get(row.state, row.state.lower()))
    if row.waiting:
        return Base(row.id, "pending", most)  # squeue's count of a requeued job may be less than it asks for
    return Base(row.id, "ending" if row.state in ENDING else "running", 0, row.nodes, _age(row))


def _asked(row: JobRow) -> int:
    """Nodes of a joiner: held, or while it waits the most it was submitted for."""
    match = re.search(r" nodes=(\d+)", row.comment)
    return int(match[1]) if match and not row.nodes else max(1, len(row.nodes) or row.node_count)


def _age(row: JobRow) -> float:
    return max(0.0, time.time() - row.start.timestamp()) if row.start is not None and not row.waiting else 0.0
