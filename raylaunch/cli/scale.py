"""`raylaunch scale`: how many nodes a living cluster is to have."""

from __future__ import annotations

import time
from pathlib import Path

import click

from raylaunch.cli import options
from raylaunch.cli.show import LiveLine, note
from raylaunch.cluster import up
from raylaunch.cluster.node_loop import submitter
from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import RaylaunchError, SlurmUnavailable, UsageError
from raylaunch.scheduler import backends
from raylaunch.state import audit, event_log, members, records, requests
from raylaunch.state.records import Cluster
from raylaunch.state.requests import ScaleAsk

_EVERY, _JOBS_EVERY = 0.2, 3.0


@click.command()
@click.argument("name")
@click.argument("nodes", type=int)
@click.option("--no-wait", is_flag=True, help="Return as soon as the request is submitted.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait for the nodes.")
@options.state_dir_option
def scale(name: str, nodes: int, no_wait: bool, timeout: float, state_dir: Path | None) -> None:
    """Scale cluster NAME to NODES nodes. No training step is lost.

    The maximum is the MAX of `raylaunch up --nodes MIN:MAX`:

    \b
      raylaunch up --nodes 3:8
      raylaunch scale main 6
    """
    directory, record = up.find(options.state_dir(state_dir), name)
    config = loader.load_resolved(directory / records.CONFIG_FILE)
    _check(name, config, nodes)
    up.require_alive(options.state_dir(state_dir), name)
    refusal = submitter.head_refusal(directory, record)
    if refusal and not submitter.is_watched(directory) and nodes > _ready(directory, record):
        raise RaylaunchError(
            f"the cluster's nodes may not submit jobs ({refusal})",
            f"Run `raylaunch watch {name}` on a login node: it submits jobs for them. Then scale again.",
        )
    audit.add(options.state_dir(state_dir), "scale", note, cluster=name, nodes=nodes)
    requests.ask(directory, ScaleAsk(nodes=nodes))
    if no_wait:
        note(f"cluster {name} scales to {nodes} nodes; see `raylaunch status`")
        return
    with LiveLine() as line:
        _wait(directory, record, nodes, timeout, line)
    click.echo(f"cluster {name} has {nodes} nodes")


def _check(name: str, config: Config, nodes: int) -> None:
    least, most = config.elastic.min_nodes or 1, config.max_nodes
    if nodes < least:
        raise UsageError(
            f"{nodes} nodes are below the minimum of {least}",
            "The minimum is elastic.min_nodes of the cluster's configuration; `raylaunch down` stops the cluster.",
        )
    if nodes > most:
        raise UsageError(
            f"{nodes} nodes are above the maximum of {most}",
            f"It is the MAX of `up --nodes MIN:MAX` (or elastic.max_nodes): `raylaunch down {name}`, and start it "
            f"again with --nodes {config.slurm.min_nodes}:{nodes}; `raylaunch train` then resumes its run.",
        )


def _ready(directory: Path, record: Cluster) -> int:
    return sum(node.state == "ready" for node in members.living(directory, record).nodes)


def _wait(directory: Path, record: Cluster, nodes: int, timeout: float, line: LiveLine) -> None:
    """Until as many nodes are ready. What is waited for is said; giving up waiting changes nothing."""
    deadline = time.monotonic() + timeout
    ask, why = 0.0, ""
    while (ready := _ready(directory, record)) != nodes:
        now = time.monotonic()
        if (directory / records.ENDED_FILE).exists():
            raise RaylaunchError(f"cluster {record.name} has ended in the meantime", f"See {directory / records.LOGS}.")
        if now >= ask:
            ask, why = now + _JOBS_EVERY, _waits_for(directory, record, nodes)
        if now > deadline:
            raise RaylaunchError(
                f"{ready} of {nodes} nodes are ready after {timeout:g} s" + (f"; {why}" if why else ""),
                "The cluster keeps trying; see `raylaunch status`.",
            )
        line(f"{ready} of {nodes} nodes are ready" + (f"; {why}" if why else ""))
        time.sleep(_EVERY)


def _waits_for(directory: Path, record: Cluster, nodes: int) -> str:
    """What stands between the cluster and its nodes."""
    now = Cluster.read(directory) or record
    if now.canary != record.canary:
        raise RaylaunchError(f"cluster {record.name} was restarted in the meantime", "Scale it again.")
    rows = members.living(directory, record).nodes
    leaving = [node.name for node in rows if node.state == "draining"]
    starting = [node.name for node in rows if node.state == "starting"]
    if starting:
        return f"{', '.join(starting)} starts"
    if leaving:
        return f"the run leaves {', '.join(leaving)}"
    refusal = submitter.head_refusal(directory, record)
    if refusal and not submitter.is_watched(directory):
        return f"no joiner can be submitted ({refusal}): run `raylaunch watch {record.name}` on a login node"
    try:
        jobs = backends.of(record.backend).states(directory, now.jobs)
    except SlurmUnavailable:
        return "Slurm does not answer"
    pending = [j for j in jobs.values() if j.pending]
    if pending:
        return "; ".join(f"job {j.id} is pending ({j.blocked or j.reason or 'no reason yet'})" for j in pending)
    said = [e for e in event_log.read_all(directory) if e["kind"] == "node_decision"]
    return str(said[-1]["reason"]) if said and _ready(directory, record) < nodes else ""
