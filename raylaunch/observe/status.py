"""The status of clusters, jobs, nodes and runs. Reads files, and queries each backend once for all jobs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from raylaunch.cluster import up
from raylaunch.cluster.node_loop import submitter
from raylaunch.errors import RaylaunchError, StateError, UsageError
from raylaunch.observe.history import goodput
from raylaunch.scheduler import backends
from raylaunch.scheduler.backends import Job
from raylaunch.state import event_log, files, members, records, runs
from raylaunch.state.head_state import HeadState
from raylaunch.state.members import NOBODY
from raylaunch.state.records import Cluster, Head
from raylaunch.state.runs import Run

LIVE_RUNS = {"queued", "running", "holding"}


def gather(state_dir: Path, with_ended: bool = False) -> dict[str, Any]:
    """The complete status, as `raylaunch status --json` prints it.

    If a backend does not respond, its clusters are in state "unknown", with the message in `error`.
    """
    found = []
    for name in up.names(state_dir):
        with contextlib.suppress(RaylaunchError):  # a cluster that cannot be read does not hide the others
            found.append(up.find(state_dir, name))
    jobs: dict[str, Job] = {}
    trouble: dict[str, str] = {}
    for name in sorted({c.backend for _, c in found}):
        asked = [(d, c) for d, c in found if c.backend == name]
        try:
            if name == "local":  # its jobs are known by their directories
                for directory, record in asked:
                    jobs |= backends.of(name).states(directory, record.jobs)
            else:
                jobs |= backends.of(name).states(asked[0][0], [job for _, c in asked for job in c.jobs])
        except RaylaunchError as error:
            trouble[name] = error.message
    every_run = _runs(state_dir)
    rows = [_cluster(d, c, jobs, trouble.get(c.backend), every_run) for d, c in found]
    names = {row["name"] for row in rows}
    return {
        "clusters": [row for row in rows if with_ended or row["state"] != "down"],
        "runs": [run for run in every_run if with_ended or run["cluster"] not in names],
    }


def _cluster(
    directory: Path, record: Cluster, jobs: dict[str, Job], trouble: str | None, every_run: list[dict[str, Any]]
) -> dict[str, Any]:
    own = [jobs[j] for j in record.jobs if j in jobs]
    try:
        table = members.living(directory, record)
    except StateError as error:  # the other clusters are shown all the same
        table, trouble = NOBODY, trouble or error.message
    nodes = table.nodes
    head = Head.read(directory)
    alive = any(job.alive for job in own)
    bases = {str(row.get("job")) for row in event_log.read(directory, "submitted", "successor")}
    joiners = {j.id for j in own} - bases
    if (directory / records.ENDED_FILE).exists() or (trouble is None and not alive):
        now = "down"
        nodes = ()
    elif trouble is not None:
        now = "unknown"
    elif all(job.pending for job in own if job.alive):
        begun = head is not None and head.canary == record.canary
        now = "resuming" if begun else "pending"
        nodes = ()
    else:
        now = "ready" if sum(node.state == "ready" for node in nodes) >= record.min_nodes else "starting"
        if now == "starting" and any(node.state == "lost" for node in nodes):
            now = "degraded"
    way = up.tunnel(directory, record) if now not in {"down", "pending", "resuming"} and head is not None else None
    mine = [dict(run) for run in every_run if run["cluster"] == record.name]
    for run in mine:
        if run["state"] in LIVE_RUNS and now == "down":
            run["state"] = "interrupted"
    return {
        "name": record.name,
        "backend": record.backend,
        "state": now,
        "error": trouble,
        "internal_errors": table.internal_errors if now != "down" else {},
        "incarnation": head.incarnation if head is not None and head.canary == record.canary else record.incarnation,
        "jobs": [
            {"id": j.id, "state": j.state, "reason": j.reason, "nodes": list(j.nodes), "joiner": j.id in joiners}
            for j in own
            if j.alive or not alive
        ],
        **_wanted(directory, record),
        "nodes": [
            node.model_dump(include={"name", "address", "role", "state", "job", "error"})
            for node in sorted(nodes, key=lambda node: node.name)
        ],
        "dashboard": {"url": way[0], "node": way[1], "tunnel": way[2]} if way else None,
        "runs": mine,
        "directory": str(directory),
    }


def _wanted(directory: Path, record: Cluster) -> dict[str, Any]:
    """The targets of the node loop, and its obstacles."""
    memory = HeadState.read(directory, record)
    return {
        "wanted": memory.wanted or None,
        "strikes": memory.strikes,
        "excluded": memory.excluded,
        "watched": submitter.is_watched(directory),
        "cannot_submit": submitter.head_refusal(directory, record),
    }


def state_of(state_dir: Path, run: Run) -> str:
    """The run's state: "interrupted" if it was alive when its cluster ended."""
    directory = files.cluster_dir(state_dir, run.cluster)
    over = not directory.is_dir() or (directory / records.ENDED_FILE).exists()
    return "interrupted" if run.state in LIVE_RUNS and over else run.state


def _runs(state_dir: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted((state_dir / "runs").glob(f"*/{records.RUN_FILE}")):
        with contextlib.suppress(RaylaunchError):  # a run that cannot be read does not hide the others
            run = Run.read(path.parent)
            if run is not None:
                rows.append(_run(path.parent, run))
    return rows


def _run(directory: Path, run: Run) -> dict[str, Any]:
    last = runs.last_metrics(directory)
    return {
        "name": run.name,
        "state": run.state,
        "cluster": run.cluster,
        "step": last.get("step"),
        "loss": last.get("loss"),
        "attempt": run.attempt,
        "world_size": run.world_size,
        "reason": run.reason,
        "directory": str(directory),
        "ledger": _ledger(directory),
    }


def _ledger(directory: Path) -> dict[str, Any] | None:
    """Goodput and the last recovery; None if the files cannot be read."""
    with contextlib.suppress(RaylaunchError, OSError, ValueError):
        return goodput.summary(directory)
    return None


def find_run(state_dir: Path, name: str) -> tuple[Path, Run]:
    """A run by name; UsageError with the existing names."""
    directory = files.run_dir(state_dir, name)
    run = Run.read(directory)
    if run is None:
        known = sorted(p.parent.name for p in (state_dir / "runs").glob(f"*/{records.RUN_FILE}"))
        raise UsageError(
            f"no run {name} in {state_dir}",
            f"Available: {', '.join(known)}." if known else "Start one with `raylaunch train`.",
        )
    return directory, run
