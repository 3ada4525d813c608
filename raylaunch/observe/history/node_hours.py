"""Which nodes were held how long, from a cluster's events; and a run's own time, from the run's. Pure.

    node_joined … node_lost | node_ended | node_failed | the end of the allocation  → holds (node, from, to)
    queued … finished | failed | stopped                                            → active (from, to)

Node-hours of a run are the holds that fall into its active time. What is approximate: a node counts from its agent's
first word to its last, while Slurm counts from the start of the job and holds a dead node until it has noticed; a head
that dies counts until its successor misses it (20 s); and between two runs of one cluster nobody is charged. A
cluster that was killed with no last word counts up to its last event, or to when it was known to be gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from raylaunch.observe.history.timeline import FINAL, Attempt, Row

Interval = tuple[float, float]
_OVER = {"ended", "cluster_down", "requeued", "successor"}
"""Events of a cluster behind which nothing is held any more, until nodes join again."""
_GONE = {"node_lost", "node_ended", "node_failed"}


@dataclass(frozen=True)
class NodeUse:
    """A node that was held. Seconds since the epoch."""

    node: str
    start: float
    end: float


@dataclass
class Life:
    """What one `up` or `submit` began: from its submission to its end, with the jobs it had."""

    began: float
    jobs: list[str] = field(default_factory=list)
    ended: float | None = None
    """None: no last word (it goes on, or was killed)."""
    reason: str = ""
    last: float = 0.0
    """Its last event."""
    nodes: int = 0
    """The most that it held at once."""


def active(events: Sequence[Row], until: float) -> list[Interval]:
    """The time in which a run was somebody's business: from each hand-over to the end that followed. `until`: the last
    sign of it, for an interval that has no end. `events` in order of time."""
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
    """A cluster's lives, and the nodes held in them; `until`: the last that is known of a life without a last word, when
    that is later than its own events. `events` in order of time."""
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
    """Each with its time; of one whose end nobody wrote down, up to the last sign of it, and of the last one up to
    `until`."""
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
    """Workers times seconds of the attempts on nodes with GPUs: a worker has one. An attempt on a node that is not known
    counts like the known ones."""
    most = max(gpus.values(), default=0)
    return sum(
        a.workers * (end - start)
        for a, (start, end) in spans(attempts, until)
        if any(gpus.get(node, most) for node in a.nodes or ("",))
    )
