"""`raylaunch alerts`: try the sinks before the night, and see what was sent."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from raylaunch.cli import options
from raylaunch.cli.show import table_width
from raylaunch.config import loader, secrets
from raylaunch.config.schema import AlertsConfig
from raylaunch.errors import RaylaunchError, StateError, UsageError
from raylaunch.observe.alerts import alert_sinks
from raylaunch.observe.alerts.alert import Alert, clock, message
from raylaunch.observe.alerts.alert_sinks import Result
from raylaunch.observe.alerts.sender import MEMORY
from raylaunch.observe.status import find_run
from raylaunch.state import event_log, files


@click.group()
def alerts() -> None:
    """Test the alerts of a configuration, or list those of a run (see `alerts:` in the configuration)."""


@alerts.command(short_help="Send a test alert.")
@click.argument("path", metavar="[CFG]", required=False, type=click.Path(path_type=Path))
@options.sets_option
def test(path: Path | None, sets: tuple[str, ...]) -> None:
    """Send a test alert from this machine to every destination of CFG and of your own config.yaml, and print each result.

    The exit code is 1 if a destination did not accept it."""
    own = secrets.resolved(loader.load(path, sets).alerts)
    if not own.sinks:
        raise UsageError(
            "alerts: no destination is configured", "Set alerts.slack, webhook, command or mail; see docs/alerts.md."
        )
    text = f"a test from {socket.gethostname()}: this is how an alert looks"
    tried = message(Alert("started", text, time=time.time(), id="test"), "test", "none")
    found = asyncio.run(_try(own, tried))
    for name, result, seconds in found:
        said = "accepted" if result.ok else f"FAILED: {result.said}"
        click.echo(f"{name:8} {said} ({seconds:.1f} s)" + (f"\n         {result.detail}" if result.detail else ""))
    if not all(result.ok for _, result, _ in found):
        raise RaylaunchError(
            "an alert was not accepted",
            "Check the messages above, then test again.",
        )


@alerts.command("list", short_help="List the alerts of RUN.")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.state_dir_option
def list_(run: str, as_json: bool, state_dir: Path | None) -> None:
    """List the alerts of RUN: those that were sent, those that failed, and those that are pending."""
    run_dir, _ = find_run(options.state_dir(state_dir), run)
    rows = [row for row in event_log.read_all(run_dir) if _is_alert(row)]
    waiting = _waiting(run_dir)
    if as_json:
        return click.echo(json.dumps({"run": run, "alerts": rows, "waiting": waiting}, indent=1))
    console = Console(width=table_width(), highlight=False)
    for row in [*rows, *waiting]:
        console.print(f"{clock(row.get('at', row['time']))}  {row['alert']}  {_outcomes(row['sinks'])}", markup=False)
        console.print(Padding(Text(row["text"], style="dim"), (0, 0, 0, 2), expand=False))
    if not rows and not waiting:
        console.print(f"run {run} has sent no alert (see docs/alerts.md)", markup=False)
    return None


async def _try(own: AlertsConfig, tried: dict[str, Any]) -> list[tuple[str, Result, float]]:
    async def one(name: str) -> tuple[str, Result, float]:
        began = time.monotonic()
        result = await alert_sinks.send(name, own, tried)
        return name, result, time.monotonic() - began

    return await asyncio.gather(*map(one, own.sinks))


def _waiting(run_dir: Path) -> list[dict[str, Any]]:
    """What lies in the outbox, in the form of an event."""
    try:
        parcels = (files.read_json(run_dir / MEMORY) or {}).get("outbox", [])
        return [
            {"time": p["message"]["time"], "alert": p["message"]["kind"], "text": p["message"]["text"],
             "sinks": {**p["done"], **{name: {**due, "outcome": f"waits: {due['error'] or 'not tried yet'}"}
                                       for name, due in p["due"].items()}}}
            for p in parcels
        ]  # fmt: skip
    except (StateError, KeyError, TypeError, AttributeError):
        return []  # the alerts that were sent are there to be shown


def _is_alert(row: Any) -> bool:
    wanted: dict[str, Any] = {"time": (int, float), "alert": str, "text": str, "sinks": dict}
    return (
        isinstance(row, dict)
        and row.get("kind") == "alert"
        and all(isinstance(row.get(k), t) for k, t in wanted.items())
    )


def _outcomes(found: dict[str, Any]) -> str:
    parts = []
    for name, one in found.items():
        outcome, tries = (one.get("outcome"), one.get("tries")) if isinstance(one, dict) else (one, 1)
        parts.append(f"{name} {outcome}" + (f" ({tries} tries)" if tries != 1 else ""))
    return ", ".join(parts)
