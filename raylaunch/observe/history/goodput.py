"""How a run spent its time: its recoveries phase by phase, and its goodput.

    history → stretches of time, each with a label → parts, goodput
            → recoveries

Goodput is productive time over wall time: the time of the steps that were not repeated, divided by
the time from the submission to now, without the time between a run's end and its continuation. The
parts add up to the wall time, and the phases of a recovery to its total, also if events are missing: a
phase whose event is missing is part of the next one. Pure, except `summary` and `of_run`, which read.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raylaunch.observe.history.recoveries import Recovery, recoveries
from raylaunch.observe.history.timeline import FINAL, Attempt, History, Row, Step, is_number, is_step, latest, read
from raylaunch.state import event_log, files
from raylaunch.state.runs import Run

PARTS = ("queue", "bring_up", "connect", "build", "restore", "first_step", "productive", "redone", "checkpoint",
         "detect", "stop", "decide", "holding")  # fmt: skip
WHOLE = 4 << 20
"""Bytes of metrics up to which `summary` reads the whole file; it reads parts of a larger one."""
PIECE, LOOK = 16 << 10, 2 << 10
"""Bytes read around a moment, and to find it."""
TURNS, LAST_TURNS = frozenset({"attempt_started", "attempt_ended", "first_step", "fault"}), 100
"""The metrics are needed around these events; for a large file, around the last LAST_TURNS of them."""
OF_CLUSTER = ("head_started", "driver_lost", "election")
"""The cluster events that affect the time of a run."""


@dataclass(frozen=True)
class Stretch:
    """A stretch of time with a label of PARTS, or "idle"."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Ledger:
    """A run's time by part."""

    wall: float
    parts: dict[str, float]
    recoveries: list[Recovery]
    steps: int
    """The highest step reached."""
    attempts: int
    saves: int
    save_stall: float
    """Mean seconds that a save delayed the steps."""
    interval: float
    """Mean productive seconds between two saves; 0 before the second."""
    step_seconds: float
    """Median of a step."""

    @property
    def goodput(self) -> float:
        return self.parts["productive"] / self.wall if self.wall > 0 else 0.0

    @property
    def steps_lost(self) -> int:
        return sum(r.steps_lost for r in self.recoveries)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "goodput": self.goodput, "steps_lost": self.steps_lost}


def compute(history: History, until: float | None = None, window: tuple[float, float] | None = None) -> Ledger:
    """The ledger of a run. `until`: now, if it is still running; `window`: count this time only."""
    low, high = window or (-math.inf, math.inf)
    parts = dict.fromkeys(PARTS, 0.0)
    wall = 0.0
    for stretch in stretches(history, until):
        seconds = max(0.0, min(stretch.end, high) - max(stretch.start, low))
        if stretch.label != "idle":
            wall += seconds
            parts[stretch.label] += seconds
    commits = [c for a in history.attempts for c in a.commits if low <= c["time"] <= high]
    saves = len(commits)
    return Ledger(
        wall=wall,
        parts=parts,
        recoveries=[r for r in recoveries(history) if low <= r.began <= high],
        steps=max((s.step for a in history.attempts for s in a.steps), default=0),
        attempts=len(history.attempts),
        saves=saves,
        save_stall=parts["checkpoint"] / saves if saves else 0.0,
        interval=(parts["productive"] + parts["redone"]) / saves if saves > 1 else 0.0,
        step_seconds=_step_seconds([a.steps for a in history.attempts]),
    )


def stretches(history: History, until: float | None = None) -> list[Stretch]:
    """How a run spent its time, as consecutive stretches."""
    return _Timeline(history, until).stretches()


# -- where the time went ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mark:
    """From `time` on it is `then`; of a step, the time before belongs to it."""

    time: float
    order: int
    then: str
    attempt: Attempt | None = None
    step: Step | None = None
    last: bool = False
    """The attempt's last step."""


