"""The data of the live view, from the files of a cluster and its run, and from the backend at intervals.

A reader keeps state: it reads a sample of a long run once, then only new lines. If a file cannot be read, its part of
the picture does not change.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raylaunch.cluster import up
from raylaunch.cluster.node_loop import submitter
from raylaunch.cluster.telemetry import collect
from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import UsageError
from raylaunch.host.internal_errors import InternalErrors
from raylaunch.observe.history import goodput
from raylaunch.observe.history.safe_read import sound
from raylaunch.observe.history.timeline import is_step
from raylaunch.scheduler import backends
from raylaunch.scheduler.backends import Job
from raylaunch.state import files, members, records, runs
from raylaunch.state.event_log import EventReader
from raylaunch.state.head_state import HeadState
from raylaunch.state.members import NOBODY
from raylaunch.state.records import Cluster, ClusterEnd
from raylaunch.state.runs import Run

POINTS = 512
"""Points of a curve; more are sampled."""
EVENTS, EVENTS_BYTES = 200, 256 << 10
JOBS_EVERY, LEDGER_EVERY = 20.0, 30.0
WHOLE = 1 << 20
"""Bytes of metrics up to which a file is read completely at first."""
TAIL = 16 << 10
_HIDDEN = {"time", "kind", "incarnation", "run_incarnation"}


@dataclass(frozen=True)
class Point:
    """A step on the curves."""

    time: float
    step: int
    loss: float
    rate: float
    """Tokens (or samples) per second."""
    workers: int


@dataclass(frozen=True)
class Picture:
    """The complete state at one moment."""

    time: float
    cluster: str
    state: str = ""
    """Of the cluster: its ready nodes, or its end."""
    wanted: int = 0
    jobs: tuple[Job, ...] = ()
    nodes: tuple[dict[str, Any], ...] = ()
    """Rows of members.json with the node's load and its strikes."""
    cannot_submit: str = ""
    internal_errors: Mapping[str, str] = field(default_factory=dict)
    """Bugs of raylaunch, in the head or here."""
    run: Run | None = None
    max_steps: int = 0
    next_save: int = 0
    """The step of the next checkpoint."""
    unit: str = "tokens"
    """Unit of the rate: samples, if a custom training loop reports them."""
    points: tuple[Point, ...] = ()
    step_seconds: float = 0.0
    """Median of the last steps."""
    ledger: dict[str, Any] = field(default_factory=dict)
    events: tuple[tuple[float, str, str], ...] = ()
    """(time, kind, text), the newest last."""


def find(state_dir: Path, name: str | None) -> tuple[Path, Path | None]:
    """The directories of the cluster, and of the run if one is named: a cluster's name or a run's; without one, the
    only cluster that has not ended."""
    if name is None:
        living = [n for n in up.names(state_dir) if not _has_ended(files.cluster_dir(state_dir, n))]
        if len(living) != 1:
            found = f"{len(living)} clusters are running: {', '.join(living)}" if living else "no cluster is running"
            raise UsageError(found, "Specify one." if living else "Start one with `raylaunch up`.")
        name = living[0]
    run_dir = files.run_dir(state_dir, name)
    record = Run.read(run_dir)
    if record is not None:
        return files.cluster_dir(state_dir, record.cluster), run_dir
    return up.find(state_dir, name)[0], None


def _has_ended(directory: Path) -> bool:
    return (directory / records.ENDED_FILE).exists()


class SnapshotReader:
    """Reads the state of one cluster, and of its current run or a given one."""

    def __init__(self, cluster_dir: Path, run_dir: Path | None) -> None:
        self.cluster_dir, self._named = cluster_dir, run_dir
        self._picture = Picture(0.0, cluster_dir.name)
        self._of_run = _RunReader(run_dir) if run_dir is not None else None
        self._events = _Events(cluster_dir)
        self._errors = InternalErrors(lambda *_: None)
        self._jobs_at, self._is_gone = -JOBS_EVERY, False

    def read(self) -> Picture:
        """The current state."""
        changes: dict[str, Any] = {"time": time.time()}
        for part in (self._jobs, self._cluster, self._run, self._all_events):
            with self._errors.caught(part.__name__.strip("_")):
                changes |= part()
        changes["internal_errors"] = {**changes.get("internal_errors", {}), **self._errors.present}
        self._picture = replace(self._picture, **changes)
        return self._picture

    def tails(self, lines: int) -> list[tuple[str, list[str]]]:
        """The ends of the logs of rank 0 and of the driver."""
        run = self._of_run
        if run is None:
            return []
        attempt = self._picture.run.attempt if self._picture.run else 0
        paths = [files.attempt_dir(run.directory, attempt) / "rank-0.log", run.directory / records.LOGS / "driver.log"]
        return [(f"{path.parent.name}/{path.name}", _tail(path, lines)) for path in paths if path.exists()]

    def _cluster(self) -> dict[str, Any]:
        record = Cluster.read(self.cluster_dir)
        if record is None:
            return {"state": "gone"}
        memory = HeadState.read(self.cluster_dir, record)
        end = ClusterEnd.read(self.cluster_dir)
        table = NOBODY if end or self._is_gone else members.living(self.cluster_dir, record)
        known = collect.latest(self.cluster_dir, record.canary)
        nodes = tuple(
            {**row.model_dump(), "load": known.get(row.name, {}), "strikes": memory.strikes.get(row.name, 0)}
            for row in table.nodes
        )
        ready = sum(row.state == "ready" for row in table.nodes)
        words = f"{ready} of {memory.wanted or len(nodes)} nodes ready"
        if end or self._is_gone:
            words = f"down: {end.reason}" if end else "interrupted: its job is gone"
        name = memory.running
        if self._named is None and name and (self._of_run is None or self._of_run.directory.name != name):
            self._of_run = _RunReader(runs.directory(self.cluster_dir, name))
        refused = submitter.head_refusal(self.cluster_dir, record)
        return {
            "cluster": record.name,
            "state": words,
            "wanted": memory.wanted,
            "nodes": nodes,
            "cannot_submit": refused,
            "internal_errors": table.internal_errors,
        }

    def _run(self) -> dict[str, Any]:
        return {} if self._of_run is None else self._of_run.read()

    def _jobs(self) -> dict[str, Any]:
        now = time.monotonic()
        record = Cluster.read(self.cluster_dir)
        if record is None or now - self._jobs_at < JOBS_EVERY:
            return {}
        self._jobs_at = now
        found = backends.of(record.backend).states(self.cluster_dir, record.jobs)
        self._is_gone = not any(job.alive for job in found.values())
        return {"jobs": tuple(job for job in found.values() if job.alive)}

    def _all_events(self) -> dict[str, Any]:
        rows = list(self._events.read())
        if self._of_run is not None:
            rows += self._of_run.events.read()
        return {"events": tuple(sorted(rows)[-EVENTS:])}


