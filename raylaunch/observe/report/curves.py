"""A run's metrics and its cluster's load in one pass each, as a bounded number of buckets on the time axis.

    metrics.jsonl → lines in groups → of each group its first line, and those with its extremes, are parsed
      → buckets (least, most, mean of each series), and a thinned run of steps for the ledger

A run of 10⁶ steps has groups of a hundred: no spike of loss or throughput is lost, memory does not grow with the run,
and a file of some ten thousand lines is read completely. Lines that are not JSON, or far too long, are skipped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylaunch.observe.history.timeline import is_step
from raylaunch.observe.report.axis import WIDTH, Axis

BUCKETS = 400
GROUPS = 12000
"""Approximate maximum number of groups of lines."""
CHUNK = 4 << 20
LONGEST = 1 << 16
"""Bytes of a line."""
RATES = ("tokens_per_s", "samples_per_s")
LOADS = ("cpu", "memory", "gpu", "gpu_memory", "watts", "temperature", "nodes")
LOAD_GAP = 90.0
"""Maximum seconds that one line of the load covers."""
_LOSS_KEY, _RATE_KEYS = b'"loss": ', [f'"{name}": '.encode() for name in RATES]
_decode = json.JSONDecoder().decode


@dataclass
class Bucket:
    """The values in one bucket of one series."""

    x: float
    """Of the first, in the units of the axis."""
    time: float
    attempt: int
    last: float
    low: float
    high: float
    count: int = 1
    total: float = 0.0
    inverse: float = 0.0
    """The sum of the reciprocals."""
    step: int = 0
    """The last one's."""

    @property
    def mean(self) -> float:
        return self.total / self.count


@dataclass
class Series:
    """A series in buckets, in order of time."""

    buckets: dict[int, Bucket] = field(default_factory=dict)

    def add(
        self, x: float, time: float, value: float, attempt: int = 0, step: int = 0, is_extreme: bool = False
    ) -> None:
        """`is_extreme`: selected as an extreme value, and therefore not part of the mean."""
        key = int(x * BUCKETS / WIDTH)
        inverse = 1 / value if value > 0 else 0.0
        one = self.buckets.get(key)
        if one is None:
            self.buckets[key] = Bucket(x, time, attempt, value, value, value, total=value, inverse=inverse, step=step)
            return
        if not is_extreme:
            one.count += 1
            one.total += value
            one.inverse += inverse
            one.last, one.step, one.attempt = value, step, attempt
        one.low, one.high = min(one.low, value), max(one.high, value)

    def in_order(self) -> list[Bucket]:
        return [self.buckets[key] for key in sorted(self.buckets)]

    @property
    def mean(self) -> float | None:
        """Of all added values."""
        count = sum(b.count for b in self.buckets.values())
        return sum(b.total for b in self.buckets.values()) / count if count else None

    @property
    def mean_rate(self) -> float | None:
        """For rates of equal steps: the total amount divided by the total time (the harmonic mean)."""
        count, inverse = (sum(getattr(b, name) for b in self.buckets.values()) for name in ("count", "inverse"))
        return count / inverse if inverse else None

    @property
    def most(self) -> float | None:
        return max((b.high for b in self.buckets.values()), default=None)


@dataclass
class Curves:
    """The contents of the metrics."""

    series: dict[str, Series] = field(default_factory=dict)
    """By the name of the metric: loss, val_loss, tokens_per_s, samples_per_s."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Lines of steps for the ledger; of a long run, a sample."""
    last: dict[str, Any] = field(default_factory=dict)
    """The last step's line."""
    last_val: float | None = None
    lines: int = 0
    nonfinite: int = 0
    """Steps whose loss was NaN or infinite."""


