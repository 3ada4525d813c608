"""`raylaunch history`: what there was, and who asked for what."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raylaunch.cli import options
from raylaunch.cli.show import note, table_width
from raylaunch.errors import UsageError
from raylaunch.observe.history import accounting
from raylaunch.observe.history.accounting import StateHistory
from raylaunch.observe.report import formatting
from raylaunch.state import audit
from raylaunch.tools.chaos import schedule


@click.command()
@click.option("--since", help="Only since then: 7d, 24h, or a date (2026-11-01).")
@click.option(
    "--audit", "trail", is_flag=True, help="Show the audit log: who ran which command, when, with which configuration."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.state_dir_option
def history(since: str | None, trail: bool, as_json: bool, state_dir: Path | None) -> None:
    """Show past and present runs and clusters: state, times, nodes, steps, node-hours and GPU-hours.

    \b
      raylaunch history --since 30d
      raylaunch history --audit
    """
    where, now = options.state_dir(state_dir), time.time()
    after = _since(since, now) if since else 0.0
    if trail:
        _print_trail(where, after, as_json)
        return
    found = accounting.gather(where, now, after)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
        return
    for line in found.trouble:
        note(line)
    _print(found)


def _since(text: str, now: float) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        pass
    try:
        return now - schedule.seconds(text)
    except UsageError as error:
        raise UsageError(f"--since {text}: not a duration or a date", "Write 7d, 24h, or 2026-11-01.") from error


def _print(found: StateHistory) -> None:
    if not found.runs and not found.clusters:
        click.echo("nothing yet; `raylaunch up` and `raylaunch train` begin it")
        return
    _table(found.runs, [
        ("began", 60, "", lambda r: _when(r.began)), ("run", 0, "", lambda r: r.run), ("state", 0, "", lambda r: r.state),
        ("cluster", 112, "", lambda r: r.cluster), ("account", 112, "", lambda r: r.account),
        ("took", 60, "right", lambda r: _took(r.took)), ("nodes", 112, "right", lambda r: r.nodes or ""),
        ("steps", 80, "right", lambda r: "" if r.steps is None else f"{r.steps:,}"),
        ("node-hours", 112, "right", lambda r: _hours(r.node_hours)), ("GPU-hours", 0, "right", lambda r: _hours(r.gpu_hours)),
    ])  # fmt: skip
    for row in found.runs:
        if row.state == "unreadable":
            click.echo(click.style(f"  {row.run}: {row.reason}", fg="red"))
    click.echo()
    _table(found.clusters, [
        ("began", 60, "", lambda c: _when(c.began)), ("cluster", 0, "", lambda c: c.cluster), ("state", 0, "", lambda c: c.state),
        ("jobs", 80, "", lambda c: formatting.clip(", ".join(c.jobs), 40)), ("account", 112, "", lambda c: c.account),
        ("took", 60, "right", lambda c: _took(c.took)), ("nodes", 80, "right", lambda c: c.nodes or ""),
        ("node-hours", 112, "right", lambda c: _hours(c.node_hours)), ("GPU-hours", 0, "right", lambda c: _hours(c.gpu_hours)),
    ])  # fmt: skip


def _table(rows: Sequence[Any], columns: Sequence[tuple[str, int, str, Callable[[Any], object]]]) -> None:
    """`columns`: title, from which width of the terminal on it is shown, side, cell of a row."""
    width = table_width()
    shown = [column for column in columns if width >= column[1]]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title, _, side, _ in shown:
        table.add_column(title, justify="right" if side else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell(row) or "")) for *_, cell in shown))
    Console(width=width, highlight=False).print(table)


def _when(moment: float | None) -> str:
    if moment is None:
        return ""
    return formatting.when(moment)[:16] if table_width() >= 100 else formatting.day(moment)


def _took(seconds: float) -> str:
    return formatting.duration(seconds) if seconds else ""


def _hours(hours: float | None) -> str:
    return "" if hours is None else formatting.hours(3600 * hours)


def _print_trail(where: Path, after: float, as_json: bool) -> None:
    rows = [row for row in audit.read(where) if float(row["time"]) >= after]
    if as_json:
        click.echo(json.dumps({"audit": rows}, indent=1))
        return
    if not rows:
        click.echo("nothing was asked yet")
        return
    known = {"time", "user", "uid", "host", "action", "cluster", "run", "config", "outcome"}

    def what(row: dict[str, Any]) -> str:
        more = [f"{key}={value}" for key, value in row.items() if key not in known]
        more += [f"({row['outcome']})"] if "outcome" in row else []
        return " ".join([str(row.get("action")), *more])

    _table(rows, [
        ("when", 0, "", lambda r: formatting.when(float(r["time"]), seconds=True)[: 19 if table_width() >= 60 else 10]),
        ("who", 60, "", lambda r: f"{r.get('user')}@{r.get('host')}"), ("what", 0, "", what),
        ("cluster", 80, "", lambda r: r.get("cluster")), ("run", 60, "", lambda r: r.get("run")),
        ("configuration", 112, "", lambda r: str(r.get("config") or "")[:16]),
    ])  # fmt: skip
