"""What has still to be sent, to whom, in which order; and when to try again. Pure, and JSON at any time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from raylaunch.observe.alerts.alert_sinks import Result

GIVE_UP = 3600.0
"""Seconds from the first try of an alert at a sink until it is given up there."""
REFUSALS = 3
"""Times that a sink may say what it will hardly take back later; a server that comes up says odd things, too."""
LONGEST_PAUSE, LONGEST_ASKED = 60.0, 300.0
"""Seconds between two tries: ours, and those that a server may ask for."""


@dataclass
class Due:
    """An alert's way to one sink."""

    tries: int = 0
    refusals: int = 0
    first: float = 0.0
    """When it was tried first (Unix)."""
    error: str = ""


@dataclass
class PendingAlert:
    """One alert (a `message`), the sinks that have not got it yet, and what became of it at the others."""

    message: dict[str, Any]
    due: dict[str, Due]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def settle(self, sink: str, outcome: str, now: float) -> None:
        """The sink has got it, or never will."""
        due = self.due.pop(sink)
        seconds = round(max(0.0, now - due.first), 3) if due.first else 0.0
        self.done[sink] = {"outcome": outcome, "tries": due.tries, "seconds": seconds}


class Outbox:
    """Parcels in order; each sink takes them one after the other. Who has seen to it that one is settled removes it."""

    def __init__(self, memory: Iterable[dict[str, Any]] = ()) -> None:
        self.parcels = [
            PendingAlert(one["message"], {name: Due(**due) for name, due in one["due"].items()}, dict(one["done"]))
            for one in memory
        ]

    def add(self, message: dict[str, Any], sinks: Iterable[str]) -> None:
        self.parcels.append(PendingAlert(message, {name: Due() for name in sinks}))

    def next(self, sink: str) -> PendingAlert | None:
        """The oldest that this sink has not got."""
        return next((parcel for parcel in self.parcels if sink in parcel.due), None)

    def memory(self) -> list[dict[str, Any]]:
        return [asdict(parcel) for parcel in self.parcels]


def pause(due: Due, result: Result, now: float) -> float | None:
    """Seconds until the next try of what has failed; None: give it up."""
    if result.refused and due.refusals >= REFUSALS:
        return None
    seconds = max(min(LONGEST_PAUSE, 2.0 ** (due.tries - 1)), min(LONGEST_ASKED, result.after))
    return None if now + seconds - due.first > GIVE_UP else seconds
