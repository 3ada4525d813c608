"""The time axis shared by all charts of a report: the active time of a run, without the gaps between. Pure."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

WIDTH = 1000.0
CUT = 10.0
"""Of WIDTH, for each gap between an end and the next submission."""


class Axis:
    """Seconds since the epoch → 0 … WIDTH. `intervals`: in order, not overlapping."""

    def __init__(self, intervals: Sequence[tuple[float, float]]) -> None:
        self.intervals = list(intervals) or [(0.0, 1.0)]
        self._starts = [start for start, _ in self.intervals]
        self.seconds = sum(end - start for start, end in self.intervals) or 1.0
        """The active time of the run."""
        gaps = len(self.intervals) - 1
        self._cut = min(CUT, 0.2 * WIDTH / gaps) if gaps else 0.0
        self._scale = (WIDTH - self._cut * gaps) / self.seconds
        spans = [end - start for start, end in self.intervals]
        self._before = [0.0, *itertools.accumulate(spans)][:-1]

    def x(self, moment: float) -> float:
        """The position of a moment; for one in a gap, the start of the gap."""
        index = max(0, bisect.bisect_right(self._starts, moment) - 1)
        start, end = self.intervals[index]
        own = min(max(moment, start), end) - start
        return (self._before[index] + own) * self._scale + index * self._cut

    def elapsed(self, moment: float) -> float:
        """Seconds of active time up to a moment."""
        index = max(0, bisect.bisect_right(self._starts, moment) - 1)
        start, end = self.intervals[index]
        return self._before[index] + min(max(moment, start), end) - start

    def moment(self, elapsed: float) -> float:
        """The moment after this many seconds of active time."""
        index = max(0, bisect.bisect_right(self._before, elapsed) - 1)
        start, end = self.intervals[index]
        return min(end, start + elapsed - self._before[index])

    def cuts(self) -> list[tuple[float, float, float]]:
        """(from, to, omitted seconds) of each gap."""
        return [
            (self.x(before[1]), self.x(after[0]), after[0] - before[1])
            for before, after in itertools.pairwise(self.intervals)
        ]
