"""How long nodes were held, from a cluster's events; and the active time of a run, from the run's. Pure.

    node_joined … node_lost | node_ended | node_failed | the end of the allocation  → holds (node, from, to)
    queued … finished | failed | stopped                                            → active (from, to)

The node-hours of a run are the holds within its active time. They are approximate: a node counts from the first to the
last message of its agent, while Slurm counts from the start of the job, and a dead node until Slurm detects it; a head
that dies counts until its successor detects this (20 s); and the time between two runs of a cluster is not charged. A
cluster that was killed without recording its end counts up to its last event, or until it was known to be gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from raylaunch.observe.history.timeline import FINAL, Attempt, Row

Interval = tuple[float, float]
_OVER = {"ended", "cluster_down", "requeued", "successor"}
"""Cluster events after which no node is held, until nodes join again."""
_GONE = {"node_lost", "node_ended", "node_failed"}


@dataclass(frozen=True)
class NodeUse:
    """A node that was held. Seconds since the epoch."""

    node: str
    start: float
    end: float


@dataclass
class Life:
    """A cluster from one `up` or `submit` to its end, with its jobs."""

    began: float
    jobs: list[str] = field(default_factory=list)
    ended: float | None = None
    """None: no recorded end (it is running, or was killed)."""
    reason: str = ""
    last: float = 0.0
    """Its last event."""
    nodes: int = 0
    """The maximum held at once."""


def active(events: Sequence[Row], until: float) -> list[Interval]:
    """The active time of a run: from each submission to the next end. `until`: its last activity, if an end is
    missing. `events` in order of time."""
    found: list[Interval] = []
    start: float | None = None
    for row in events:
        if row["kind"] in FINAL:
            if start is not None:
                found.append((start, row["time"]))
            start = None
        elif start is None and (row["kind"] in {"queued", "attempt_started"}):
            start = row["time"]
    if start is not None:
        found.append((start, max(start, until)))
    return found


def lives(events: Iterable[Row], until: float) -> tuple[list[Life], list[NodeUse]]:
    """A cluster's lives, and the nodes held in them. `until`: the last activity of a life without a recorded end, if
    later than its events. `events` in order of time."""
    found: list[Life] = []
    holds: list[NodeUse] = []
    held: dict[str, float] = {}
    last = 0.0

    def close(node: str, moment: float) -> None:
        holds.append(NodeUse(node, held[node], max(held[node], moment)))
        del held[node]

    for row in events:
        kind, now, node = row["kind"], row["time"], str(row.get("node") or "")
        if kind == "submitted" or not found:  # a life with no last word ended with its last one
            for name in list(held):
                close(name, max(last, min(until, now)))
            found.append(Life(now))
        life = found[-1]
        if kind in {"submitted", "successor", "joiner_submitted", "joiner_adopted"} and row.get("job"):
            life.jobs.append(str(row["job"]))
        if kind == "node_joined":
            held.setdefault(node, now)
            life.nodes = max(life.nodes, len(held))
        elif kind in _GONE and node in held:
            close(node, now)
        elif kind in _OVER:
            for name in list(held):
                close(name, now)
        if kind in {"ended", "cluster_down"} and life.ended is None:
            life.ended, life.reason = now, str(row.get("reason") or "")
        life.last = last = now
    for name in list(held):
        close(name, max(last, until))
    return found, holds


def overlap(start: float, end: float, intervals: Sequence[Interval]) -> float:
    """Seconds of [start, end] that fall into the intervals."""
    return sum(max(0.0, min(end, high) - max(start, low)) for low, high in intervals)


def node_seconds(holds: Iterable[NodeUse], intervals: Sequence[Interval] | None = None) -> dict[str, float]:
    """Node → seconds held, within the intervals (None: all)."""
    whole = [(-math.inf, math.inf)] if intervals is None else intervals
    found: dict[str, float] = {}
    for hold in holds:
        found[hold.node] = found.get(hold.node, 0.0) + overlap(hold.start, hold.end, whole)
    return {node: seconds for node, seconds in found.items() if seconds > 0}


def spans(attempts: Sequence[Attempt], until: float) -> list[tuple[Attempt, Interval]]:
    """Each attempt with its time; one without a recorded end lasts up to its last activity, or to
    `until` if it is the last one."""
    return [
        (
            a,
            (
                a.started,
                max(a.started, a.ended if a.ended is not None else until if a is attempts[-1] else a.last_sign),
            ),
        )
        for a in attempts
    ]


def gpu_seconds(attempts: Sequence[Attempt], gpus: Mapping[str, int], until: float) -> float:
    """Workers times seconds of the attempts on nodes with GPUs (one GPU per worker). An attempt on an unknown node
    counts like the known ones."""
    most = max(gpus.values(), default=0)
    return sum(
        a.workers * (end - start)
        for a, (start, end) in spans(attempts, until)
        if any(gpus.get(node, most) for node in a.nodes or ("",))
    )
