"""Why the last failed attempt of a run failed: first the findings of the driver, then the logs of the workers.

The driver knows which rank hung, which node was lost and which process a signal ended; the logs contain the reason. Of
a large run the logs of a few ranks are read: those with an error file (the earliest first), the one that the driver
names, and some others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylaunch.observe.why import log_lines
from raylaunch.observe.why.log_lines import Line
from raylaunch.observe.why.rules import Kind
from raylaunch.observe.why.verdict import NOTHING, Evidence, Verdict, judge, on
from raylaunch.state import files, records
from raylaunch.state.runs import Run

OOM_WITHIN = 30.0
"""Seconds between a worker's end and its node's next measurement, at the most."""
READ = 16
"""Logs of ranks that are read."""
_LOST: dict[str, tuple[Kind, str]] = {
    "node_lost": ("node_failure", "Exclude it if it happens again (elastic.max_strikes does this); see `raylaunch logs "
                  "CLUSTER --node`, or ask the administrators."),
    "head_lost": ("node_failure", "Its node or its Ray processes died: see `raylaunch logs CLUSTER`."),
    "driver_lost": ("unknown", "See the end of logs/driver.log in the run directory. Was it killed for memory?"),
    "hardware": ("gpu_fault", "Exclude the node (slurm.exclude) and inform the administrators."),
}  # fmt: skip
_OURS = re.compile(r"raylaunch\.driver|^(?:alerts|tracking): ")
"""In the driver's log: its own messages, and those of the processes next to it, whose failures do not end a run."""
_KILLED = (
    "It was killed (SIGKILL) or crashed, usually for lack of memory: see `sacct -j JOB -o MaxRSS,State` and dmesg."
)


@dataclass(frozen=True)
class Failed:
    """An attempt that ended by a fault or an error, by the driver's events."""

    attempt: int
    how: str
    cause: str
    text: str
    rank: int | None
    node: str | None
    line: Line


def last_failure(run_dir: Path) -> Failed | None:
    """None if no attempt failed."""
    found = None
    for line, event in _events(run_dir / files.EVENTS_FILE, "attempt_ended"):
        if event.get("how") in ("fault", "error"):
            found = Failed(
                int(event["attempt"]), str(event["how"]), str(event.get("cause") or ""), str(event.get("error") or ""),
                event.get("rank"), event.get("node"), line,
            )  # fmt: skip
    return found


def explain(run_dir: Path, failed: Failed) -> Verdict:
    """The verdict on that attempt."""
    here = Evidence(failed.line.file, failed.line.number, failed.text)
    if failed.cause == "hang":
        return _hang(run_dir, failed, here)
    said = judge(_lines(run_dir, failed))
    known = _LOST.get(failed.cause)
    if known is not None and known[0] == "node_failure" and said.kind not in {"preempted", "time_limit"}:
        kind, action = known
        return Verdict(kind, failed.text, failed.rank, failed.node, 0.9, (here,), said.cascade, action)
    if said.confidence >= 0.5:
        return on(said, rank=said.rank if said.rank is not None else failed.rank, host=said.host or failed.node)
    if known is not None:
        return Verdict(known[0], failed.text, failed.rank, failed.node, 0.8, (here,), said.cascade, known[1])
    if failed.cause == "worker_lost":
        kernel = _oom_kill(run_dir, failed)
        text = f"{failed.text}; " + ("the kernel killed it for lack of memory" if kernel else "it reported no error")
        what: Kind = "oom_host" if kernel else "unknown"  # a SIGKILL has no sender: somebody's, chaos's, the kernel's
        evidence = (here, *([kernel] if kernel else []))
        sure = 0.97 if kernel else 0.5
        return Verdict(what, text, failed.rank, failed.node, sure, evidence, said.cascade, _KILLED)
    if failed.how == "error":
        own: Kind = said.kind if said.kind != "unknown" else "python_exception"
        return Verdict(own, failed.text, failed.rank, failed.node, 0.8, (here,), said.cascade, "See that rank's log.")
    return on(NOTHING, cause=failed.text or None, rank=failed.rank, host=failed.node, evidence=(here,))


def _hang(run_dir: Path, failed: Failed, here: Evidence) -> Verdict:
    stack: list[Evidence] = []
    for line, event in _events(run_dir / files.EVENTS_FILE, "hang"):
        if event.get("attempt") == failed.attempt:
            stack = [
                Evidence(line.file, line.number, str(event.get("reason"))),
                Evidence(str(event.get("stack")), 1, str(event.get("line"))),
            ]
    return Verdict(
        "hang", failed.text, failed.rank, failed.node, 0.95, (here, *stack), (),
        "See its stack: it waits (for data, a lock, a file system?), or took a different branch than the other ranks.",
    )  # fmt: skip


def _oom_kill(run_dir: Path, failed: Failed) -> Evidence | None:
    """The event of the node's agent that the kernel killed a process there, around the end of the attempt."""
    run, ended = Run.read(run_dir), json.loads(failed.line.text).get("time")
    if run is None or failed.node is None or not isinstance(ended, (int, float)):
        return None
    events = run_dir.parent.parent / "clusters" / run.cluster / files.EVENTS_FILE
    for line, event in _events(events, "oom_kill"):
        if event.get("node") == failed.node and abs(float(event.get("time") or 0) - ended) < OOM_WITHIN:
            return Evidence(line.file, line.number, line.text)
    return None


def _lines(run_dir: Path, failed: Failed) -> Iterator[Line]:
    folder = files.attempt_dir(run_dir, failed.attempt)
    errors = []
    for path in folder.glob("rank-*.error.json"):
        record = files.read_json(path) or {}
        errors.append(
            (float(record.get("time") or 0.0), int(record.get("rank") or 0), str(record.get("node") or "") or None)
        )
    hosts = {rank: node for _, rank, node in errors}
    first = [failed.rank] if failed.rank is not None else []
    others = sorted(int(path.stem.removeprefix("rank-")) for path in folder.glob("rank-*.log"))
    ranks = dict.fromkeys([*(rank for _, rank, _ in sorted(errors, key=lambda e: e[:2])), *first, *others])
    for rank in list(ranks)[:READ]:
        path = folder / f"rank-{rank}.log"
        if path.exists():
            yield from log_lines.lines(path, rank, hosts.get(rank))
    driver = run_dir / records.LOGS / "driver.log"
    if driver.exists():  # Ray's messages about workers that it killed
        yield from (line for line in log_lines.lines(driver) if not _OURS.search(line.text))


def _events(path: Path, kind: str) -> Iterator[tuple[Line, dict[str, Any]]]:
    """The events of that kind. Only these lines are parsed, since ten days of events are many."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as source:
        for number, text in enumerate(source, 1):
            if f'"{kind}"' not in text:
                continue
            try:
                event = json.loads(text)
            except ValueError:  # the line that is being written
                continue
            if isinstance(event, dict) and event.get("kind") == kind:
                yield Line(str(path), number, text.strip()), event


def describe(run: Run, now: str) -> str:
    """The state of a run that did not fail."""
    reason = f" ({run.reason})" if run.reason else ""
    return f"run {run.name} is {now}{reason}"
