"""The time axis that all pictures of a report share: a run's own time, what lies between two hand-overs cut out. Pure."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

WIDTH = 1000.0
CUT = 10.0
"""Of WIDTH, that stands for a time between two hand-overs."""


class Axis:
    """Seconds since the epoch → 0 … WIDTH. `intervals`: in order, not overlapping."""

    def __init__(self, intervals: Sequence[tuple[float, float]]) -> None:
        self.intervals = list(intervals) or [(0.0, 1.0)]
        self._starts = [start for start, _ in self.intervals]
        self.seconds = sum(end - start for start, end in self.intervals) or 1.0
        """Of the run's own time."""
        gaps = len(self.intervals) - 1
        self._cut = min(CUT, 0.2 * WIDTH / gaps) if gaps else 0.0
        self._scale = (WIDTH - self._cut * gaps) / self.seconds
        spans = [end - start for start, end in self.intervals]
        self._before = [0.0, *itertools.accumulate(spans)][:-1]

    def x(self, moment: float) -> float:
        """Where a moment lies; one in a cut at its beginning."""
        index = max(0, bisect.bisect_right(self._starts, moment) - 1)
        start, end = self.intervals[index]
        own = min(max(moment, start), end) - start
        return (self._before[index] + own) * self._scale + index * self._cut

    def elapsed(self, moment: float) -> float:
        """Seconds of the run's own time up to a moment."""
        index = max(0, bisect.bisect_right(self._starts, moment) - 1)
        start, end = self.intervals[index]
        return self._before[index] + min(max(moment, start), end) - start

    def moment(self, elapsed: float) -> float:
        """The moment after so many seconds of the run's own time."""
        index = max(0, bisect.bisect_right(self._before, elapsed) - 1)
        start, end = self.intervals[index]
        return min(end, start + elapsed - self._before[index])

    def cuts(self) -> list[tuple[float, float, float]]:
        """(from, to, seconds that are cut out) of each."""
        return [
            (self.x(before[1]), self.x(after[0]), after[0] - before[1])
            for before, after in itertools.pairwise(self.intervals)
        ]
