"""The events that checkpoints write, and `Event`, the base of all kinds in events.jsonl.

The other kinds are in `state/cluster_events`, `state/node_events` and `state/run_events`, which are in a higher layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl. The docstring of a kind says when it is written; docs/events.md is made from it."""

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str | None = None) -> None:
        """`kind`: where it is not the class's name in lower case with underscores."""
        cls.kind = kind or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def values(self) -> dict[str, Any]:
        """Its fields. An optional one (default None) that is None is left out."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        return {f.name: v for f, v in values if v is not None or f.default is not None}


@dataclass(frozen=True)
class Committed(Event, kind="commit"):
    """A checkpoint was committed: training can resume from it."""

    step: int
    seconds: float
    """From the copy of the state to the commit."""


@dataclass(frozen=True)
class CheckpointSlow(Event):
    """A commit took much longer than the ones before it."""

    step: int
    seconds: float


@dataclass(frozen=True)
class CheckpointFailed(Event):
    """A save failed. Training continues, and the next save tries again."""

    step: int
    error: str


@dataclass(frozen=True)
class CheckpointInvalid(Event):
    """A committed checkpoint failed verification, or could not be read. The one before it is loaded."""

    step: int
    file: str
    """The first file that failed, relative to the checkpoints' directory."""
    why: str


@dataclass(frozen=True)
class Resumed(Event):
    """The workers loaded a checkpoint."""

    step: int
    seconds: float
    phases: dict[str, float]
    """Seconds by phase: `verifying`, `loading`."""
