"""From a fault to the next step: each recovery of a run, phase by phase.

    attempts that ended + the one that reached a step → milestones in order → phases that add up

A fault during a recovery is part of it: the recovery ends with the first step of any later attempt. If
the run ended before that step, the recovery is `final` and does not count: no step was repeated. A
phase whose event is missing is part of the next one. Pure.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from raylaunch.observe.history.timeline import FINAL, Attempt, History, Row, latest

PHASES = ("detect", "elect", "bring_up", "stop", "retry", "decide", "start", "connect", "build", "restore",
          "first_step")  # fmt: skip
MAX_DETECTION = 30.0
"""Seconds; a fault injected longer than this before the last activity is not the cause of the end."""

_WORDS = {"node_lost": "node lost", "worker_lost": "worker lost", "head_lost": "head lost", "driver_lost": "driver lost",
          "raylet_lost": "raylet lost", "drain": "drained", "grow": "grows"}  # fmt: skip
_INJECTED = {"worker": "worker killed", "hang": "worker frozen", "raylet": "raylet killed", "agent": "agent killed",
             "driver": "driver killed", "gcs": "GCS killed", "dashboard": "dashboard killed", "node": "node killed",
             "head": "head killed", "freeze": "node frozen", "cut": "node cut off", "drain": "node drained",
             "slurmd": "slurmd killed", "slurmctld": "slurmctld killed"}  # fmt: skip
"""The faults of `raylaunch chaos`, by kind."""


@dataclass(frozen=True)
class Recovery:
    """From a fault (or a resize) to the next step. Times in seconds; `total` None: not finished."""

    kind: str
    """fault, error or resize."""
    causes: tuple[str, ...]
    node: str
    began: float
    """When the fault was injected, else when it was detected (seconds since the epoch)."""
    injected: tuple[int, ...]
    """Numbers of the `fault_injected` events that it answers."""
    phases: dict[str, float]
    total: float | None
    steps_lost: int
    attempts: int
    """Attempts until a step was reached."""
    workers: tuple[int, int]
    """Before and after."""
    to_step: int
    """The step from which the run continued."""
    final: bool = False
    """The run ended before the next step."""

    @property
    def detect(self) -> float | None:
        """From the injection to the detection; None if no fault was injected."""
        return self.phases.get("detect") if self.injected else None


class _Marks:
    """What recoveries look for among a history's rows, whose times never go back: found by bisection, since a run
    of weeks has thousands of both."""

    def __init__(self, history: History) -> None:
        self.elections = [row["time"] for row in history.cluster if row["kind"] == "election"]
        self.heads = [row["time"] for row in history.cluster if row["kind"] == "head_started"]
        self.starts = [r["time"] for r in history.events if r["kind"] == "decision" and r.get("decision") == "start"]
        self.injected = [row for row in history.events if row["kind"] == "fault_injected"]
        self.claimed: set[int] = set()
        """Indexes of the injections that a recovery answers already."""


def _first(times: Sequence[float], since: float, until: float = math.inf) -> float | None:
    index = bisect.bisect_left(times, since)
    return times[index] if index < len(times) and times[index] <= until else None


def recoveries(history: History) -> list[Recovery]:
    """Every recovery, from the loss of an attempt to the next step; the last may be unfinished."""
    found: list[Recovery] = []
    ended: list[Attempt] = []
    marks = _Marks(history)
    for attempt in history.attempts:
        if ended and attempt.steps:
            found.append(_recovery(history, marks, ended, attempt))
            ended = []
        if attempt is history.attempts[-1] and attempt.ended is None and not attempt.faults:
            break  # it goes on
        if attempt.how in {"finished", "stopped"}:
            ended = []
        elif ended or attempt.steps or attempt.from_step:
            ended.append(attempt)
    if ended:
        found.append(_recovery(history, marks, ended, None))
    return found


def _is_over(history: History, last: Attempt) -> bool:
    """Whether the run has ended since, and was not submitted again."""
    since = [row["kind"] for row in history.events if row["time"] >= last.started and row["kind"] in {*FINAL, "queued"}]
    return bool(since) and since[-1] in FINAL


def _recovery(history: History, marks: _Marks, ended: Sequence[Attempt], fresh: Attempt | None) -> Recovery:
    first, last = ended[0], ended[-1]
    reached = fresh.steps[0].time if fresh is not None else None
    if fresh is not None and fresh.first_step is not None:
        reached = fresh.first_step
    quiet = first.steps[-1].time if first.steps else first.started
    end = math.inf if reached is None else reached
    election = _first(marks.elections, quiet, end)
    known = min([t for t in (first.known, election) if t is not None], default=None)
    if known is None:
        known = fresh.started if fresh is not None else first.last_sign
    injected = _answered(marks, known, quiet, end)
    if first.how == "resized" and not injected:
        known = quiet  # until then it trained: a wish to resize costs nothing
    began = min([known, *(row["time"] for row in injected)])
    head = _first(marks.heads, election) if election is not None else None
    milestones: list[tuple[str, float | None]] = [
        ("detect", known),
        ("elect", head),
        ("bring_up", first.ended if head is not None else None),
        ("stop", first.ended if head is None else None),
        ("retry", last.ended if len(ended) > 1 else None),
        ("decide", latest(marks.starts, fresh.started) if fresh is not None else None),
    ]
    if fresh is not None:
        milestones += [("start", fresh.started), ("connect", fresh.connected), ("build", fresh.built),
                       ("restore", fresh.resumed), ("first_step", reached)]  # fmt: skip
    phases: dict[str, float] = {}
    at = began
    for name, moment in milestones:
        if moment is not None and moment <= end:
            phases[name] = round(max(0.0, moment - at), 3)
            at = max(at, moment)
    done = max([a.steps[-1].step for a in ended if a.steps] + [first.from_step])
    final = fresh is None and _is_over(history, last)
    back = fresh.from_step if fresh is not None else max((a.committed or 0 for a in ended), default=0)
    causes = [str(f.get("cause") or f["kind"]) for a in ended for f in a.faults if f["kind"] == "fault"]
    kind = "resize" if all(a.how == "resized" for a in ended) else "error" if first.how == "error" else "fault"
    if not causes:
        causes = [first.resize or first.how or "driver_lost"]
    node = next((str(f["node"]) for a in ended for f in a.faults if f.get("node")), "")
    return Recovery(
        kind=kind,
        causes=tuple(dict.fromkeys(causes)),
        node=node,
        began=began,
        injected=tuple(int(row.get("seq", 0)) for row in injected),
        phases=phases,
        total=round(max(0.0, reached - began), 3) if reached is not None else None,
        steps_lost=0 if final else max(0, done - back),
        attempts=len(ended),
        workers=(first.workers, fresh.workers if fresh is not None else 0),
        to_step=back,
        final=final,
    )


def _answered(marks: _Marks, known: float, quiet: float, end: float) -> list[Row]:
    """The injections behind a recovery: the last one before it was known, and those that came during it."""
    found: list[Row] = []
    # A worker's last steps may still be written while the fault is on its way.
    index = bisect.bisect_left(marks.injected, quiet - MAX_DETECTION, key=lambda row: float(row["time"]))
    for row in marks.injected[index:]:
        if row["time"] >= end:
            break
        if index not in marks.claimed:
            found.append(row)
            marks.claimed.add(index)
        index += 1
    early = [row for row in found if row["time"] <= known]
    return [*early[-1:], *(row for row in found if row["time"] > known)]


def named(recovery: Recovery, injected: dict[int, str]) -> str:
    """A short name of the recovery. `injected`: the number of each fault of `raylaunch chaos` → its kind."""
    if recovery.kind == "resize":
        before, after = recovery.workers
        return f"{_WORDS.get(recovery.causes[0], recovery.causes[0])}: {before} → {after}"
    told = [_INJECTED.get(injected[seq], injected[seq]) for seq in recovery.injected if seq in injected]
    if told:
        return f"{' + '.join(dict.fromkeys(told))} (chaos)"
    text = ", ".join(_WORDS.get(c, c.replace("_", " ")) for c in recovery.causes)
    return f"{text} ({recovery.node})" if recovery.node else text
