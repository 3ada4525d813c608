"""`raylaunch train`, `submit`, `attach` and `stop`: handing a run over, and following it."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from raylaunch.cli import options
from raylaunch.cli.show import note
from raylaunch.cli.up import given_back
from raylaunch.cluster import up
from raylaunch.config import loader
from raylaunch.config.schema import check_name, default_run_name
from raylaunch.errors import RaylaunchError, UsageError
from raylaunch.observe import follow_run, status
from raylaunch.scheduler import backends
from raylaunch.state import audit, files, records, requests, runs
from raylaunch.state.requests import RunAsk
from raylaunch.state.runs import FINAL
from raylaunch.training import precheck

_file = click.argument("path", metavar="CFG", type=click.Path(path_type=Path))
_run = click.option(
    "--run", "run_name", help="Name of the run. An existing name resumes that run. Default: the name of the file."
)
_fresh = click.option("--fresh", is_flag=True, help="Start from scratch. An existing run of that name is moved aside.")


def _run_name(given: str | None, path: Path) -> str:
    name = given or default_run_name(path)
    try:
        return check_name(name)
    except ValueError as error:
        raise UsageError(f"--run {name}: {error}") from error


@click.command()
@_file
@click.option("--cluster", "cluster_name", help="Cluster to train on. Default: cluster.name (main).")
@_run
@options.sets_option
@options.state_dir_option
@click.option("--detach", is_flag=True, help="Return as soon as the run is submitted to the cluster.")
@click.option("--check", is_flag=True, help="Check the configuration and exit. Needs no cluster.")
@_fresh
def train(
    path: Path, cluster_name: str | None, run_name: str | None, sets: tuple[str, ...], state_dir: Path | None,
    detach: bool, check: bool, fresh: bool,
) -> int:  # fmt: skip
    """Train on a running cluster. An existing run resumes from its last checkpoint, on any number of nodes."""
    flags = {"cluster__name": cluster_name, "cluster__state_dir": state_dir and str(state_dir)}
    config = options.load(path, sets, flags)
    where = up.state_dir_of(config)
    name = _run_name(run_name, path)
    if check:
        for line in precheck.check(config):
            click.echo(line)
        click.echo(f"{path}: nothing wrong was found")
        return 0
    directory, record = up.require_alive(where, config.cluster.name)
    most = loader.load_resolved(directory / records.CONFIG_FILE).max_nodes
    if (config.elastic.min_nodes or 1) > most:
        raise UsageError(
            f"elastic.min_nodes ({config.elastic.min_nodes}) exceeds the most nodes that cluster {record.name} may have ({most})",
            "Lower it, or start a larger cluster: the run could never start.",
        )
    if record.run is not None:
        raise UsageError(f"cluster {record.name} belongs to its run {record.run}", "Start one with `raylaunch up`.")
    run_dir = files.run_dir(where, name)
    asked = runs.with_absolute_paths(config)
    with runs.handing_over(run_dir):
        _refuse_living(where, run_dir)
        audit.add(where, "train", note, cluster=record.name, run=name, config=asked, fresh=fresh or None)
        with runs.prepared(run_dir, config, record.name, fresh):
            requests.ask(directory, RunAsk(run=name))
    if detach:
        note(f"run {name} is submitted to cluster {record.name}; `raylaunch attach {name}` follows it")
        return 0
    return _watch(run_dir, directory)


def _refuse_living(where: Path, run_dir: Path) -> None:
    """A run that goes on is not to be begun a second time."""
    old = runs.Run.read(run_dir)
    if old is not None and old.state in status.LIVE_RUNS and _is_live(where, old.cluster):
        raise UsageError(
            f"run {old.name} is {old.state} on cluster {old.cluster}",
            f"Follow it with `raylaunch attach {old.name}`, stop it with `raylaunch stop {old.name}`, "
            "or choose another --run.",
        )


def _is_live(where: Path, name: str) -> bool:
    if name not in up.names(where):
        return False
    directory, record = up.find(where, name)
    return not (directory / records.ENDED_FILE).exists() and up.alive_job(directory, record) is not None


@click.command(context_settings={"ignore_unknown_options": False})
@_file
@options.cluster_options
@_run
@options.sets_option
@options.state_dir_option
@_fresh
@click.argument("sbatch_options", nargs=-1, type=click.UNPROCESSED)
def submit(
    path: Path, run_name: str | None, sets: tuple[str, ...], state_dir: Path | None, fresh: bool,
    sbatch_options: tuple[str, ...], **flags: Any,
) -> None:  # fmt: skip
    """Submit one batch job that starts a cluster, trains, and releases the allocation.

    Prints the job id. The cluster is named after the run (or --name). `raylaunch down NAME` saves the run and cancels the
    job. The job's exit code is 0 if the run has finished.
    """
    name = _run_name(run_name, path)
    flags |= {"cluster__state_dir": state_dir and str(state_dir), "cluster__name": flags.get("cluster__name") or name}
    config = options.load(path, sets, flags, sbatch_options)
    where = up.state_dir_of(config)
    run_dir = files.run_dir(where, name)
    backend = backends.of(config.cluster.backend)
    up.refuse_living(files.cluster_dir(where, config.cluster.name))
    asked = runs.with_absolute_paths(config)
    with runs.handing_over(run_dir):
        _refuse_living(where, run_dir)
        audit.add(where, "submit", note, cluster=config.cluster.name, run=name, config=asked, fresh=fresh or None)
        with runs.prepared(run_dir, config, config.cluster.name, fresh), options.interruptible():
            directory, record = up.submit(config, backend, run=name)
            with given_back(directory, record, backend):
                up.check_once_queued(directory, record, backend)
    click.echo(record.jobs[0])


@click.command()
@click.argument("run")
@options.state_dir_option
def attach(run: str, state_dir: Path | None) -> int:
    """Follow a running training run. The exit code is 0 if it finishes, 1 if it fails."""
    where = options.state_dir(state_dir)
    run_dir, record = status.find_run(where, run)
    return _watch(run_dir, files.cluster_dir(where, record.cluster))


@click.command()
@click.argument("run")
@click.option("--no-wait", is_flag=True, help="Do not wait for the checkpoint.")
@options.state_dir_option
def stop(run: str, no_wait: bool, state_dir: Path | None) -> None:
    """Save a checkpoint and stop a run. The cluster keeps running."""
    where = options.state_dir(state_dir)
    run_dir, record = status.find_run(where, run)
    if record.state in FINAL:
        click.echo(f"run {run} is {record.state} already")
        return
    if not _is_live(where, record.cluster):
        raise RaylaunchError(
            f"run {run} is not running: its cluster {record.cluster} is down", "Its last checkpoint is kept."
        )
    audit.add(where, "stop", note, cluster=record.cluster, run=run)
    runs.request_stop(run_dir, "raylaunch stop")
    if no_wait:
        return
    for news in follow_run.follow(run_dir, files.cluster_dir(where, record.cluster)):
        record = news.run
    click.echo(f"run {run} is {record.state}{f': {record.reason}' if record.reason else ''}")


def _watch(run_dir: Path, cluster_dir: Path) -> int:
    """Follow a run to its end; Ctrl-C lets go of it."""
    config = loader.load_resolved(run_dir / records.CONFIG_FILE)
    name, total = run_dir.name, config.step_scheduler.max_steps
    console = Console(stderr=True, highlight=False)
    shower = _Bar(console, total) if console.is_terminal else _Lines(total)
    try:
        with shower:
            for news in follow_run.follow(run_dir, cluster_dir):
                shower.take(news)
    except KeyboardInterrupt:
        note(f"detached: run {name} continues; `raylaunch attach {name}` follows it, `raylaunch stop {name}` stops it")
        return 130
    return _verdict(news, run_dir)


def _verdict(news: follow_run.News, run_dir: Path) -> int:
    run, last = news.run, runs.last_metrics(run_dir)
    at = f" at step {last['step']}, loss {float(last['loss']):.4f}" if "loss" in last else ""
    if run.state == "finished":
        click.echo(f"run {run.name} is finished{at}\n  {run_dir}")
        return 0
    if run.state == "stopped":
        click.echo(f"run {run.name} is stopped and saved{at} ({run.reason})\n  {run_dir}")
        return 1
    if run.state == "failed":
        raise RaylaunchError(
            f"run {run.name} failed{at}: {run.reason}",
            f"See `raylaunch why {run.name}`. The logs are in {run_dir}.",
        )
    raise RaylaunchError(
        f"cluster {run.cluster} ended while run {run.name} was {run.state}{at}",
        "Start it again and repeat `raylaunch train`: the run resumes from its last checkpoint.",
    )


def _tell(event: dict[str, Any]) -> str | None:
    """An event as a line for people, None for those that say nothing new."""
    kind = event["kind"]
    if kind == "attempt_started" and event["from_step"]:
        return f"attempt {event['attempt']}: {event['workers']} workers, from step {event['from_step']}"
    if kind == "attempt_ended" and event["how"] in {"fault", "error"}:
        return f"attempt {event['attempt']} ended: {event['error']} (last commit: step {event['committed']})"
    if kind == "decision" and event["decision"] == "hold":
        return f"waiting: {event['reason']}"
    if kind == "exporting":
        return f"writing the weights to {event['to']}"
    if kind == "export_failed":
        return f"the weights could not be written: {event['reason']}\n  To try again: {event['hint']}"
    return None


def _state(news: follow_run.News) -> str:
    """The run's, and what it waits for: a cluster trains one run at a time."""
    behind = f" behind run{'s' * (len(news.behind) > 1)} {', '.join(news.behind)}" if news.behind else ""
    return news.run.state + behind


