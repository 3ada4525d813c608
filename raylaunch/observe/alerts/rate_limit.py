"""Limits the rate of alerts: one per `min_interval` of a kind and subject, `max_per_hour` in total. Pure.

An alert that comes too soon is held back and merged: later, the latest is sent with the number of alerts that it stands
for. None is dropped silently. The end of a run is always sent, with the alerts that are still held back. Critical
alerts are exempt from the hourly limit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from raylaunch.observe.alerts.alert import FINAL, Alert

HOUR = 3600.0
_WORST = ("info", "warning", "critical")


@dataclass
class Held:
    """Held alerts of one kind and subject: the latest, their number, and the time of the first."""

    alert: Alert
    count: int
    since: float


@dataclass
class Limiter:
    """Decides what is sent now. `sent` and `last`: Unix times of the alerts sent, of all and by key."""

    min_interval: float
    max_per_hour: int
    sent: list[float] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)

    def offer(self, alert: Alert, now: float) -> list[Alert]:
        """The alerts to send at once: this one, or none."""
        self._forget(now)
        if alert.kind in FINAL:
            waiting, self.held = list(self.held.values()), {}
            self._note([alert.key], now)
            more = f"\nheld back until now: {_counted(waiting)}" if waiting else ""
            return [replace(alert, text=alert.text + more)]
        before = self.held.get(alert.key)
        if before is None and alert.key not in self.last and self._may_pass(alert):
            self._note([alert.key], now)
            return [alert]
        since, count = (before.since, before.count) if before else (alert.time, 0)
        self.held[alert.key] = Held(alert, count + alert.count, since)
        return []

    def release(self, now: float) -> list[Alert]:
        """Held alerts that may be sent now, merged into one."""
        self._forget(now)
        due = [key for key, one in self.held.items() if key not in self.last and self._may_pass(one.alert)]
        if not due:
            return []
        found = [self.held.pop(key) for key in due]
        self._note(due, now)
        return [_folded(found)]

    def _may_pass(self, alert: Alert) -> bool:
        return alert.severity == "critical" or len(self.sent) < self.max_per_hour

    def _note(self, keys: Sequence[str], now: float) -> None:
        self.sent.append(now)
        self.last |= dict.fromkeys(keys, now)

    def _forget(self, now: float) -> None:
        """Also future times: a clock may have been set back."""
        self.sent = [moment for moment in self.sent if 0 <= now - moment < HOUR]
        self.last = {key: moment for key, moment in self.last.items() if 0 <= now - moment < self.min_interval}

    def memory(self) -> dict[str, Any]:
        return {
            "sent": [*self.sent],
            "last": {**self.last},
            "held": {key: asdict(one) for key, one in self.held.items()},
        }

    def recall(self, memory: dict[str, Any]) -> None:
        self.sent, self.last = list(memory["sent"]), dict(memory["last"])
        self.held = {
            key: Held(Alert(**one["alert"]), one["count"], one["since"]) for key, one in memory["held"].items()
        }


def _folded(found: Sequence[Held]) -> Alert:
    """One alert in place of all of them."""
    latest = max(found, key=lambda one: one.alert.time).alert
    count, since = sum(one.count for one in found), min(one.since for one in found)
    if count == 1:
        return latest
    when = time.strftime("%H:%M", time.localtime(since))
    worst = max(found, key=lambda one: _WORST.index(one.alert.severity)).alert
    return replace(
        latest, kind=worst.kind, severity=worst.severity, subject=latest.subject if len(found) == 1 else "", count=count,
        text=f"{count} alerts since {when} ({_counted(found)}); the last: {latest.text}",
    )  # fmt: skip


def _counted(found: Sequence[Held]) -> str:
    kinds: Counter[str] = Counter()
    for one in found:
        kinds[one.alert.kind] += one.count
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
