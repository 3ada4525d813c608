"""`raylaunch watch`: the live view; and the node loop on the login node, where compute nodes may not submit jobs."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import click
from rich.console import Console, Group
from rich.live import Live

from raylaunch.checkpoint.events import Event
from raylaunch.cli import options
from raylaunch.cli.show import note
from raylaunch.cluster import up
from raylaunch.cluster.node_loop import login_node, submitter
from raylaunch.config import loader
from raylaunch.errors import UsageError
from raylaunch.observe.live import keyboard, screen, snapshot
from raylaunch.scheduler import backends
from raylaunch.state import files, records, thread_deaths
from raylaunch.state.records import Cluster
from raylaunch.state.runs import Run

ENOUGH = 40, 8
"""Columns and lines, below which a terminal is taken for as large as this."""


@click.command()
@click.argument("name", required=False)
@click.option("--submit", is_flag=True, help="Submit the cluster's jobs from here, in place of its head.")
@click.option("--once", is_flag=True, help="Print the view once and exit.")
@click.option(
    "--every", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, help="Refresh interval in seconds."
)
@options.state_dir_option
def watch(name: str | None, submit: bool, once: bool, every: float, state_dir: Path | None) -> None:
    """Show a cluster and its run live. NAME is a cluster or a run; default: the only running cluster.

    Keys: m shows everything, n nodes (the worst first), e events, l logs; q or Ctrl-C exits. The cluster keeps running.

    Where compute nodes may not submit jobs (or with --submit), this command submits them while it runs: it replaces lost
    nodes, and submits another job when the cluster's own has ended.
    """
    where = options.state_dir(state_dir)
    if name is not None and name not in up.names(where) and Run.read(files.run_dir(where, name)) is None:
        raise UsageError(f"no run or cluster {name} in {where}", "`raylaunch status --all` lists all.")
    cluster_dir, run_dir = snapshot.find(where, name)
    record = Cluster.read(cluster_dir)
    if record is None:
        raise UsageError(f"cluster {cluster_dir.name} no longer exists", "`raylaunch status --all` lists all.")
    submit = submit or (not once and bool(submitter.head_refusal(cluster_dir, record)))
    if submit and (cluster_dir / records.ENDED_FILE).exists():
        raise UsageError(f"cluster {record.name} is down", f"Start it with `raylaunch up --name {record.name}`.")
    if once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        if submit:
            until_it_ends(cluster_dir, record)
        else:
            _print_once(snapshot.SnapshotReader(cluster_dir, run_dir))
        return
    thread_deaths.record(cluster_dir, node="the login node")
    if submit:
        _submit_beside(cluster_dir, record)
    _show(snapshot.SnapshotReader(cluster_dir, run_dir), every)


def until_it_ends(directory: Path, record: Cluster) -> None:
    """Submit in the foreground, and say what is done."""
    config = loader.load_resolved(directory / records.CONFIG_FILE)
    with submitter.watching(directory) as held:
        if not held:
            raise UsageError(f"cluster {record.name} is already watched", "One `raylaunch watch` is enough.")
        note(f"watching cluster {record.name} until it ends; Ctrl-C exits, the cluster keeps running")
        reason = login_node.watch(directory, config, backends.of(record.backend), _say)
    click.echo(f"cluster {record.name} has ended: {reason}")


def _say(event: Event) -> None:
    fields = event.values()
    what = fields.pop("decision", event.kind)
    note(f"{what}: " + " ".join(f"{k}={v}" for k, v in fields.items() if v not in ("", [], ())))


def _submit_beside(directory: Path, record: Cluster) -> None:
    """The same in a thread behind the view; what it does is among the cluster's events."""

    def work() -> None:
        config = loader.load_resolved(directory / records.CONFIG_FILE)
        with submitter.watching(directory) as held:
            if held:
                login_node.watch(directory, config, backends.of(record.backend), lambda event: None)

    threading.Thread(target=work, name="submits", daemon=True).start()


def _print_once(reader: snapshot.SnapshotReader) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    picture = reader.read()
    shown = screen.lines(picture, "main", console.width, 40)
    for line in shown[:-1]:
        if line.plain.strip():
            console.print(line)


class _Looks:
    """Looks every few seconds, in a thread: a file system that stalls must not hold the keys."""

    def __init__(self, reader: snapshot.SnapshotReader, every: float) -> None:
        self._reader, self._every = reader, every
        self.picture = reader.read()
        threading.Thread(target=self._work, name="looks", daemon=True).start()

    def _work(self) -> None:
        while True:
            time.sleep(self._every)
            self.picture = self._reader.read()


def _show(reader: snapshot.SnapshotReader, every: float) -> None:
    looks, view = _Looks(reader, every), "main"
    console = Console(highlight=False)
    with keyboard.keys() as key, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            width, height = max(ENOUGH[0], console.width), max(ENOUGH[1], console.height)
            logs = reader.tails(height) if view == "logs" else []
            age = time.time() - looks.picture.time - every
            live.update(Group(*screen.lines(looks.picture, view, width, height, logs, age)), refresh=True)
            pressed = key(every)
            if pressed == "q":
                return
            view = screen.VIEWS.get(pressed, view)
