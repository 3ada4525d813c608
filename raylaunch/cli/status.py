"""`raylaunch status` and `raylaunch dashboard`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raylaunch.cli import options
from raylaunch.cli.show import table_width
from raylaunch.cluster import up
from raylaunch.errors import RaylaunchError, UsageError
from raylaunch.host import internal_errors
from raylaunch.observe import status as gathering
from raylaunch.observe.report import formatting
from raylaunch.state import records
from raylaunch.text import plural

_COLOURS = {"ready": "green", "running": "green", "finished": "green", "RUNNING": "green", "pending": "yellow",
            "starting": "yellow", "queued": "yellow", "holding": "yellow", "restarting": "yellow", "degraded": "yellow", "resuming": "yellow", "draining": "yellow",
            "lost": "red", "failed": "red", "interrupted": "red", "unknown": "red"}  # fmt: skip


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--all", "everything", is_flag=True, help="Include clusters that are down.")
@options.state_dir_option
def status(as_json: bool, everything: bool, state_dir: Path | None) -> None:
    """Show clusters, their jobs and nodes, and runs."""
    picture = gathering.gather(options.state_dir(state_dir), with_ended=everything or as_json)
    if as_json:
        click.echo(json.dumps(picture, indent=1))
        return
    console = Console(width=table_width(), highlight=False)
    if not picture["clusters"]:
        console.print("no cluster is up; `raylaunch up` starts one (`raylaunch status --all` shows ended ones)")
    for cluster in picture["clusters"]:
        _print_cluster(console, cluster)


def _coloured(word: str) -> str:
    colour = _COLOURS.get(word)
    return f"[{colour}]{word}[/{colour}]" if colour else word


def _print_cluster(console: Console, cluster: dict[str, Any]) -> None:
    jobs = ", ".join(
        f"{'joiner ' * j['joiner']}{j['id']} {j['state']}" + (f" ({j['reason']})" if j["reason"] else "")
        for j in cluster["jobs"]
    )
    console.print(
        f"[bold]{cluster['name']}[/bold]  {_coloured(cluster['state'])}  {cluster['backend']}  "
        f"incarnation {cluster['incarnation']}  job {jobs or 'gone'}"
    )
    if cluster["error"]:
        console.print(f"  {cluster['error']}")
    for work, error in cluster["internal_errors"].items():
        console.print("  " + internal_errors.line(work, error), style="red", markup=False)
    if cluster["state"] != "down":
        _print_wanted(console, cluster)
    if cluster["nodes"]:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in ("  node", "address", "role", "state", "job", ""):
            table.add_column(title)
        for node in cluster["nodes"]:
            table.add_row("  " + node["name"], node["address"], node["role"], _coloured(node["state"]), node["job"],
                          node["error"] or "")  # fmt: skip
        console.print(table)
    if cluster["runs"]:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in ("  run", "state", "step", "loss", "attempt", "workers", "directory"):
            table.add_column(title)
        for run in cluster["runs"]:
            loss = f"{run['loss']:.4f}" if isinstance(run["loss"], float) else str(run["loss"] or "")
            table.add_row("  " + run["name"], _coloured(run["state"]), str(run["step"] or ""), loss,
                          str(run["attempt"]), str(run["world_size"]), run["directory"])  # fmt: skip
        console.print(table)
        for run in cluster["runs"]:
            _print_tale(console, run)
    if cluster["dashboard"]:
        console.print(
            f"  dashboard {cluster['dashboard']['url']} on {cluster['dashboard']['node']}: {cluster['dashboard']['tunnel']}"
        )


def _print_tale(console: Console, run: dict[str, Any]) -> None:
    """Why it failed; goodput and the last recovery of a run that had one."""
    if run["state"] == "failed" and run["reason"]:
        text = formatting.clip(f"{run['name']}: {run['reason']}", table_width() - 2)
        console.print(Text(f"  {text}", style="red"))
    found = run["ledger"]
    last = found and found["last_recovery"]
    if not last:
        return
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in last["phases"].items() if seconds >= 0.05)
    under_way = "under way" if run["state"] in gathering.LIVE_RUNS else "cut short"
    took = under_way if last["total"] is None else f"{last['total']:.1f} s ({phases})"
    goodput = f"; goodput {found['goodput']:.0%}" if found["goodput"] is not None else ""
    cause = " ".join(filter(None, [*last["causes"], last["node"]]))
    lost = plural(last["steps_lost"] or 0, "step")
    console.print(f"  {run['name']}: last recovery: {cause}, {took}, {lost} lost{goodput}", markup=False)


def _print_wanted(console: Console, cluster: dict[str, Any]) -> None:
    """One line where the node loop has something to tell."""
    there = sum(node["state"] in {"ready", "starting", "restarting"} for node in cluster["nodes"])
    words = []
    if cluster["wanted"] not in {None, there}:
        words.append(f"{there} of {cluster['wanted']} wanted nodes")
    excluded, strikes = set(cluster["excluded"]), cluster["strikes"]
    words += [f"excluded: {', '.join(sorted(excluded))}"] if excluded else []
    struck = [f"{node} {count}" for node, count in sorted(strikes.items()) if node not in excluded]
    words += [f"strikes: {', '.join(struck)}"] if struck else []
    if cluster["cannot_submit"] and not cluster["watched"]:
        words.append(f"its nodes may not submit jobs: `raylaunch watch {cluster['name']}` does it for them")
    if words:
        console.print("  " + "; ".join(words))


@click.command()
@click.argument("name", required=False)
@options.state_dir_option
def dashboard(name: str | None, state_dir: Path | None) -> None:
    """Print the address of the Ray dashboard, the SSH tunnel to it, and where its token is."""
    where = options.state_dir(state_dir)
    if name is None:
        living = [c["name"] for c in gathering.gather(where)["clusters"]]
        if len(living) != 1:
            raise UsageError(
                f"{len(living)} clusters are running" + (f": {', '.join(living)}" if living else ""),
                "Name one." if living else "Start one with `raylaunch up`.",
            )
        name = living[0]
    directory, record = up.require_alive(where, name)
    way = up.tunnel(directory, record)
    if way is None:
        raise RaylaunchError(f"cluster {name} has no head yet", "Wait until `raylaunch status` says ready.")
    click.echo(f"{way[0]} on {way[1]}")
    click.echo(f"tunnel: {way[2]}")
    click.echo(f"token:  the page asks for the one in {directory / records.TOKEN_FILE}")