class _Timeline:
    """Marks in order of time → stretches."""

    def __init__(self, history: History, until: float | None) -> None:
        self._history, self._until = history, until
        self._bounds = _kept_up_to(history.attempts)
        self._usual = _step_seconds([a.steps for a in history.attempts])
        self._usual_of = {a.key: _step_seconds([a.steps]) or self._usual for a in history.attempts}
        # Looked up for every fault and every step, of which a run of weeks has many: by bisection.
        self._finals = [row["time"] for row in history.events if row["kind"] in FINAL]
        self._queued = [row["time"] for row in history.events if row["kind"] == "queued"]
        self._begun = sorted(history.attempts, key=lambda a: a.started)
        self._newest: list[Attempt] = []
        for attempt in self._begun:
            self._newest.append(max([*self._newest[-1:], attempt], key=lambda a: a.key))
        self._saves = {
            a.key: sorted((c["step"], float(c.get("seconds") or 0.0)) for c in a.commits) for a in history.attempts
        }

    def stretches(self) -> list[Stretch]:
        marks = sorted(self._marks(), key=lambda m: (m.time, m.order))
        if not marks:
            return []
        if self._until is not None and self._until > marks[-1].time:
            marks.append(_Mark(self._until, 0, "idle"))
        found: list[Stretch] = []
        before: Step | None = None
        inside: Attempt | None = None
        for mark, following in itertools.pairwise(marks):
            if mark.attempt is not inside:
                before, inside = None, mark.attempt or inside
            if mark.step is not None:
                before = mark.step
            if following.step is not None and following.attempt is inside and inside is not None:
                found += self._of_step(mark.time, following, before, inside)
            elif mark.last and following.order == _INJECTED:
                found.append(Stretch(mark.time, following.time, "redone"))
            elif mark.last and following.then == "idle" and inside is not None and inside.ended is None:
                late = following.time - mark.time > max(5 * self._usual, 5.0)
                found.append(Stretch(mark.time, following.time, "detect" if late else "productive"))
            else:
                found.append(Stretch(mark.time, following.time, mark.then))
        return found

    def _marks(self) -> Iterable[_Mark]:
        for row in self._history.events:
            match row["kind"]:
                case "queued" | "paused":
                    yield _Mark(row["time"], 0, "queue")
                case "decision":
                    label = {"hold": "holding", "start": "decide", "finish": "decide"}.get(str(row.get("decision")))
                    if label:
                        yield _Mark(row["time"], 3, label)
                case "fault_injected":
                    if self._hits(row["time"]):
                        yield _Mark(row["time"], _INJECTED, "detect")
                case kind if kind in FINAL:
                    yield _Mark(row["time"], 9, "idle")
        for attempt in self._history.attempts:
            yield from self._of_attempt(attempt)
        yield from self._of_cluster()

    def _of_attempt(self, attempt: Attempt) -> Iterable[_Mark]:
        yield _Mark(attempt.started, 4, "connect", attempt)
        if attempt.connected is not None:
            yield _Mark(attempt.connected, 4, "build", attempt)
        if attempt.built is not None:
            yield _Mark(attempt.built, 4, "restore" if attempt.from_step else "first_step", attempt)
        if attempt.resumed is not None:
            yield _Mark(attempt.resumed, 4, "first_step", attempt)
        well = attempt.how in {"finished", "stopped", "resized"}
        for step in attempt.steps:
            yield _Mark(step.time, 5, "checkpoint" if well else "detect", attempt, step, step is attempt.steps[-1])
        for fault in attempt.faults[:1]:
            yield _Mark(fault["time"], 6, "stop", attempt)
        if attempt.ended is not None:
            yield _Mark(attempt.ended, 7, "decide", attempt)

    def _of_cluster(self) -> Iterable[_Mark]:
        """A head's coming counts while no attempt is at work: before the first, or after the head was lost."""
        for row in self._history.cluster:
            if row["kind"] in {"head_started", "driver_lost"} and self._nothing_runs(row["time"]):
                yield _Mark(row["time"], 2, "bring_up")

    def _nothing_runs(self, moment: float) -> bool:
        if not self._history.events or moment < self._history.events[0]["time"]:
            return False
        final, queued = latest(self._finals, moment), latest(self._queued, moment)
        if final is not None and (queued is None or queued < final):
            return False
        newest = self._newest_at(moment)
        return newest is None or not newest.steps or newest.steps[-1].time <= moment

    def _newest_at(self, moment: float) -> Attempt | None:
        """The newest of the attempts that had begun then."""
        index = bisect.bisect_right(self._begun, moment, key=lambda a: a.started)
        return self._newest[index - 1] if index else None

    def _hits(self, moment: float) -> bool:
        """Whether what was injected then is what ended the attempt: no step of it came after."""
        newest = self._newest_at(moment)
        if newest is None or (newest.ended or math.inf) < moment:
            return False
        after = newest.known is not None and moment <= newest.known
        return after and (not newest.steps or newest.steps[-1].time <= moment)

    def _of_step(self, start: float, mark: _Mark, before: Step | None, attempt: Attempt) -> Iterable[Stretch]:
        """The time before a step: its own work, a save in between, and at first what it took to warm up."""
        assert mark.step is not None
        from_step = before.step if before else attempt.from_step
        count = max(1, mark.step.step - from_step)
        usual = self._usual_of[attempt.key] * count
        spent = mark.time - start
        excess = max(0.0, spent - usual) if usual else 0.0
        if before is None:
            other = ("first_step", excess)
        else:
            saves = self._saves[attempt.key]
            between = slice(*(bisect.bisect_left(saves, (step,)) for step in (from_step, mark.step.step)))
            other = ("checkpoint", min(excess, sum(seconds for _, seconds in saves[between])))
        yield Stretch(start, start + other[1], other[0])
        bound = self._bounds[attempt.key]
        kept = min(max(bound - (mark.step.step - count), 0), count) / count
        middle = start + other[1] + kept * (spent - other[1])
        yield Stretch(start + other[1], middle, "productive")
        yield Stretch(middle, mark.time, "redone")


