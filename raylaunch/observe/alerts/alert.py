"""One alert: what happened to a run, as text for people and as facts for programs. Pure."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raylaunch.config.schema import AlertKind

Severity = Literal["info", "warning", "critical"]
FINAL = {"finished", "stopped", "failed"}
"""The last alerts of a run; never held back."""
_INFO = {"started", "recovered", "finished"}
_CRITICAL = {"failed", "stalled", "held", "nan"}
LONGEST = 3000
"""Characters of a text: Slack truncates much longer ones, and they are not readable on a phone."""


@dataclass(frozen=True)
class Alert:
    """`subject`: what it is about besides the run, for example a node; the rate of alerts of one kind and subject is
    limited. `ask`: details to add from the run's files (see `details`). `count`: number of alerts merged into it."""

    kind: AlertKind
    text: str
    subject: str = ""
    time: float = 0.0
    """Unix time of the event that caused it."""
    severity: Severity = "info"
    facts: Mapping[str, Any] = field(default_factory=dict)
    ask: Literal["", "recovery", "verdict", "result"] = ""
    count: int = 1
    id: str = ""
    """The same if it is sent again after a crash: a receiver can detect duplicates."""

    @property
    def key(self) -> str:
        return f"{self.kind}:{self.subject}"


def severity(kind: AlertKind) -> Severity:
    return "info" if kind in _INFO else "critical" if kind in _CRITICAL else "warning"


def message(alert: Alert, run: str, cluster: str) -> dict[str, Any]:
    """The alert as JSON, for programs and for alerts.json. JSON has no NaN: it becomes text."""
    facts = json.loads(json.dumps(dict(alert.facts), default=str), parse_constant=str)
    return {
        "kind": alert.kind, "severity": alert.severity, "run": run, "cluster": cluster, "text": alert.text[:LONGEST],
        "subject": alert.subject, "time": round(alert.time, 3), "id": alert.id, "count": alert.count, "facts": facts,
    }  # fmt: skip


def lasting(seconds: float) -> str:
    """`34 s`, `12 min`, `3 h 20 min`, `4 d 3 h`."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes, hours, days = round(whole / 60), whole // 3600, whole // 86400
    if minutes < 120:
        return f"{minutes} min"
    return f"{hours} h {whole % 3600 // 60} min" if days < 2 else f"{days} d {whole % 86400 // 3600} h"


def clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
