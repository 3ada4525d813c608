"""events.jsonl: what happened, in a cluster directory and in a run directory.

Each kind is a class: `cluster_events`, `node_events`, `run_events`, and `checkpoint/events`. Writers make one and
`append` it. Readers get rows (dicts), in which former kinds and fields have their present names: a file may have lines
of an older version, or a line that a user's code wrote with `Session.event`.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raylaunch.checkpoint.events import Event
from raylaunch.state import files
from raylaunch.state.files import EVENTS_FILE, LineReader

FORMER = {
    "aborted": "attempt_aborted",
    "base_lost": "base_job_lost",
    "built": "model_built",
    "checkpoint_bad": "checkpoint_invalid",
    "connected": "workers_connected",
    "down": "cluster_down",
    "excluded": "node_excluded",
    "head": "head_started",
    "injected": "fault_injected",
    "joiner_found": "joiner_adopted",
    "notice": "termination_notice",
    "requeues_used_up": "max_requeues_reached",
    "resize_asked": "resize_requested",
    "slurm_silent": "slurm_unreachable",
    "strike": "node_strike",
}
"""Kinds as they were named before December 2026 → their present names."""
_FORMER_OF = {now: old for old, now in FORMER.items()}


def append(directory: Path, event: Event, **context: Any) -> None:
    """Add one line to the directory's events.jsonl. `context`: fields that all events of the writer have, such as a
    run's `attempt`. Raises StateError."""
    write(directory, event.kind, **context, **event.values())


def write(directory: Path, kind: str, **fields: Any) -> None:
    """As `append`, for a kind that is not declared: a user's own."""
    files.append_line(directory / EVENTS_FILE, {"time": round(time.time(), 3), "kind": kind, **fields})


def pattern(kinds: Iterable[str]) -> re.Pattern[bytes]:
    """Finds the lines of these kinds (and of their former names) among the bytes of a file: ten days of a large cluster
    are 100,000 lines, of which few are asked for."""
    names = [name for kind in kinds for name in (kind, _FORMER_OF.get(kind)) if name is not None]
    return re.compile(rf'^.*"kind": ?"(?:{"|".join(map(re.escape, names))})".*$'.encode(), re.MULTILINE)


def current(row: Any) -> Any:
    """A row with its present kind and fields; everything else as it is."""
    if not isinstance(row, dict):
        return row
    kind = row.get("kind")
    if isinstance(kind, str) and kind in FORMER:
        return {**row, "kind": FORMER[kind]}
    if kind == "attempt_started" and "incarnation" in row:
        return {"run_incarnation" if key == "incarnation" else key: value for key, value in row.items()}
    return row


class EventReader(LineReader):
    """Reads a growing events.jsonl a bit at a time."""

    def __init__(self, directory: Path, at_end: bool = False, last: int | None = None) -> None:
        super().__init__(directory / EVENTS_FILE, at_end, last)

    def read(self) -> list[dict[str, Any]]:
        return [current(row) for row in super().read()]


def read_all(directory: Path) -> list[dict[str, Any]]:
    """All events; [] when there are none."""
    return EventReader(directory).read()


def read(directory: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of these kinds; [] when there are none."""
    try:
        text = (directory / EVENTS_FILE).read_bytes()
    except FileNotFoundError:
        return []
    rows = []
    for line in pattern(kinds).findall(text):
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(current(json.loads(line)))
    return [row for row in rows if isinstance(row, dict) and row.get("kind") in kinds]
