"""The history of a state directory: every run and every life of a cluster, with its hours.

    runs/*/run.json, the relevant lines of events.jsonl, the end of metrics.jsonl → runs
    clusters/*/events.jsonl, members.json, config.yaml's slurm.account            → lives, and the nodes held in them

Takes a second or two for a thousand runs: no file is read twice, only the relevant events are parsed, and Slurm is
queried once, for clusters without a recorded end. A run or cluster that cannot be read gets a row with the reason.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raylaunch.errors import RaylaunchError
from raylaunch.observe.history import node_hours, safe_read
from raylaunch.observe.history.node_hours import Interval, NodeUse
from raylaunch.observe.history.timeline import FINAL, Attempt, Row, is_number, read, settled
from raylaunch.scheduler import backends
from raylaunch.state import event_log, files, records
from raylaunch.state.records import Cluster

_OF_RUN = ("queued", "attempt_started", "attempt_ended", "finished", "failed", "stopped")
_OF_CLUSTER = (
    "submitted", "successor", "joiner_submitted", "joiner_adopted", "node_joined", "node_lost", "node_ended",
    "node_failed", "requeued", "ended", "cluster_down",
)  # fmt: skip
_ACCOUNT = re.compile(r"^slurm:\n(?:[ \t]+.*\n)*?[ \t]+account: *(.*)$", re.MULTILINE)


@dataclass
class RunRow:
    """One run. Times in seconds since the epoch; None: unknown."""

    run: str
    state: str = "unreadable"
    reason: str = ""
    cluster: str = ""
    account: str | None = None
    began: float | None = None
    ended: float | None = None
    """Its last end, or its last activity; None: it is still running."""
    took: float = 0.0
    """Seconds, without the time between an end and the next submission."""
    nodes: int = 0
    """The maximum over its attempts."""
    steps: int | None = None
    node_hours: float | None = None
    gpu_hours: float | None = None
    """Held, as in the report."""
    attempts: int = 0


@dataclass
class LifeRow:
    """One life of a cluster: from one `up` or `submit` to its end."""

    cluster: str
    state: str = "unreadable"
    """up, down, lost (no recorded end, but nothing is running), unknown (Slurm does not respond)."""
    reason: str = ""
    jobs: list[str] = field(default_factory=list)
    account: str | None = None
    began: float | None = None
    ended: float | None = None
    took: float = 0.0
    nodes: int = 0
    node_hours: float | None = None
    gpu_hours: float | None = None


@dataclass
class StateHistory:
    """The complete history, oldest first. `trouble`: failed queries."""

    runs: list[RunRow]
    clusters: list[LifeRow]
    trouble: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Cluster:
    """A cluster directory, read once."""

    name: str
    events: list[Row]
    gpus: dict[str, int]
    account: str | None
    record: Cluster | None
    signs: float
    """Time of its last activity."""
    trouble: str = ""
    alive: bool | None = None
    """None: Slurm does not respond."""
    lives: list[node_hours.Life] = field(default_factory=list)
    holds: list[NodeUse] = field(default_factory=list)


def gather(state_dir: Path, now: float, since: float = 0.0) -> StateHistory:
    """The runs and clusters of a state directory that were active after `since`."""
    clusters = {path.name: _cluster(path) for path in _folders(state_dir / "clusters")}
    trouble = _ask_who_lives(state_dir, clusters.values())
    rows = []
    for path in _folders(state_dir / "runs"):
        row, active, attempts = _run(path, clusters, now)
        rows.append((row, active, attempts))
        own = clusters.get(row.cluster)
        if own is not None and active:
            own.signs = max(own.signs, min(now, active[-1][1]))
    for one in clusters.values():
        one.lives, one.holds = node_hours.lives(one.events, now if one.alive else one.signs)
    for row, active, attempts in rows:
        _add_hours(row, active, attempts, clusters.get(row.cluster))
    lives = [life for one in clusters.values() for life in _lives(one, now)]
    kept_runs = [row for row, _, _ in rows if _is_after(row, since)]
    kept_lives = [row for row in lives if _is_after(row, since)]
    for kept in (kept_runs, kept_lives):
        kept.sort(key=lambda r: r.began or 0.0)
    return StateHistory(kept_runs, kept_lives, trouble)


def _is_after(row: RunRow | LifeRow, since: float) -> bool:
    return not since or row.began is None or row.ended is None or row.ended >= since


def _folders(where: Path) -> list[Path]:
    try:
        return sorted(path for path in where.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


# -- runs ------------------------------------------------------------------------------------------------


def _run(path: Path, clusters: dict[str, _Cluster], now: float) -> tuple[RunRow, list[Interval], list[Attempt]]:
    row = RunRow(path.name)
    record, row.reason = safe_read.run(path)
    events = settled(_telling(path / files.EVENTS_FILE, _OF_RUN))
    history = read(events, [])
    last = safe_read.last_metrics(path)
    moment, step = last.get("time"), last.get("step")
    signs = [e["time"] for e in events[-1:]]
    if isinstance(moment, (int, float)) and is_number(moment):
        signs.append(float(moment))
    if record is not None:
        row.state, row.reason, row.cluster, row.began = record.state, record.reason, record.cluster, record.created
        signs.append(record.updated)
    own = clusters.get(row.cluster)
    goes_on = record is not None and record.state not in FINAL
    lives = goes_on and own is not None and own.alive is not False
    if goes_on and not lives:
        row.state = "interrupted"
    until = now if lives else min(now, max(signs, default=now))
    active = node_hours.active(events, until)
    row.began = active[0][0] if active else row.began
    row.ended = None if lives else active[-1][1] if active else until if record is not None else None
    row.took = sum(end - start for start, end in active)
    row.steps = step if isinstance(step, int) else None
    row.nodes = max((len(a.nodes) for a in history.attempts), default=0)
    row.attempts = len(history.attempts)
    row.account = own.account if own is not None and own.account is not None else _account(path)
    return row, active, history.attempts


def _add_hours(row: RunRow, active: list[Interval], attempts: Sequence[Attempt], own: _Cluster | None) -> None:
    """As in the report; from the attempts alone if the cluster's events are missing."""
    seconds = node_hours.node_seconds(own.holds, active) if own is not None else {}
    gpus = own.gpus if own is not None else {}
    if not seconds and active:
        for one, (start, end) in node_hours.spans(attempts, active[-1][1]):
            for node in one.nodes:
                seconds[node] = seconds.get(node, 0.0) + end - start
    if seconds:
        row.node_hours = sum(seconds.values()) / 3600
        row.gpu_hours = _gpu_hours(seconds, gpus)


