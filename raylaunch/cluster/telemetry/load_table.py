"""The loads of all nodes, as the head has them: the last one of each, a short history of each, their mean.

Pure: loads and a clock in, rows out. A node's history has at most POINTS points: when it is full, neighbours are
merged, so that ten days take no more room than ten minutes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from raylaunch.checkpoint.events import Event
from raylaunch.state.node_events import GpuTrouble, OomKill
from raylaunch.timing import GONE_AFTER

POINTS = 64
FIRST_PERIOD = 30.0
"""Seconds of a point, before any were merged."""
MEASURES = ("cpu", "memory", "gpu", "gpu_memory")


@dataclass
class LoadSeries:
    """Means over equal periods, the first of which begins at `start`. A point: MEASURES, None where unknown."""

    start: float
    period: float = FIRST_PERIOD
    points: list[list[float | None]] = field(default_factory=list)
    _open: list[list[float | None]] = field(default_factory=list)

    def add(self, now: float, values: list[float | None]) -> None:
        """One more measurement; time only grows."""
        while now >= self.start + (len(self.points) + 1) * self.period:
            self.points.append(_means(self._open))
            self._open = []
            if len(self.points) == POINTS:
                self.points = [_means(self.points[i : i + 2]) for i in range(0, POINTS, 2)]
                self.period *= 2
        self._open.append(values)

    def as_dict(self) -> dict[str, Any]:
        return {"start": round(self.start, 1), "period": self.period, "points": self.points}


class LoadTable:
    """What the head knows of its nodes' load."""

    def __init__(self) -> None:
        self.latest: dict[str, dict[str, Any]] = {}
        """Node → its figures, flat, with "time"."""
        self._series: dict[str, LoadSeries] = {}

    def take(self, node: str, load: dict[str, Any], now: float) -> list[Event]:
        """A node's new load; what of it is news, as events: by the kernel's word where there is one, else by counts."""
        before, figures = self.latest.get(node), flat(load)
        kernel = list(_of_kernel(node, load.get("kernel", ())))
        self.latest[node] = {"time": round(now, 1), **figures}
        self._series.setdefault(node, LoadSeries(now)).add(now, [figures.get(name) for name in MEASURES])
        return kernel + [e for e in _news(node, before or {}, figures) if type(e) not in {type(k) for k in kernel}]

    def keep(self, nodes: Iterable[str]) -> None:
        """Forget all others."""
        for table in (self.latest, self._series):
            for node in table.keys() - set(nodes):
                del table[node]

    def row(self, now: float) -> dict[str, Any]:
        """All nodes in one line: means; the sum of the watts; the hottest GPU; and which node is furthest behind."""
        fresh = {node: row for node, row in self.latest.items() if now - row["time"] < GONE_AFTER}
        found: dict[str, Any] = {"time": round(now, 1), "nodes": len(fresh)}
        for name in MEASURES:
            known = {node: row[name] for node, row in fresh.items() if name in row}
            if known:
                found[name] = round(sum(known.values()) / len(known), 3)
        for name, whole in (("watts", sum), ("temperature", max)):
            figures = [row[name] for row in fresh.values() if name in row]
            if figures:
                found[name] = whole(figures)
        busy = {node: row["gpu"] for node, row in fresh.items() if "gpu" in row}
        if len(busy) > 1:
            found["least"] = min(busy, key=lambda node: busy[node])
        return found

    def inherit(self, histories: dict[str, Any]) -> None:
        """What the head before this one wrote of `histories`."""
        for node, value in histories.items():
            self._series[node] = LoadSeries(value["start"], value["period"], list(value["points"]))

    def histories(self) -> dict[str, Any]:
        """Node → its series."""
        return {node: series.as_dict() for node, series in self._series.items()}


def flat(load: dict[str, Any]) -> dict[str, Any]:
    """A node's load with its GPUs in one: means, the sum of the watts, the hottest, all that throttles. What should be a
    number and is none (the node may have another version) is left out."""
    gpus: list[dict[str, Any]] = load.get("gpus") or []
    found = {k: v for k, v in load.items() if k not in {"gpus", "kernel"} and _is_number(v)}
    if gpus:
        found["gpus"] = len(gpus)
    for name, key in (("gpu", "util"), ("gpu_memory", "memory")):
        figures = [gpu[key] for gpu in gpus if _is_number(gpu.get(key))]
        if figures:
            found[name] = round(sum(figures) / len(figures), 3)
    for key, whole in (("watts", sum), ("temperature", max), ("ecc_errors", sum)):
        figures = [gpu[key] for gpu in gpus if _is_number(gpu.get(key))]
        if figures:
            found[key] = whole(figures)
    throttled = [f"GPU {i}: {gpu['throttled']}" for i, gpu in enumerate(gpus) if gpu.get("throttled")]
    return {**found, "throttled": "; ".join(throttled)} if throttled else found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _of_kernel(node: str, rows: Iterable[dict[str, Any]]) -> Iterable[Event]:
    """What the node's agent found in the kernel's log (see `kernel`); of other kinds, nothing."""
    for row in rows:
        if row["kind"] == OomKill.kind:
            yield OomKill(node, row.get("pid"), row.get("task"))
        elif row["kind"] == GpuTrouble.kind:
            yield GpuTrouble(node, row["what"])


def _news(node: str, before: dict[str, Any], now: dict[str, Any]) -> Iterable[Event]:
    """Trouble that was not there a sample ago. (Counts of a node's first sample are not news.)"""
    if before and now.get("oom_kills", 0) > before.get("oom_kills", 0):
        yield OomKill(node, count=now["oom_kills"] - before.get("oom_kills", 0))
    if before and now.get("ecc_errors", 0) > before.get("ecc_errors", 0):
        yield GpuTrouble(node, f"{now['ecc_errors']} uncorrected ECC errors")
    if now.get("throttled", "") != before.get("throttled", "") and "throttled" in now:
        yield GpuTrouble(node, f"throttled: {now['throttled']}")


def _means(rows: list[list[float | None]]) -> list[float | None]:
    """Column by column, over the rows that have a value."""
    found: list[float | None] = []
    for index in range(len(MEASURES)):
        known = [row[index] for row in rows if row[index] is not None]
        found.append(round(sum(known) / len(known), 3) if known else None)  # type: ignore[arg-type]
    return found
