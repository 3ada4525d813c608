"""The pending alerts of each sink, in order, and when to try again. Pure; can be stored as JSON at any time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from raylaunch.observe.alerts.alert_sinks import Result

GIVE_UP = 3600.0
"""Seconds after the first try of an alert at a sink until it is given up there."""
REFUSALS = 3
"""Rejections by a sink until an alert is given up. More than one: a server that is starting may reject, too."""
LONGEST_PAUSE, LONGEST_ASKED = 60.0, 300.0
"""Seconds between two tries: by our own schedule, and as a server may request."""


@dataclass
class Due:
    """The delivery of an alert to one sink."""

    tries: int = 0
    refusals: int = 0
    first: float = 0.0
    """Time of the first try (Unix)."""
    error: str = ""


@dataclass
class PendingAlert:
    """One alert (a `message`), the sinks that have not received it yet, and its result at the others."""

    message: dict[str, Any]
    due: dict[str, Due]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def settle(self, sink: str, outcome: str, now: float) -> None:
        """The sink has received it, or it was given up there."""
        due = self.due.pop(sink)
        seconds = round(max(0.0, now - due.first), 3) if due.first else 0.0
        self.done[sink] = {"outcome": outcome, "tries": due.tries, "seconds": seconds}


class Outbox:
    """Pending alerts in order; each sink receives them one after the other. The caller removes settled ones."""

    def __init__(self, memory: Iterable[dict[str, Any]] = ()) -> None:
        self.parcels = [
            PendingAlert(one["message"], {name: Due(**due) for name, due in one["due"].items()}, dict(one["done"]))
            for one in memory
        ]

    def add(self, message: dict[str, Any], sinks: Iterable[str]) -> None:
        self.parcels.append(PendingAlert(message, {name: Due() for name in sinks}))

    def next(self, sink: str) -> PendingAlert | None:
        """The oldest alert that this sink has not received."""
        return next((parcel for parcel in self.parcels if sink in parcel.due), None)

    def memory(self) -> list[dict[str, Any]]:
        return [asdict(parcel) for parcel in self.parcels]


def pause(due: Due, result: Result, now: float) -> float | None:
    """Seconds until the next try of a failed delivery; None: give it up."""
    if result.refused and due.refusals >= REFUSALS:
        return None
    seconds = max(min(LONGEST_PAUSE, 2.0 ** (due.tries - 1)), min(LONGEST_ASKED, result.after))
    return None if now + seconds - due.first > GIVE_UP else seconds