_INJECTED = 1


def _kept_up_to(attempts: Sequence[Attempt]) -> dict[tuple[int, int], float]:
    """For each attempt the last step that nobody did again."""
    bounds: dict[tuple[int, int], float] = {}
    bound = math.inf
    for attempt in reversed(attempts):
        is_last = attempt is attempts[-1]
        if is_last and attempt.how in {"fault", "error"} and attempt.committed is not None:
            bound = attempt.committed  # what is not committed will be done again
        bounds[attempt.key] = bound
        if attempt.steps:
            bound = min(bound, attempt.from_step)
    return bounds


def _step_seconds(groups: Sequence[Sequence[Step]]) -> float:
    """Median seconds of a step; 0.0 when there are no two in a row."""
    found = [
        (b.time - a.time) / (b.step - a.step)
        for steps in groups
        for a, b in itertools.pairwise(steps)
        if b.step > a.step
    ]
    return statistics.median(found) if found else 0.0


# -- of a directory ----------------------------------------------------------------------------------------


def of_run(run_dir: Path, whole: bool = True, window: tuple[float, float] | None = None) -> Ledger:
    """The ledger of a run directory; `whole`: read all its metrics, also of a long run."""
    record = Run.read(run_dir)
    events = event_log.read_all(run_dir)
    cluster = run_dir.parent.parent / "clusters" / (record.cluster if record else "")
    begun = min((float(r["time"]) for r in events if is_number(r.get("time"))), default=math.inf)
    of_cluster = [r for r in event_log.read(cluster, *OF_CLUSTER) if float(r.get("time", 0)) >= begun]
    path = run_dir / files.METRICS_FILE
    metrics = files.read_lines(path) if whole or not _is_large(path) else _in_pieces(path, events)
    live = record is not None and record.state not in FINAL
    return compute(read(events, metrics, of_cluster), time.time() if live else None, window)


