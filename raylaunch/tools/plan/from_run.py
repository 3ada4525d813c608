"""Measurements of an earlier run for planning the next one: throughput, start-up time, save time.

    a run directory → Measured (per worker and operation) → the throughput of another plan

A run without steps is rejected.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import RunError, UsageError
from raylaunch.observe.history import timeline
from raylaunch.observe.history.goodput import read_pieces
from raylaunch.scheduler.slurm import batch_script
from raylaunch.state import event_log, files, records
from raylaunch.tools.plan import checkpoint_size, model_shape, sharding, throughput
from raylaunch.tools.plan.model_shape import Shape
from raylaunch.tools.plan.sharding import PlannedWorld
from raylaunch.tools.plan.throughput import Throughput

MOST_ROWS = 200
"""Rows from the end of the metrics; their median is the throughput."""


@dataclass(frozen=True)
class Measured:
    """`flops`: operations per second and worker, including recomputation and pipeline bubbles; None for an unknown
    model. `start`: seconds of the first attempt to its first step; `bandwidth`: bytes per second of saves, None if
    there were none."""

    run: str
    tokens_per_s: float
    workers: int
    flops: float | None
    start: dict[str, float]
    bandwidth: float | None

    def pace(self, config: Config, own: Shape | None, where: PlannedWorld) -> Throughput:
        """Throughput of another plan on the same hardware, assuming perfect scaling."""
        how = f"measured: {self.tokens_per_s:,.0f} tokens/s with {self.workers} workers in run {self.run}"
        if self.flops is None or own is None:
            found = self.tokens_per_s * where.world / self.workers
        else:
            found = self.flops * where.world / throughput.work(config, own, where)
        same = abs(found / self.tokens_per_s - 1) < 1e-3
        return Throughput(found, how if same else f"{how}, scaled by workers and operations", False, self.start)


def read(run_dir: Path) -> Measured:
    """RunError if the run has no measurements."""
    name = run_dir.name
    if not (run_dir / records.CONFIG_FILE).is_file():
        raise RunError(f"--like {name}: no such run in {run_dir.parent}", "See `raylaunch status --all`.")
    config = loader.load_resolved(run_dir / records.CONFIG_FILE)
    rows = _dicts(read_pieces(run_dir / files.METRICS_FILE, []))
    events = _dicts(event_log.read_all(run_dir))
    found = [(row["tokens_per_s"], row["world_size"]) for row in rows if _is_pace(row)][-MOST_ROWS:]
    if not found:
        raise RunError(
            f"--like {name}: the run has no step with tokens_per_s",
            "Use a run that trained, or set --tokens-per-second.",
        )
    workers = found[-1][1]
    tokens_per_s = statistics.median(rate for rate, world in found if world == workers)
    flops = bandwidth = None
    with contextlib.suppress(RunError, UsageError):  # a custom model
        own = model_shape.of(config)
        per_node = math.gcd(workers, batch_script.workers_per_node(config.slurm))
        where = sharding.place(config, workers // per_node, per_node)
        flops = tokens_per_s * throughput.work(config, own, where) / workers
        bandwidth = _bandwidth(events, checkpoint_size.size(config, own))
    return Measured(name, tokens_per_s, workers, flops, _start(events), bandwidth)


def _dicts(rows: Iterable[Any]) -> list[dict[str, Any]]:
    """The dictionaries; a damaged file may contain other values."""
    return [row for row in rows if isinstance(row, dict)]


def _is_pace(row: dict[str, Any]) -> bool:
    world = row.get("world_size")
    return _is_positive(row.get("tokens_per_s")) and type(world) is int and world > 0


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _start(events: list[dict[str, Any]]) -> dict[str, float]:
    """Start-up seconds of the first attempt that started at step 0 and made a step, by part."""
    for attempt in timeline.read(events, []).attempts:
        if attempt.first_step is None or attempt.from_step:
            continue
        marks = {"workers": attempt.connected, "model": attempt.built, "step": attempt.first_step}
        seconds, last = {}, attempt.started
        for name, moment in marks.items():
            if moment is not None:
                seconds[name], last = max(0.0, moment - last), moment
        return seconds
    return {}


def _bandwidth(events: list[dict[str, Any]], size: int) -> float | None:
    took = [row["seconds"] for row in events if row.get("kind") == "commit" and _is_positive(row.get("seconds"))]
    return size / statistics.median(took) if took else None
