"""What lies in a cluster directory and in a run directory, by name.

    CLUSTER/  cluster.json  who it is (written by `up`)      RUN/  config.yaml   resolved
              config.yaml   resolved                               run.json      state, by the driver
              script.sbatch as submitted                           events.jsonl  metrics.jsonl
              token         0600                                   stop          present: save and end
              canary        proves that the directory is shared    attempts/NNNN/outcome.json
              head.json     who the head is, where to reach it     checkpoints/step-NNNNNNNN/
              incarnations/ a claim per election: NNNNNNNN         logs/         driver.log, rank logs
              members.json  the nodes, by the head                 code.json     commit, versions
              duties.json   what the next head must know, by the head
              nodes/N.json  a node that could not start
              requests/     what is asked of the head (see `requests`)
              events.jsonl  logs/  ended.json  exit_code

Plain path arithmetic and the two records that travel between processes; no decisions.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from raylaunch.checkpoint.fence import is_there
from raylaunch.state import files

CLUSTER_FILE, CONFIG_FILE, SCRIPT_FILE = "cluster.json", "config.yaml", "script.sbatch"
TOKEN_FILE, CANARY_FILE = "token", "canary"
HEAD_FILE, MEMBERS_FILE, ENDED_FILE, EXIT_CODE_FILE = "head.json", "members.json", "ended.json", "exit_code"
DUTIES_FILE = "duties.json"
RUN_FILE, OUTCOME_FILE = "run.json", "outcome.json"
NODES, REQUESTS, LOGS, INCARNATIONS = "nodes", "requests", "logs", "incarnations"
WORKER_RESOURCE = "raylaunch_worker"
"""A custom Ray resource: agents start Ray with one unit per training worker, attempts take one per worker."""
FAILED_LINE = "RAYLAUNCH_FAILED"
"""Begins a line in a job's output that names a node which could not use the cluster directory."""


FORMER_KEYS = {"life": "allocation", "base": "incarnation_offset"}
"""Of a record's file, before December 2026 → the present key."""


class Record:
    """A dataclass that is one JSON file; unknown keys of a newer version are passed over."""

    @classmethod
    def parse(cls, value: dict[str, Any]) -> Self:
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        current = {FORMER_KEYS.get(k, k): v for k, v in value.items()}
        return cls(**{k: v for k, v in current.items() if k in known})

    def values(self) -> dict[str, Any]:
        """As the file has them. Former keys stand beside the present ones, for processes that were started before the
        upgrade: a run's driver would fence itself, and agents would not follow a new head."""
        values: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return values | {former: values[now] for former, now in FORMER_KEYS.items() if now in values}

    def write(self, path: Path) -> None:
        files.write_json(path, self.values())


@dataclass(frozen=True)
class Cluster(Record):
    """cluster.json: written by `up`, read by everybody."""

    name: str
    backend: str
    incarnation: int
    canary: str
    created: float
    min_nodes: int
    max_nodes: int
    workers_per_node: int
    jobs: tuple[str, ...] = ()
    run: str | None = None
    """For `submit`: the one run of this cluster, which ends with it."""

    @classmethod
    def read(cls, directory: Path) -> Cluster | None:
        value = files.read_json(directory / CLUSTER_FILE)
        return None if value is None else cls.parse({**value, "jobs": tuple(value.get("jobs", ()))})


@dataclass(frozen=True)
class Head(Record):
    """head.json: where the head of this incarnation is."""

    canary: str
    incarnation: int
    node: str
    hostname: str
    address: str
    control_port: int
    gcs: str
    dashboard_port: int
    time: float
    allocation: str = ""
    """The base job and its restart count, as JOB:COUNT. A requeued job finds a head.json that is over."""

    @property
    def job(self) -> str:
        """The base job of this allocation."""
        return self.allocation.partition(":")[0]

    @property
    def restarts(self) -> int:
        """How often Slurm had requeued it by then."""
        return int(self.allocation.partition(":")[2] or 0)

    @classmethod
    def read(cls, directory: Path) -> Head | None:
        value = files.read_json(directory / HEAD_FILE)
        return None if value is None else cls.parse(value)