def _gpu_hours(seconds: dict[str, float], gpus: dict[str, int]) -> float | None:
    if not gpus:
        return None
    most = max(gpus.values())
    return sum(amount * gpus.get(node, most) for node, amount in seconds.items()) / 3600


# -- clusters ----------------------------------------------------------------------------------------------


def _cluster(path: Path) -> _Cluster:
    record, trouble = safe_read.cluster(path)
    events = settled(_telling(path / files.EVENTS_FILE, _OF_CLUSTER))
    signs = [e["time"] for e in events[-1:]]
    with contextlib.suppress(OSError):
        signs.append((path / records.MEMBERS_FILE).stat().st_mtime)
    return _Cluster(path.name, events, safe_read.gpus(path), _account(path), record, max(signs, default=0.0), trouble)


def _ask_who_lives(state_dir: Path, clusters: Iterable[_Cluster]) -> list[str]:
    """Which clusters are running: one query per backend, only for clusters without a recorded end."""
    trouble: list[str] = []
    open_: dict[str, list[_Cluster]] = {}
    for one in clusters:
        one.alive = False
        if one.record is not None and not (files.cluster_dir(state_dir, one.name) / records.ENDED_FILE).exists():
            open_.setdefault(one.record.backend, []).append(one)
    for name, asked in open_.items():
        try:
            backend = backends.of(name)
            if name == "local":  # its jobs are known by their directories
                for one in asked:
                    one.alive = _any_lives(backend, state_dir, [one])
            else:
                jobs = backend.states(state_dir, [job for one in asked for job in _jobs(one)])
                for one in asked:
                    one.alive = any(job in jobs and jobs[job].alive for job in _jobs(one))
        except (RaylaunchError, OSError, TypeError, ValueError, KeyError) as error:
            trouble.append(f"{name}: cannot check if {len(asked)} clusters are running: {str(error).splitlines()[0]}")
            for one in asked:
                one.alive = None
    return trouble


def _any_lives(backend: backends.Backend, state_dir: Path, asked: Sequence[_Cluster]) -> bool:
    return any(
        job.alive
        for one in asked
        for job in backend.states(files.cluster_dir(state_dir, one.name), _jobs(one)).values()
    )


def _jobs(one: _Cluster) -> tuple[str, ...]:
    return one.record.jobs if one.record is not None else ()


def _lives(one: _Cluster, now: float) -> list[LifeRow]:
    if one.trouble and not one.lives:
        return [LifeRow(one.name, reason=one.trouble, account=one.account)]
    rows = []
    for index, life in enumerate(one.lives):
        is_last = life is one.lives[-1]
        after = one.lives[index + 1].began if not is_last else now
        end = life.ended if life.ended is not None else after if is_last and one.alive else None
        if life.ended is not None:
            said = "down"
        elif is_last and one.alive is not False:
            said = "up" if one.alive else "unknown"
        else:
            said = "lost"
        until = end if end is not None else min(after, max(life.last, one.signs if is_last else 0.0))
        seconds = node_hours.node_seconds(one.holds, [(life.began, until)])
        rows.append(
            LifeRow(
                one.name, said, life.reason or (one.trouble if is_last else ""), list(dict.fromkeys(life.jobs)), one.account,
                life.began, None if said in {"up", "unknown"} else until, max(0.0, until - life.began), life.nodes,
                sum(seconds.values()) / 3600, _gpu_hours(seconds, one.gpus),
            )
        )  # fmt: skip
    return rows


# -- files ---------------------------------------------------------------------------------------------------


def _telling(path: Path, kinds: Sequence[str]) -> list[Row]:
    """The lines of these kinds, and the last line, for its time."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    pattern = event_log.pattern(kinds)
    wanted = [line for line in lines if pattern.search(line)]
    if lines and (not wanted or wanted[-1] is not lines[-1]):
        wanted.append(lines[-1])
    found: list[Row] = []
    for line in wanted:
        with contextlib.suppress(ValueError, RecursionError):
            row = safe_read.sound(json.loads(line))
            if row is not None:
                found.append(row)
    return found


def _account(directory: Path) -> str | None:
    """slurm.account of a resolved config.yaml, one line per key: parsing a thousand YAML files is slow."""
    try:
        match = _ACCOUNT.search((directory / records.CONFIG_FILE).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    value = match[1].strip() if match is not None else ""
    return None if value in {"", "null", "~"} else value.strip("'\"")
