"""Whether each step of a run counts exactly once, according to its files. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from raylaunch.observe.history.timeline import Row, is_number, read


@dataclass(frozen=True)
class Exactness:
    """Whether each step counts once. Steps are numbers; all lists empty: exact."""

    steps: int
    missing: list[int]
    """Not in the metrics, and no later attempt started after them: presumably lost."""
    repeated: list[int]
    """Repeated after they had been committed."""
    twice: list[int]
    """More than once in one attempt."""
    unlogged: list[int]
    """Not in the metrics (the worker died before it had written), but a later attempt resumed after them."""
    stale: int
    """Lines of attempts that a newer one had replaced; they do not count."""

    @property
    def ok(self) -> bool:
        return not (self.missing or self.repeated or self.twice)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify_steps(metrics: Iterable[Row], events: Iterable[Row], every: int = 1) -> Exactness:
    """Check that each step 1..N has exactly one valid line, and that no committed step was repeated.

    The valid line of a step is that of the newest attempt (highest incarnation, then number). `events`:
    of the run; at least its commits. A commit that turned out to be damaged does not count from then on.
    `every`: logging.log_every_steps.
    """
    history = read(events, metrics)
    words: dict[int, tuple[int, int]] = {}
    repeated: set[int] = set()
    twice: set[int] = set()
    committed = 0
    bad = {
        (r["step"], r["time"]) for r in history.events if r["kind"] == "checkpoint_invalid" and is_number(r.get("step"))
    }
    gone_back = {a for r in history.events if r["kind"] == "nonfinite" for a in [r.get("attempt")]}
    good: set[int] = set()
    for attempt in history.attempts:
        good -= {step for step, moment in bad if moment <= attempt.last_sign}
        committed = max(good, default=0)
        seen: set[int] = set()
        for step in attempt.steps:
            if step.step <= committed:
                repeated.add(step.step)
            if step.step in seen and attempt.number not in gone_back:
                twice.add(step.step)
            seen.add(step.step)
            words[step.step] = attempt.key
        good |= {int(c["step"]) for c in attempt.commits if isinstance(c.get("step"), int)}
    last = max(words, default=0)
    behind = max((a.from_step for a in history.attempts), default=0)
    absent = [s for s in range(every, last + 1, every) if s not in words]
    return Exactness(
        steps=last,
        missing=[s for s in absent if s > behind],
        repeated=sorted(repeated),
        twice=sorted(twice),
        unlogged=[s for s in absent if s <= behind],
        stale=history.stale_steps,
    )