@dataclass(frozen=True)
class IncarnationClaim(Record):
    """incarnations/NNNNNNNN: which node has claimed to be the head."""

    node: str
    time: float
    allocation: str = ""
    """The one that begins with it; "" for an election in one that has begun."""

    @classmethod
    def read(cls, cluster: Path, incarnation: int) -> IncarnationClaim | None:
        value = files.read_json(cluster / INCARNATIONS / f"{incarnation:08d}")
        return None if value is None else cls.parse(value)


@dataclass(frozen=True)
class ClusterEnd(Record):
    """ended.json: a life of a cluster is over."""

    canary: str = ""
    reason: str = ""
    unclean: dict[str, int] = field(default_factory=dict)
    """Node → how much is left there, -1 for a node without a last word."""
    lost: list[str] = field(default_factory=list)
    """Nodes that were gone before the end began."""
    time: float = 0.0

    @classmethod
    def read(cls, directory: Path) -> ClusterEnd | None:
        value = files.read_json(directory / ENDED_FILE)
        return None if value is None else cls.parse(value)


def claims(cluster: Path) -> list[int]:
    """The incarnations that were claimed in this life of the cluster, the newest last."""
    return sorted(int(path.name) for path in listed(cluster / INCARNATIONS) if path.name.isdecimal())


def listed(folder: Path) -> list[Path]:
    """What lies in a directory, nothing where there is none. OSError when it cannot be listed: `Path.glob` calls that
    empty, since Python 3.13."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def is_fenced(cluster: Path, incarnation: int) -> bool:
    """Whether the head of this incarnation was replaced (see `fence`). Claims are made one above the other, so the next
    number is there if any is. A client of NFS may remember for a while that it was not; then head.json tells, which
    is replaced and never removed. Our own claim goes when the cluster is brought up anew, and only then: where the
    directory is gone, too, the storage is, and nobody knows anything."""
    folder = cluster / INCARNATIONS
    if is_there(folder / f"{incarnation + 1:08d}"):
        return True
    if not is_there(folder / f"{incarnation:08d}") and is_there(folder):
        return True
    head = Head.read(cluster)
    return head is not None and head.incarnation > incarnation


def began(cluster: Path, allocation: str) -> int | None:
    """The incarnation with which this allocation began as the cluster's, None when it has not."""
    made = (
        n for n in claims(cluster) if (claim := IncarnationClaim.read(cluster, n)) and claim.allocation == allocation
    )
    return max(made, default=None)


def claim(cluster: Path, incarnation: int, node: str, allocation: str = "") -> bool:
    """Claim to be the head of this incarnation; False when somebody else has. Exclusive on NFS, too. `allocation`: one
    that begins with it."""
    folder = files.make_dir(cluster / INCARNATIONS)
    mine = folder / f".{node}-{uuid.uuid4().hex[:8]}"
    IncarnationClaim(node, time.time(), allocation).write(mine)
    try:
        # link(2) is atomic on every file system that nodes share; O_EXCL is not on old NFS.
        (folder / f"{incarnation:08d}").hardlink_to(mine)
    except FileExistsError:
        return False
    finally:
        mine.unlink(missing_ok=True)
    return True


def write_end(
    cluster: Path, canary: str, reason: str, unclean: dict[str, int], lost: list[str], exit_code: int
) -> None:
    """A life of a cluster is over: the job's exit code, then ended.json. Its token goes."""
    try:
        files.write_text(cluster / EXIT_CODE_FILE, f"{exit_code}\n")
        ClusterEnd(canary, reason, unclean, lost, time.time()).write(cluster / ENDED_FILE)
    finally:
        (cluster / TOKEN_FILE).unlink(missing_ok=True)
