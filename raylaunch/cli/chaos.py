"""`raylaunch chaos`: faults injected into a run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from raylaunch.cli import options
from raylaunch.cli.show import note
from raylaunch.errors import UsageError
from raylaunch.state import audit, files
from raylaunch.tools.chaos import recovery_summary, schedule
from raylaunch.tools.chaos.campaign import Campaign
from raylaunch.tools.chaos.faults import Faults, check
from raylaunch.tools.chaos.remote import of_cluster, sandbox_of
from raylaunch.tools.chaos.target import Victim


@click.command()
@click.argument("run")
@click.option("--every", default="60s", show_default=True, help="Mean time between two faults.")
@click.option(
    "--faults",
    default="worker,driver,raylet,agent",
    show_default=True,
    help="Kinds of faults, injected in turn (see above).",
)
@click.option("--for", "duration", help="Duration. Default: 10m, unless --count is given.")
@click.option("--count", type=click.IntRange(1), help="Number of faults.")
@click.option("--seed", default=0, show_default=True, help="Seed of the sequence of faults.")
@click.option("--limit", default="5m", show_default=True, help="Maximum time for a recovery.")
@click.option(
    "--hold", default="15s", show_default=True, help="Duration of the faults freeze, cut, slurmd and slurmctld."
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Also write the summary to this file, as JSON."
)
@options.state_dir_option
def chaos(run: str, state_dir: Path | None, **given: Any) -> None:
    """Inject faults into RUN, wait for each recovery, and print a summary.

    \b
      raylaunch chaos demo --faults node,worker,head --every 60s --for 10m --seed 7
    \b
    Faults on any of your clusters:
      worker, raylet, agent, driver, gcs, dashboard   kill that process
      hang                                            stop a worker (SIGSTOP)
    On a sandbox, as root, also:
      node, head         kill all processes of a node, or of the head; boot it later
      freeze, cut        freeze a node, or cut it off the network, for --hold
      drain              drain a node in Slurm, and resume it later
      slurmd, slurmctld  stop that daemon for --hold

    The exit code is 0 if the run recovered from every fault.
    """
    where = options.state_dir(state_dir)
    kinds = schedule.parse_kinds(given["faults"])
    every, limit, hold = (schedule.seconds(given[key]) for key in ("every", "limit", "hold"))
    count: int | None = given["count"]
    duration = schedule.seconds(given["duration"]) if given["duration"] else None if count else 600.0
    target: Path | None = given["json_file"] and given["json_file"].absolute()
    if target is not None and not target.parent.is_dir():
        raise UsageError(f"the directory {target.parent} does not exist", "Create it first.")
    victim = Victim.of(where, run)
    sandbox = sandbox_of(where, os.environ) if victim.cluster.backend == "slurm" else None
    check(kinds, sandbox, victim.cluster.backend)
    faults = Faults(victim, of_cluster(victim.cluster_dir, victim.cluster, sandbox), sandbox)
    audit.add(where, "chaos", note, cluster=victim.cluster.name, run=run)
    zero = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - zero:6.1f} s] {text}", err=True)

    campaign = Campaign(faults, schedule.plan(kinds, given["seed"]), every, limit, hold, say)
    began, good = time.time(), False
    try:
        with options.interruptible():
            good = campaign.go(duration, count)
    finally:  # also after Ctrl-C
        record = recovery_summary.of(victim.run_dir, campaign.outcomes, began, time.time(), given["seed"])
        click.echo(recovery_summary.table(record))
        if target is not None:
            files.write_json(target, record)
        click.echo(f"`raylaunch report {run}` draws loss, workers and recoveries over time")
    if not good or not record["steps"]["ok"]:
        raise SystemExit(1)
