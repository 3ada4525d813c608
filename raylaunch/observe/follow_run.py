"""Following a run from outside: its state, metrics and events, as they are written. Reads files only,
and asks the backend now and then whether the cluster still lives, so that nobody waits for the dead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylaunch.config import loader
from raylaunch.errors import RunError, SlurmUnavailable
from raylaunch.scheduler import backends
from raylaunch.state import event_log, files, records, runs
from raylaunch.state.event_log import EventReader
from raylaunch.state.head_state import HeadState
from raylaunch.state.records import Cluster
from raylaunch.state.runs import Run

FILES_EVERY = 0.3
CLUSTER_EVERY = 10.0


@dataclass(frozen=True)
class News:
    """What came since the last look."""

    run: Run
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    behind: tuple[str, ...] = ()
    """The runs that come first, while it is queued."""


def follow(run_dir: Path, cluster_dir: Path, from_start: bool = False) -> Iterator[News]:
    """News of a run until it is over (its weights written, too), or its cluster is. The last one has the final state."""
    metrics = files.LineReader(run_dir / files.METRICS_FILE, at_end=not from_start)
    events = EventReader(run_dir, at_end=not from_start)
    ask_again = time.monotonic() + CLUSTER_EVERY
    alive = True
    while True:
        run = Run.read(run_dir)
        if run is None:
            raise RunError(f"the run's directory {run_dir} is gone", "It was moved aside by --fresh, or deleted.")
        over = run.state in runs.FINAL and not _exports(run_dir, cluster_dir)
        if not over and time.monotonic() > ask_again:
            ask_again = time.monotonic() + CLUSTER_EVERY
            alive = _alive(cluster_dir)
        behind = _ahead_of(run.name, cluster_dir) if run.state == "queued" else ()
        yield News(run, metrics.read(), events.read(), behind)
        if over or not alive:
            return
        time.sleep(FILES_EVERY)


def _exports(run_dir: Path, cluster_dir: Path) -> bool:
    """Whether the run is finished, and its driver still writes its weights (see `consolidate`)."""
    config = loader.load_resolved(run_dir / records.CONFIG_FILE)
    if not config.checkpoint.save_consolidated:
        return False
    last = event_log.read(run_dir, "queued", *runs.FINAL, "exported", "export_failed")[-1:]
    cluster = Cluster.read(cluster_dir)
    driven = cluster is not None and HeadState.read(cluster_dir, cluster).running == run_dir.name
    return driven and [event["kind"] for event in last] in (["queued"], ["finished"])


def _ahead_of(run: str, cluster_dir: Path) -> tuple[str, ...]:
    """All that the cluster has, where its head has not yet taken the request."""
    cluster = Cluster.read(cluster_dir)
    if cluster is None:
        return ()
    memory = HeadState.read(cluster_dir, cluster)
    line = [name for name in (memory.running, *memory.queue) if name]
    return tuple(line[: line.index(run)] if run in line else line)


def _alive(cluster_dir: Path) -> bool:
    cluster = Cluster.read(cluster_dir)
    if cluster is None or (cluster_dir / records.ENDED_FILE).exists():
        return False
    try:
        return any(job.alive for job in backends.of(cluster.backend).states(cluster_dir, cluster.jobs).values())
    except SlurmUnavailable:
        return True  # the run does not need the controller
