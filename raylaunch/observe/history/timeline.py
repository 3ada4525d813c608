"""A run's events and metrics in order: attempts, their milestones, and their steps.

    rows of events.jsonl and metrics.jsonl → read → History (attempts, each with its milestones and steps)

Pure: rows in, records out. Missing values (an old run, an incomplete line, a driver that died early)
stay None; a clock that was set back does not change the order of events.
"""

from __future__ import annotations

import bisect
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
FINAL = {"finished", "failed", "stopped"}


@dataclass(frozen=True)
class Step:
    """A line of the metrics: this step was done at that time."""

    step: int
    time: float
    world: int = 0


@dataclass
class Attempt:
    """One attempt: when it reached its milestones, in seconds since the epoch; None if it did not."""

    number: int
    run_incarnation: int
    started: float
    workers: int
    from_step: int
    nodes: tuple[str, ...] = ()
    connected: float | None = None
    built: float | None = None
    resumed: float | None = None
    first_step: float | None = None
    ended: float | None = None
    how: str = ""
    error: str = ""
    committed: int | None = None
    faults: list[Row] = field(default_factory=list)
    commits: list[Row] = field(default_factory=list)
    resize: str = ""
    asked: float | None = None
    """When it was asked to stop, to continue at another size."""
    steps: list[Step] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, int]:
        """The attempt with the highest key may commit, and its line of a step is the valid one."""
        return self.run_incarnation, self.number

    @property
    def last_sign(self) -> float:
        """Time of its last activity."""
        steps = [self.steps[-1].time] if self.steps else []
        reached = [t for t in (self.connected, self.built, self.resumed, self.first_step, self.ended) if t is not None]
        return max([self.started, *reached, *steps, *(float(f["time"]) for f in self.faults)])

    @property
    def known(self) -> float | None:
        """When its end was foreseeable: the first detected fault, a request to resize, else its end."""
        if self.how == "resized" and self.asked is not None:
            return self.asked
        return min((float(f["time"]) for f in self.faults), default=self.ended)


@dataclass(frozen=True)
class History:
    """Everything about a run, in order."""

    events: list[Row]
    attempts: list[Attempt]
    cluster: list[Row]
    stale_steps: int
    """Steps of an attempt after a newer one had started; they never count."""


def settled(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order in which they were written, with times that never decrease.

    The rows of the longest subsequence with increasing times are trusted; each of the others (a clock
    set back or ahead for a while) gets the time of the trusted row before it.
    """
    found = [dict(row) for row in rows if is_number(row.get("time"))]
    times = [float(row["time"]) for row in found]
    if all(a <= b for a, b in itertools.pairwise(times)):
        return list(found)
    believed = _longest_in_order(times)
    last = times[min(believed)]
    for index, row in enumerate(found):
        last = times[index] if index in believed else last
        row["time"] = last
    return list(found)


def _longest_in_order(times: Sequence[float]) -> set[int]:
    """Indexes of a longest non-decreasing subsequence (patience sorting)."""
    tails: list[float] = []
    at: list[int] = []
    before: list[int] = []
    for index, moment in enumerate(times):
        place = bisect.bisect_right(tails, moment)
        if place == len(tails):
            tails.append(moment)
            at.append(index)
        else:
            tails[place] = moment
            at[place] = index
        before.append(at[place - 1] if place else -1)
    kept, index = set(), at[-1]
    while index >= 0:
        kept.add(index)
        index = before[index]
    return kept


def latest(times: Sequence[float], until: float) -> float | None:
    """The last of the ordered times that is not after `until`."""
    index = bisect.bisect_right(times, until)
    return times[index - 1] if index else None


def read(events: Iterable[Row], metrics: Iterable[Row], cluster: Iterable[Row] = ()) -> History:
    """The history of a run from its rows; `cluster`: the events of the cluster that it ran on."""
    ordered = settled(row for row in events if isinstance(row.get("kind"), str))
    attempts: dict[tuple[int, int], Attempt] = {}
    newest: dict[int, Attempt] = {}
    for row in ordered:
        number = row.get("attempt")
        if not isinstance(number, int):
            continue
        if row["kind"] == "attempt_started":
            made = Attempt(
                number, _integer(row.get("run_incarnation")), row["time"], _integer(row.get("workers")),
                _integer(row.get("from_step")), tuple(map(str, on)) if isinstance(on := row.get("on"), list) else (),
            )  # fmt: skip
            attempts[made.key] = newest[number] = made
        elif number in newest:
            _note(newest[number], row)
    stale = _add_steps(attempts, newest, settled(metrics))
    in_order = sorted(attempts.values(), key=lambda a: a.key)
    return History(ordered, in_order, settled(r for r in cluster if isinstance(r.get("kind"), str)), stale)


def _note(attempt: Attempt, row: Row) -> None:
    """What an event says of its attempt."""
    match row["kind"]:
        case "workers_connected":
            attempt.connected = attempt.connected or row["time"]
        case "model_built":
            attempt.built = attempt.built or row["time"]
        case "resumed":
            attempt.resumed = attempt.resumed or row["time"]
            attempt.from_step = _integer(row.get("step"), attempt.from_step)
        case "first_step":
            attempt.first_step = attempt.first_step or row["time"]
        case "commit":
            attempt.commits.append(row)
        case "fault" | "hang":
            attempt.faults.append(row)
        case "resize_requested":
            attempt.resize, attempt.asked = str(row.get("why") or "resize"), row["time"]
        case "attempt_ended":
            attempt.ended, attempt.how = row["time"], str(row.get("how") or "")
            attempt.error = str(row.get("error") or "")
            attempt.committed = row["committed"] if isinstance(row.get("committed"), int) else None


def is_step(row: Row) -> bool:
    """Whether a line of the metrics is a training step's."""
    return "loss" in row and isinstance(row.get("step"), int) and isinstance(row.get("attempt"), int)


def _add_steps(attempts: dict[tuple[int, int], Attempt], newest: dict[int, Attempt], metrics: Sequence[Row]) -> int:
    """Give each step to its attempt; how many came from an attempt when a newer one stepped already."""
    stale, front = 0, (-1, -1)
    for row in metrics:
        if not is_step(row):
            continue
        number = row["attempt"]
        own = attempts.get((_integer(row.get("run_incarnation"), -1), number)) or newest.get(number)
        if own is None:  # its beginning was torn or is of an older version
            own = Attempt(number, 0, row["time"], _integer(row.get("world_size")), row["step"] - 1)
            attempts[own.key] = newest[number] = own
        if own.key < front:
            stale += 1
            continue
        front = own.key
        own.steps.append(Step(row["step"], float(row["time"]), _integer(row.get("world_size"))))
    return stale


def _integer(value: object, default: int = 0) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def is_number(value: object) -> bool:
    """Finite, also as a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
