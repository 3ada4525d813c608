"""Fault after fault done to a run: wait until it trains, strike, wait until it has recovered, mend.

Recovered means a step after the fault that is committed: by a new attempt, or by the same one when the
fault is of a kind that training should not notice (or did not). A run that does not get there within
the limit ends the campaign. However it ends, what was broken is mended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from raylaunch.state import event_log, runs
from raylaunch.state.run_events import FaultInjected
from raylaunch.tools.chaos.faults import Aim, Broken, Faults, mended
from raylaunch.tools.chaos.remote import Miss
from raylaunch.tools.chaos.schedule import KINDS, Planned

EVERY = 0.2
GRACE = 5.0
"""Seconds that training must go on after a fault that it should not notice."""
UNNOTICED = 20.0
"""Seconds of committed steps after which a fault that should have been noticed was none."""


@dataclass
class FaultOutcome:
    """What became of one fault."""

    seq: int
    kind: str
    target: str
    struck: float
    recovered: bool = False
    restarted: bool = False
    """By a new attempt."""
    skipped: str = ""
    """Why it was not done."""
    why: str = ""
    """What is known of a run that did not recover, or of what could not be mended."""


@dataclass
class Campaign:
    """The faults of one `raylaunch chaos`."""

    faults: Faults
    planned: Iterator[Planned]
    every: float
    limit: float
    """Seconds for the run to recover, and to be ready for a fault."""
    hold: float
    """Seconds until a fault that lasts is undone."""
    say: Callable[[str], None]
    outcomes: list[FaultOutcome] = field(default_factory=list)
    _broken: list[Broken] = field(default_factory=list)

    def go(self, duration: float | None, count: int | None) -> bool:
        """Until the time is up, so many faults are done, or the run is over; True when each was recovered."""
        began = time.monotonic()
        due = began
        # Numbers go on where an earlier campaign on this run ended: each names one fault of the run.
        earlier = max(
            (int(e.get("seq", 0)) for e in self.faults.victim.events() if e["kind"] == "fault_injected"), default=0
        )
        try:
            if not self.faults.victim.is_training:
                self.say("waits until the run trains: a commit of its newest attempt")
            if not self._until(lambda: self.faults.victim.is_training, self.limit):
                self.say("the run does not train: no commit within the limit")
                return False
            for planned in self.planned:
                done = len([o for o in self.outcomes if not o.skipped])
                if (count is not None and done >= count) or self._all_skipped():
                    break
                due = max(time.monotonic(), due + self.every * planned.pause)
                if duration is not None and due - began > duration:
                    break
                if not self.outcomes:
                    self.say(f"the run trains; the first fault comes in {due - time.monotonic():.0f} s")
                self._until(lambda: self._over() is not None, due - time.monotonic())
                if self._over() is not None:
                    break
                outcome = self._one(replace(planned, seq=earlier + planned.seq))
                if not outcome.skipped and not outcome.recovered:
                    break
        finally:
            self._mend_all()
        over = self._over()
        if over is not None:
            self.say(f"the run is {over}")
        return over in {None, "finished"} and all(o.skipped or (o.recovered and not o.why) for o in self.outcomes)

    def _one(self, planned: Planned) -> FaultOutcome:
        aim = self._aim(planned)
        if isinstance(aim, FaultOutcome):
            self.say(f"{planned.seq}: {planned.kind} left out: {aim.skipped or aim.why}")
            self.outcomes.append(aim)
            return aim
        victim = self.faults.victim
        before, attempt = len(victim.events()), victim.attempt
        outcome = FaultOutcome(planned.seq, planned.kind, aim.node, time.time(), why="interrupted")
        self.outcomes.append(outcome)
        event_log.append(victim.run_dir, FaultInjected(planned.kind, aim.node, aim.rank, planned.seq))
        try:
            broken = self.faults.strike(aim)
        except Miss as error:  # it ended by itself meanwhile
            outcome.skipped, outcome.why = error.message, ""
            self.say(f"{planned.seq}: {planned.kind} left out: {error.message}")
            return outcome
        self.say(f"{planned.seq}: {aim}")
        if broken is not None:
            self._broken.append(broken)
        self._watch(outcome, before, attempt)
        outcome.why = "" if outcome.why == "interrupted" else outcome.why
        for left in self._mend_all():
            outcome.why = f"{outcome.why}; {left}".lstrip("; ")
        self.say(f"{planned.seq}: {aim} {self._told(outcome)}")
        return outcome

    def _aim(self, planned: Planned) -> Aim | FaultOutcome:
        """What to hit, once the run trains and enough nodes are there; an outcome when that takes too long."""
        why = "the run did not come to train"
        found: list[Aim] = []

        def ready() -> bool:
            nonlocal why
            if self._over() is not None:
                return True
            if self.faults.victim.is_training:
                try:
                    found.append(self.faults.aim(planned))
                except Miss as error:
                    why = error.message
            return bool(found)

        before = len(self.faults.victim.events())
        self._until(ready, self.limit)
        if found:
            return found[0]
        if self._over() is None and not self.faults.victim.commits(before):
            why = f"no commit within {self.limit:g} s, before this fault; {self.faults.victim.known()}"
            return FaultOutcome(planned.seq, planned.kind, "", time.time(), why=why)
        return FaultOutcome(planned.seq, planned.kind, "", time.time(), skipped=self._over() or why)

    def _watch(self, outcome: FaultOutcome, before: int, attempt: int) -> None:
        """Until the run has recovered, it is over, or the limit is reached."""
        victim, kind = self.faults.victim, KINDS[outcome.kind]
        began = time.monotonic()
        lasts = self.hold if kind.lasts else 0.0
        quiet = lasts + (UNNOTICED if kind.restarts else GRACE)
        late: int | None = None
        while True:
            now = time.monotonic() - began
            if kind.lasts and self._broken and now >= self.hold:
                outcome.why = "; ".join(self._mend_all()) or outcome.why
            if late is None and now >= quiet:
                late = len(victim.events())
            commits = victim.commits(before)
            if any(int(c.get("attempt") or 0) > attempt for c in commits):
                outcome.recovered = outcome.restarted = True
            elif late is not None and victim.attempt == attempt and victim.commits(late):
                outcome.recovered = True
            over = self._over()
            if outcome.recovered and not (kind.lasts and self._broken):
                return
            if over is not None:
                outcome.recovered = over == "finished"
                if not outcome.recovered:
                    outcome.why = f"the run is {over}"
                return
            if now > self.limit + lasts:
                outcome.why = f"not recovered within {self.limit:g} s; {victim.known()}"
                return
            time.sleep(EVERY)

    def _mend_all(self) -> list[str]:
        """Mend what is broken, the last first; what could not be."""
        failed = []
        while self._broken:
            broken = self._broken.pop()
            self.say(f"   {broken.text}")
            why = mended(broken)
            if why:
                self.say(f"   {why}")
                failed.append(why)
        return failed

    def _over(self) -> str | None:
        now = self.faults.victim.state
        return now if now in runs.FINAL or now == "gone" else None

    def _all_skipped(self) -> bool:
        """The last faults could none of them be done: nothing changes by going on."""
        tail = self.outcomes[-len(KINDS) :]
        return len(tail) == len(KINDS) and all(o.skipped for o in tail)

    def _until(self, ready: Callable[[], bool], limit: float) -> bool:
        deadline = time.monotonic() + limit
        while not ready():
            if time.monotonic() >= deadline:
                return False
            time.sleep(EVERY)
        return True

    def _told(self, outcome: FaultOutcome) -> str:
        seconds = time.time() - outcome.struck
        if outcome.recovered:
            how = "recovered, committed" if outcome.restarted else "not noticed, committed"
            return f"{how} after {seconds:.1f} s" + (f" ({outcome.why})" if outcome.why else "")
        return f"NOT RECOVERED: {outcome.why}"
