"""Reads records for a report or a list: whatever the file contains, the result has the right types, or is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raylaunch.errors import RaylaunchError, first_line
from raylaunch.observe.history.timeline import is_number
from raylaunch.state import event_log, files, records, runs
from raylaunch.state.records import Cluster
from raylaunch.state.runs import Run

_NUMBERS = {
    "step",
    "seconds",
    "workers",
    "nodes",
    "committed",
    "from_step",
    "incarnation",
    "run_incarnation",
    "attempt",
    "seq",
    "rank",
    "count",
}
_LARGEST, _LATEST = 1 << 53, 1e10
"""Of counts; of times (the year 2286)."""


def sound(row: object) -> dict[str, Any] | None:
    """A line of events without fields of a wrong type; None if it is not an event."""
    row = event_log.current(row)
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str) or not is_number(row.get("time")):
        return None
    if not 0 <= row["time"] < _LATEST:
        return None
    found = {key: value for key, value in row.items() if _is_sound(key, value)}
    return found if found["kind"] != "commit" or "step" in found else None


def _is_sound(key: str, value: object) -> bool:
    if key in _NUMBERS:
        return is_number(value) and abs(float(str(value))) < _LARGEST
    return key != "on" or isinstance(value, list)


def run(directory: Path) -> tuple[Run | None, str]:
    """The record in run.json, or why it cannot be used."""
    try:
        found = Run.read(directory)
    except (RaylaunchError, TypeError, AttributeError) as error:
        return None, f"{records.RUN_FILE} cannot be read ({first_line(error)})"
    if found is None:
        return None, f"{records.RUN_FILE} is missing"
    texts, numbers = (found.name, found.state, found.cluster, found.reason), (found.created, found.updated)
    if not (
        all(isinstance(text, str) for text in texts)
        and all(is_number(number) and 0 <= number < _LATEST for number in numbers)
    ):
        return None, f"{records.RUN_FILE} is not a valid run record"
    return found, ""


def last_metrics(directory: Path) -> dict[str, Any]:
    """The last line with a loss; {} if there is none."""
    try:
        return runs.last_metrics(directory)
    except (OSError, TypeError):
        return {}


def cluster(directory: Path) -> tuple[Cluster | None, str]:
    """The record in cluster.json, or why it cannot be used."""
    try:
        found = Cluster.read(directory)
    except (RaylaunchError, TypeError, AttributeError) as error:
        return None, f"{records.CLUSTER_FILE} cannot be read ({first_line(error)})"
    if found is None:
        return None, f"{records.CLUSTER_FILE} is missing"
    texts = (found.name, found.backend, found.canary, *found.jobs)
    if not (all(isinstance(text, str) for text in texts) and is_number(found.created)):
        return None, f"{records.CLUSTER_FILE} is not a valid cluster record"
    return found, ""


def members(directory: Path) -> dict[str, dict[str, Any]]:
    """Node → its row of members.json; {} if it cannot be read."""
    try:
        table = files.read_json(directory / records.MEMBERS_FILE)
    except RaylaunchError:
        return {}
    rows = table.get("nodes") if isinstance(table, dict) else None
    return {str(row.get("name")): row for row in rows if isinstance(row, dict)} if isinstance(rows, list) else {}


def resource(row: dict[str, Any], name: str) -> int | None:
    """A resource of a node: cpus, memory (bytes), gpus (their number)."""
    resources = row.get("resources")
    value = resources.get(name) if isinstance(resources, dict) else None
    if isinstance(value, list):
        return len(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def gpus(directory: Path) -> dict[str, int]:
    """Node → number of GPUs, of a cluster directory; {} if unknown."""
    found = {name: resource(row, "gpus") for name, row in members(directory).items()}
    return {name: count for name, count in found.items() if count is not None}
