"""Where the agents' processes come from: Slurm, or this machine. One protocol: submit, states, cancel.

Slurm: a batch script goes to sbatch. Local: the same agents as background processes of this machine,
each a node of its own (address in 127.0.0.0/8, ports, temp directory, a share of the CPUs).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raylaunch.config import loader
from raylaunch.errors import UsageError
from raylaunch.host import processes
from raylaunch.host.temp_dir import temp_dir_path
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.state import files, records
from raylaunch.state.records import Cluster


@dataclass(frozen=True)
class Job:
    """One job as its backend sees it. `state` in Slurm's words; `start`: the estimate for a pending one."""

    id: str
    state: str
    alive: bool
    reason: str = ""
    nodes: tuple[str, ...] = ()
    start: str = ""
    blocked: str = ""
    """Why a pending job will not start by waiting, and what to change."""
    time_left: int | None = None
    """Seconds to its time limit; None: no limit, or not running."""

    @property
    def pending(self) -> bool:
        return self.state in {"PENDING", "CONFIGURING"}  # the second: its nodes are still powered up


class Backend(Protocol):
    """What raylaunch needs of a scheduler."""

    name: str

    def submit(self, directory: Path, cluster: Cluster, script: str) -> str:
        """Start the cluster's agents; the job's id."""
        ...

    def states(self, directory: Path, ids: Sequence[str]) -> dict[str, Job]:
        """The jobs that the backend still knows, in one question."""
        ...

    def cancel(self, directory: Path, ids: Sequence[str]) -> None:
        """End the jobs, whatever they do; no error when they are gone."""
        ...


class SlurmBackend:
    """Jobs of a Slurm cluster."""

    name = "slurm"

    def __init__(self, slurm: Slurm | None = None) -> None:
        self.slurm = slurm or Slurm()

    def submit(self, directory: Path, cluster: Cluster, script: str) -> str:
        return self.slurm.submit(script)

    def states(self, directory: Path, ids: Sequence[str]) -> dict[str, Job]:
        return {
            row.id: Job(
                row.id, str(row.state), not row.terminal, row.reason, row.nodes,
                f"{row.start:%Y-%m-%d %H:%M}" if row.start else "", "" if row.reason.startswith("JobHeld") else row.blocked,
                row.time_left if row.state == "RUNNING" else None,
            )
            for row in self.slurm.jobs(ids).values()
        }  # fmt: skip

    def cancel(self, directory: Path, ids: Sequence[str]) -> None:
        self.slurm.cancel(ids)


_AGENTS_FILE = "agents.json"
CANARY = "RAYLAUNCH_CANARY"
"""Stands in the environment of every process of one life of a cluster."""


class LocalBackend:
    """Agents as background processes of this machine, remembered with pid and start time."""

    name = "local"

    def submit(self, directory: Path, cluster: Cluster, script: str) -> str:
        return self._start(directory, cluster, range(cluster.max_nodes))

    def join(self, directory: Path, cluster: Cluster, nodes: int) -> str:
        """Further agents, beside those of the base; the job's id."""
        taken = [int(row["index"]) for row in files.read_json(directory / _AGENTS_FILE) or []]
        first = max([cluster.max_nodes - 1, *taken]) + 1
        return self._start(directory, cluster, range(first, first + nodes))

    def _start(self, directory: Path, cluster: Cluster, indices: range) -> str:
        rows = files.read_json(directory / _AGENTS_FILE) or []
        job = ""
        for index in indices:
            with (directory / records.LOGS / "agents.out").open("ab") as out:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "raylaunch.cluster.agent.supervisor"],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                    env={
                        **os.environ,
                        "RAYLAUNCH_CLUSTER_DIR": str(directory),
                        CANARY: cluster.canary,
                        "RAYLAUNCH_LOCAL_INDEX": str(index),
                        "RAYLAUNCH_LOCAL_COUNT": str(cluster.max_nodes),
                    },
                )  # fmt: skip
            job = job or f"local-{process.pid}"
            started = processes.start_time(process.pid) or 0
            rows.append(
                {"node": f"local{index + 1}", "index": index, "job": job, "pid": process.pid, "started": started}
            )
            files.write_json(directory / _AGENTS_FILE, rows)  # after each: a kill of `up` here orphans none
        return job

    def agents(self, directory: Path, job: str | None = None) -> dict[str, int]:
        """Node → pid of the keepers that live, of one job or all."""
        rows = [r for r in files.read_json(directory / _AGENTS_FILE) or [] if job is None or r["job"] == job]
        return {str(r["node"]): int(r["pid"]) for r in rows if processes.is_same(int(r["pid"]), int(r["started"]))}

    def states(self, directory: Path, ids: Sequence[str]) -> dict[str, Job]:
        living = {job: self.agents(directory, job) for job in ids}
        return {
            job: Job(job, "RUNNING" if nodes else "COMPLETED", bool(nodes), nodes=tuple(nodes))
            for job, nodes in living.items()
        }

    def cancel(self, directory: Path, ids: Sequence[str], limit: float = 10.0) -> None:
        """SIGTERM lets an agent end its own tree; what then still lives is killed with its tree, and
        so is what an agent left behind that was killed itself."""
        for pid in self.agents(directory).values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + limit
        while self.agents(directory) and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster = Cluster.read(directory)
        for pid in [*self.agents(directory).values(), *(processes.marked(CANARY, cluster.canary) if cluster else ())]:
            processes.end_tree(pid)
        if cluster is not None:
            for path in self._temp_dirs(directory, cluster):
                shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def _temp_dirs(directory: Path, cluster: Cluster) -> list[Path]:
        base = loader.load_resolved(directory / records.CONFIG_FILE).cluster.temp_dir
        rows = files.read_json(directory / _AGENTS_FILE) or []
        indices = {*range(cluster.max_nodes), *(int(row["index"]) for row in rows)}
        return [temp_dir_path(base, str(directory), str(index + 1)) for index in sorted(indices)]


def of(name: str) -> Backend:
    """The backend of this name; `auto` is Slurm where sbatch answers, else local."""
    if name == "auto":
        name = "slurm" if Slurm().available() else "local"
    if name == "slurm":
        return SlurmBackend()
    if name == "local":
        return LocalBackend()
    raise UsageError(f"no backend {name!r}", "Choose auto, slurm or local.")