class _Lines:
    """Plain lines, for a pipe or a log."""

    def __init__(self, total: int) -> None:
        self._total, self._state = total, ""
        self._first: dict[str, Any] | None = None

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        sys.stderr.flush()

    def take(self, news: follow_run.News) -> None:
        for event in news.events:
            text = _tell(event)
            if text:
                click.echo(text, err=True)
        if (now := _state(news)) != self._state:
            self._state = now
            if now not in runs.FINAL:  # the last line says it, with more
                click.echo(f"run {news.run.name} is {now}", err=True)
        for row in news.metrics:
            if "loss" in row:
                click.echo(f"step {row['step']}/{self._total}  {_figures(row)}{self._left(row)}", err=True)

    def _left(self, row: dict[str, Any]) -> str:
        """The time left, at the pace of this attempt so far."""
        first = self._first
        if first is None or first["attempt"] != row["attempt"] or row["step"] <= first["step"]:
            self._first = row
            return ""
        seconds = (row["time"] - first["time"]) / (row["step"] - first["step"]) * (self._total - row["step"])
        return f"  {datetime.timedelta(seconds=round(seconds))} left"


def _figures(row: dict[str, Any]) -> str:
    rates = [f"  {row[f'{what}_per_s']:,.0f} {what}/s" for what in ("tokens", "samples") if f"{what}_per_s" in row]
    return f"loss {float(row['loss']):.4f}{''.join(rates)}  world {row['world_size']}"


class _Bar:
    """A progress display on a terminal."""

    def __init__(self, console: Console, total: int) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.fields[run]}[/bold] {task.fields[state]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}  {task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=total, run="", state="", figures="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def take(self, news: follow_run.News) -> None:
        for event in news.events:
            text = _tell(event)
            if text:
                self._progress.console.print(text)
        rows = [row for row in news.metrics if "loss" in row]
        fields: dict[str, Any] = {"run": news.run.name, "state": _state(news)}
        if rows:
            last = rows[-1]
            fields["completed"] = last["step"]
            fields["figures"] = _figures(last)
        self._progress.update(self._task, **fields)