def metrics(path: Path, axis: Axis, buckets_of: tuple[str, ...] = ("loss", "val_loss", *RATES)) -> Curves:
    """Read metrics.jsonl; empty if there is none."""
    found = Curves({name: Series() for name in buckets_of})
    stride = max(1, _lines_about(path) // GROUPS)
    group: list[bytes] = []
    before = b""
    attempt = b""
    for line in lines(path):
        found.lines += 1
        now = _raw(line, b'"attempt": ')
        if stride == 1 or now != attempt:
            _take(found, axis, group)
            group = []
            if now != attempt and before:
                _take(found, axis, [before], again=True)  # the last of the attempt before this one
            attempt = now
        group.append(line)
        before = line
        if len(group) >= stride:
            _take(found, axis, group)
            group = []
    _take(found, axis, group)
    if before and stride > 1:
        _take(found, axis, [before], again=True)
    return found


def _take(found: Curves, axis: Axis, group: list[bytes], again: bool = False) -> None:
    """One group of lines. `again`: it was already read as part of a group, and is needed completely."""
    for line in group if len(group) < 3 else _telling(group):
        row = parse(line)
        if row is not None:
            plain = line is group[0] or len(group) < 3 or not is_step(row)
            _add(found, axis, row, is_extreme=not plain, again=again)


def _telling(group: list[bytes]) -> list[bytes]:
    """The first line, those with the extremes of loss and rate, and those that are not a step's; in order."""
    chosen = {0: group[0]}
    rates = [key for key in _RATE_KEYS if key in group[0] or key in group[-1]]
    for key in (_LOSS_KEY, *rates):
        low = high = 0
        least, most = math.inf, -math.inf
        for index, line in enumerate(group):
            at = line.find(key)
            if at < 0:
                if key == _LOSS_KEY:
                    chosen[index] = line
                continue
            try:
                value = float(line[at + len(key) : line.index(b",", at)])
            except ValueError:  # not a plain number, or the last of its line
                chosen[index] = line
                continue
            if value < least:
                low, least = index, value
            if value > most:
                high, most = index, value
        chosen[low], chosen[high] = group[low], group[high]
    return [chosen[index] for index in sorted(chosen)]


def _add(found: Curves, axis: Axis, row: dict[str, Any], is_extreme: bool, again: bool) -> None:
    time = row.get("time")
    if not isinstance(time, (int, float)) or not axis.intervals[0][0] - 1 <= time <= axis.intervals[-1][1] + 1:
        return
    attempt, step = row.get("attempt"), row.get("step")
    if not (isinstance(attempt, int) and isinstance(step, int)):
        return
    if is_step(row):
        if not is_extreme and (not again or not found.steps or found.steps[-1]["time"] != time):
            keys = ("step", "time", "loss", "attempt", "run_incarnation", "world_size")
            found.steps.append({key: row[key] for key in keys if key in row})
        found.last = row
        found.nonfinite += not again and number(row["loss"]) is None
    if again:
        return
    x = axis.x(time)
    for name, series in found.series.items():
        value = number(row.get(name))
        if value is not None:
            series.add(x, time, value, attempt, step, is_extreme)
            if name == "val_loss":
                found.last_val = value


def load(path: Path, axis: Axis, into: dict[str, Series]) -> float:
    """Add the lines of a cluster's load.jsonl within the run's time; returns the joules that its meters measured."""
    joules, before = 0.0, math.inf
    for line in lines(path):
        row = parse(line)
        time = number(row.get("time")) if row is not None else None
        if row is None or time is None or not any(low <= time <= high for low, high in axis.intervals):
            continue
        x = axis.x(time)
        for name in LOADS:
            value = number(row.get(name))
            if value is not None:
                into.setdefault(name, Series()).add(x, time, value)
        joules += max(0.0, number(row.get("watts")) or 0.0) * min(max(0.0, time - before), LOAD_GAP)
        before = time
    return joules


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def parse(line: bytes) -> dict[str, Any] | None:
    """A line as an object, or None."""
    try:
        row = _decode(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def lines(path: Path) -> Iterator[bytes]:
    """The complete lines of a file, read in chunks of bounded size; none if it cannot be read."""
    try:
        source = path.open("rb")
    except OSError:
        return
    with source:
        rest = b""
        while chunk := _read(source.read):
            parts = (rest + chunk).split(b"\n")
            rest = parts.pop()[-LONGEST:]
            for line in parts:
                if line and len(line) <= LONGEST:
                    yield line


def _read(read: Callable[[int], bytes]) -> bytes:
    try:
        return read(CHUNK)
    except OSError:  # a stale handle, a directory
        return b""


def _lines_about(path: Path) -> int:
    """The approximate number of lines, from the length of the first ones."""
    try:
        with path.open("rb") as source:
            head = source.read(LONGEST)
            size = os.fstat(source.fileno()).st_size
    except OSError:
        return 0
    count = head.count(b"\n")
    return int(size * count / max(1, len(head)))


def _raw(line: bytes, key: bytes) -> bytes:
    """The text behind a key, or nothing."""
    at = line.find(key)
    return line[at + len(key) : line.find(b",", at)] if at >= 0 else b""