class _RunReader:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.events = _Events(directory)
        self._config: Config | None = None
        path = directory / files.METRICS_FILE
        rows = list(_thinly(path))
        self._samples = any("samples_per_s" in row for row in rows[-1:])
        self._points = [point for row in rows if (point := _point(row)) is not None]
        self._metrics = files.LineReader(path, at_end=True)
        self._recent: deque[Point] = deque(self._points[-16:], 64)
        self._ledger_at = -LEDGER_EVERY
        self._ledger: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        run = Run.read(self.directory)
        self._config = self._config or loader.load_resolved(self.directory / records.CONFIG_FILE)
        for row in self._metrics.read():
            self._samples = self._samples or "samples_per_s" in row
            if (point := _point(row)) is not None:
                self._points.append(point)
                self._recent.append(point)
        if len(self._points) > 2 * POINTS:  # every other one of the older half
            half = len(self._points) // 2
            self._points = [*self._points[:half:2], *self._points[half:]]
        if time.monotonic() - self._ledger_at > LEDGER_EVERY:
            self._ledger_at, self._ledger = time.monotonic(), goodput.summary(self.directory)
        steps = self._config.step_scheduler
        last = self._points[-1].step if self._points else 0
        every = steps.ckpt_every_steps
        pairs = zip(self._recent, list(self._recent)[1:], strict=False)
        paces = [(b.time - a.time) / (b.step - a.step) for a, b in pairs if b.step > a.step]
        return {
            "run": run, "max_steps": steps.max_steps, "next_save": min(steps.max_steps, (last // every + 1) * every),
            "unit": "samples" if self._samples else "tokens", "points": tuple(self._points), "step_seconds": statistics.median(paces) if paces else 0.0,
            "ledger": self._ledger,
        }  # fmt: skip


class _Events:
    """The last events of a directory, as text."""

    def __init__(self, directory: Path) -> None:
        self._reader = EventReader(directory, last=EVENTS_BYTES)
        self._rows: deque[tuple[float, str, str]] = deque(maxlen=EVENTS)

    def read(self) -> Iterator[tuple[float, str, str]]:
        for line in self._reader.read():
            if (row := sound(line)) is not None:
                self._rows.append((float(row["time"]), str(row["kind"]), _words(row)))
        yield from self._rows


def _words(row: dict[str, Any]) -> str:
    told = {k: v for k, v in row.items() if k not in _HIDDEN and v not in ("", None, [], {})}
    return " ".join(f"{key}={_said(value)}" for key, value in told.items())[:300]


def _said(value: Any) -> str:
    """The value as plain text, without the quotes and brackets of Python."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_said(one)}" for key, one in value.items()) + ")"
    if isinstance(value, list):
        return ",".join(_said(one) for one in value)
    return " ".join(str(value).split())


def _point(row: dict[str, Any]) -> Point | None:
    if not is_step(row):
        return None
    try:
        return Point(
            float(row["time"]), row["step"], float(row["loss"]), float(row.get("tokens_per_s") or row.get("samples_per_s") or 0.0),
            int(row.get("world_size") or 0),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return None


def _thinly(path: Path) -> Iterator[dict[str, Any]]:
    """About POINTS rows of a file of lines, evenly over its bytes; all of a small one."""
    try:
        size = path.stat().st_size
    except OSError:
        return
    if size <= WHOLE:
        yield from files.read_lines(path)
        return
    with path.open("rb") as source:
        for index in range(POINTS):
            source.seek(size * index // POINTS)
            source.readline()
            with contextlib.suppress(ValueError):
                row = json.loads(source.readline())
                if isinstance(row, dict):
                    yield row
        if last := runs.last_metrics(path.parent):
            yield last


def _tail(path: Path, lines: int) -> list[str]:
    with path.open("rb") as source:
        source.seek(max(0, os.fstat(source.fileno()).st_size - TAIL))
        return source.read().decode(errors="replace").splitlines()[-lines:]
