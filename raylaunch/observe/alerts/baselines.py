"""The usual step interval and loss of a run, and deviations from them. Pure: numbers in, a judgement out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from raylaunch.config.schema import Config
from raylaunch.training.hang_detector import LONG_LIMIT

GAPS, LOSSES = 64, 100
"""The number of recent values that are kept."""
FEWEST_GAPS, FEWEST_LOSSES = 5, 20
"""With fewer values, nothing counts as usual."""
RECENT = 3
_NORMAL = 1.4826
"""Median absolute deviation → standard deviation, of a normal distribution."""
_LEAST_SPREAD = 0.01
"""Of the median: a small change of a nearly constant loss is not a spike."""


def usual(gaps: Sequence[float]) -> float | None:
    """The median of these seconds; None while there are too few."""
    return statistics.median(gaps) if len(gaps) >= FEWEST_GAPS else None


def stall_limit(config: Config, gaps: Sequence[float], step: int) -> float | None:
    """Seconds without metrics after those of `step` that count as a stall; None while the usual interval is unknown.

    `gaps`: seconds between two lines. If a save, a validation or the end may follow the step, the limit is at least
    that of the watchdog."""
    middle = usual(gaps)
    if middle is None:
        return None
    limit = max(config.alerts.stall_min_seconds, config.alerts.stall_factor * middle)
    steps, every = config.step_scheduler, config.logging.log_every_steps
    ahead = step + every
    pauses = [n for n in (steps.ckpt_every_steps, steps.val_every_steps) if n]
    if ahead >= steps.max_steps or any(ahead // n > (step - 1) // n for n in pauses):
        return max(limit, LONG_LIMIT)
    return limit


def spike(losses: Sequence[float], factor: float) -> tuple[float, float] | None:
    """(mean of the last RECENT, median of those before) if the mean is too far above the median, else None."""
    before, recent = losses[:-RECENT], losses[-RECENT:]
    if len(before) < FEWEST_LOSSES:
        return None
    middle = statistics.median(before)
    spread = max(_NORMAL * statistics.median(abs(x - middle) for x in before), _LEAST_SPREAD * abs(middle))
    mean = statistics.fmean(recent)
    return (mean, middle) if mean - middle > factor * spread else None


def number(value: Any) -> float | None:
    """A metric as a number, also one written as text because JSON has no NaN; None if it is not a number."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
