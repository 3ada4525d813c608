"""Is an attempt hung, and who is missing? Pure: what the workers said last in, a verdict out.

Workers say which step and phase they are in (`pulse`). Training is in step: where one rank stops,
the others soon wait for it. So a hang is silence of *all* ranks, for longer than a step can take;
and the missing ranks are those that are behind the others.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from raylaunch.config.schema import ElasticConfig
from raylaunch.timing import SILENCE

LONG_PHASES = {"load", "validate", "save"}
DONE = "done"
"""The phase after the last step: what a trainer does then has no limit."""
LONG_LIMIT = 600.0
"""Seconds that these may take at the least: storage has bad minutes."""
START_FACTOR = 10.0
"""The start of all workers may take this many hang_timeouts, and so may the first step (imports, compilation, the
first collectives)."""

_ORDER = {"load": 0, "step": 1, "sync": 2, "validate": 3, "save": 4}


@dataclass(frozen=True)
class Heartbeat:
    """One rank, as the driver knows it now. `age`: seconds since it began its phase; `silent`: since it
    said anything at all. A rank that has not called `progress` yet has no phase."""

    rank: int
    node: str
    pid: int = 0
    step: int = 0
    phase: str = ""
    age: float = 0.0
    silent: float = 0.0
    connected: bool = True

    @property
    def place(self) -> tuple[int, int]:
        """How far it has come: (step, place of the phase in a step)."""
        return (self.step, _ORDER.get(self.phase, 1)) if self.phase else (-1, 0)


@dataclass(frozen=True)
class Hang:
    """Nothing has moved for `seconds`. `ranks`: those that the others wait for; all, when none is behind."""

    ranks: tuple[int, ...]
    seconds: float
    step: int
    phase: str
    reason: str
    setting: str


class ProgressTracker:
    """How fast an attempt goes: fed with the beats now and then, by the caller's clock."""

    def __init__(self, from_step: int, longest_save: float = 0.0) -> None:
        self.step, self.longest_save = from_step, longest_save
        self._from = from_step
        self._at: float | None = None
        self._steps: deque[float] = deque(maxlen=64)
        self._saving: float | None = None

    @property
    def begun(self) -> bool:
        """The first step is done."""
        return self.step > self._from

    @property
    def step_seconds(self) -> float:
        """The median time of a step; 0 before there is one."""
        return statistics.median(self._steps) if self._steps else 0.0

    def observe(self, now: float, beats: Sequence[Heartbeat]) -> None:
        """Take note of where the foremost rank is."""
        front = max((beat.step for beat in beats), default=self.step)
        if front > self.step:
            if self._at is not None and self.begun:
                self._steps.append((now - self._at) / (front - self.step))
            self.step, self._at = front, now
        saving = any(beat.phase == "save" for beat in beats)
        if saving and self._saving is None:
            self._saving = now
        elif not saving and self._saving is not None:
            self.longest_save = max(self.longest_save, now - self._saving)
            self._saving, self._at = None, now  # a save is no step: time counts anew from here


def limit(beats: Sequence[Heartbeat], pace: ProgressTracker, elastic: ElasticConfig) -> tuple[float, str]:
    """Seconds that nothing may move, and the setting behind it."""
    steps = elastic.hang_factor * pace.step_seconds
    normal = max(elastic.hang_timeout, steps)
    setting = f"elastic.hang_factor={elastic.hang_factor:g}" if steps > elastic.hang_timeout else ""
    if not pace.begun:
        normal = max(normal, START_FACTOR * elastic.hang_timeout)
    # Who waits for storage still gives signs of life: a silent rank is not what slow storage looks like.
    if any(beat.phase in LONG_PHASES for beat in beats) and all(beat.silent <= SILENCE for beat in beats):
        normal = max(normal, 10 * pace.longest_save, LONG_LIMIT)
    return normal, setting or f"elastic.hang_timeout={elastic.hang_timeout:g}"


def judge(
    beats: Sequence[Heartbeat], world: int, age: float, pace: ProgressTracker, elastic: ElasticConfig
) -> Hang | None:
    """Whether the attempt, begun `age` seconds ago with `world` workers, hangs.

    Until all workers have started counts from its beginning, then from the first call of `progress` by anybody: a
    trainer that never calls it is not watched.
    """
    moving = [beat for beat in beats if beat.phase not in {"", DONE}]
    if not moving:
        return None if pace.begun else _not_started(beats, world, age, elastic)
    idle = min(beat.age for beat in moving)
    most, setting = limit(moving, pace, elastic)
    if idle <= most:
        return None
    known = {beat.rank: beat for beat in beats}
    unheard = _unheard(beats, world)
    silent = [beat.rank for beat in beats if beat.silent > SILENCE]
    front = max(moving, key=lambda beat: beat.place)
    behind = [beat.rank for beat in beats if beat.place < front.place]
    last = [rank for rank in behind if known[rank].place == min(known[r].place for r in behind)]
    # Who never came is why the others wait; then who is stopped so hard that it says nothing.
    ranks = unheard or (silent if len(silent) < len(beats) else []) or last or sorted(known)
    where = min((known[rank].place for rank in ranks if rank in known), default=(front.step, 0))
    phase = next((known[rank].phase for rank in ranks if rank in known), "start")
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} of {world} ranks"
    return Hang(
        tuple(ranks), idle, max(where[0], 0), phase,
        f"no progress for {idle:.1f} s (limit {most:.1f} s) at step {front.step}: waiting for {who}", setting,
    )  # fmt: skip


def _not_started(beats: Sequence[Heartbeat], world: int, age: float, elastic: ElasticConfig) -> Hang | None:
    """Workers that never came, and nobody says why."""
    ranks, most = _unheard(beats, world), START_FACTOR * elastic.hang_timeout
    if not ranks or age <= most:
        return None
    reason = f"{len(ranks)} of {world} workers have not started in {age:.0f} s (limit {most:.0f} s)"
    return Hang(tuple(ranks), age, 0, "start", reason, f"elastic.hang_timeout={elastic.hang_timeout:g}")


def _unheard(beats: Sequence[Heartbeat], world: int) -> list[int]:
    return sorted(set(range(world)) - {beat.rank for beat in beats})