def summary(run_dir: Path) -> dict[str, Any]:
    """The last recovery and the goodput so far, for `raylaunch status`; fast, also for a long run.

    `goodput` (0 to 1, None before the first step), `recoveries` (number of recoveries from faults),
    `resizes`, `steps_lost` (in total), `last_recovery`: None, or kind, causes, node, began, total (None:
    not finished), phases, steps_lost, workers.
    """
    ledger = of_run(run_dir, whole=False)
    counted = [r for r in ledger.recoveries if not r.final]
    faults = [r for r in counted if r.kind != "resize"]
    return {
        "goodput": round(ledger.goodput, 4) if ledger.steps else None,
        "recoveries": len(faults),
        "resizes": len(counted) - len(faults),
        "steps_lost": ledger.steps_lost,
        "last_recovery": asdict(faults[-1]) if faults else None,
    }


def _is_large(path: Path) -> bool:
    return path.exists() and path.stat().st_size > WHOLE


def _in_pieces(path: Path, events: Sequence[Row]) -> list[Row]:
    """The steps of the last attempts from around where they begin and end, those of older ones by the events."""
    turns = [r for r in events if r.get("kind") in TURNS and isinstance(r.get("time"), (int, float))][-LAST_TURNS:]
    since = next((float(r["time"]) for r in turns if r["kind"] == "attempt_started"), -math.inf)
    older = [r for r in events if isinstance(r.get("time"), (int, float)) and r["time"] < since]
    recent = read_pieces(path, [float(r["time"]) for r in turns])
    return [*_told(older), *(r for r in recent if float(r.get("time") or 0.0) >= since)]


def _told(events: Iterable[Row]) -> Iterable[Row]:
    """What events say of steps, as metrics would: the first, those that were committed, the last."""
    reached: dict[Any, int] = {}
    known: dict[Any, float] = {}
    for row in events:
        attempt, step, moment = row.get("attempt"), row.get("step"), float(row["time"])
        if row.get("kind") == "fault":
            known.setdefault(attempt, moment)  # its end comes when it has been dealt with
        if row.get("kind") not in {"first_step", "commit", "attempt_ended"} or not isinstance(step, int):
            continue
        if step > reached.get(attempt, -1):
            reached[attempt] = step
            moment = known.get(attempt, moment) if row["kind"] == "attempt_ended" else moment
            yield {"step": step, "loss": 0.0, "attempt": attempt, "time": moment}


def read_pieces(path: Path, moments: Sequence[float]) -> list[Row]:
    """The lines of a large metrics file around these moments, and its first and last ones; all of a small one."""
    if not _is_large(path):
        return list(files.read_lines(path))
    size = path.stat().st_size
    found: dict[int, Row] = {}
    with path.open("rb") as source:
        wanted = {0, size - PIECE}
        for moment in moments:
            wanted.add(max(0, _seek_time(source, size, moment) - PIECE // 2))
        for start in sorted(wanted):
            found |= _rows_from(source, start)
    return [found[offset] for offset in sorted(found)]


def _rows_from(source: Any, start: int, size: int = PIECE) -> dict[int, Row]:
    """Offset → row of the complete lines in one piece."""
    source.seek(start)
    chunk: bytes = source.read(size)
    at = 0 if start == 0 else chunk.find(b"\n") + 1
    found: dict[int, Row] = {}
    while (end := chunk.find(b"\n", at)) >= 0:
        try:
            row = json.loads(chunk[at:end])
            if isinstance(row, dict):
                found[start + at] = row
        except ValueError:
            pass
        at = end + 1
    return found


def _seek_time(source: Any, size: int, moment: float) -> int:
    """Where, about, the lines of that time lie."""
    low, high = 0, size
    while high - low > PIECE // 4:
        middle = (low + high) // 2
        rows = [row for row in _rows_from(source, middle, LOOK).values() if is_step(row)]
        if not rows:
            return low
        if float(next(iter(rows))["time"]) < moment:
            low = middle
        else:
            high = middle
    return low
