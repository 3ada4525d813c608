"""The audit trail: STATE/audit.jsonl, who asked for what, when, on which cluster or run, with which configuration.

The command line adds one line at the moment something is asked, before it is done, and one more when the command then
ends with an error (`outcome`: refused or failed; `of`: the time of the first line), which `read` puts together. What
else came of it is in the events of the cluster or the run. A line has names, numbers and a sha256 of the resolved
configuration: never arguments or values, which may be secret. A trail that cannot be written is a warning, and stops
nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import StateError
from raylaunch.state import files
from raylaunch.text import user

FILE = "audit.jsonl"
ASKED = __name__
"""Where a command's context has what it asked for."""


def add(
    state_dir: Path,
    action: str,
    tell: Callable[[str], None],
    *,
    cluster: str | None = None,
    run: str | None = None,
    config: Config | None = None,
    **numbers: int | bool | None,
) -> None:
    """One line: time, user, uid, host, action, and what it was about. `tell` gets a warning when it cannot be written."""
    row: dict[str, Any] = {
        "time": round(time.time(), 3),
        "user": user(),
        "uid": os.getuid(),
        "host": socket.gethostname(),
        "action": action,
        "cluster": cluster,
        "run": run,
        "config": digest(config) if config is not None else None,
        "by": "driver" if "RAYLAUNCH_INCARNATION" in os.environ else None,  # the export of a finished run
        **numbers,
    }
    try:
        files.make_dir(state_dir)
        files.append_line(state_dir / FILE, {key: value for key, value in row.items() if value is not None})
        if (command := click.get_current_context(silent=True)) is not None:
            command.meta.setdefault(ASKED, []).append((state_dir, row))
    except StateError as error:
        tell(f"warning: the audit trail has no line of this: {error.message}")


def add_outcome(asked: Sequence[tuple[Path, dict[str, Any]]], outcome: str) -> None:
    """That a command ended with an error. Of several things that it asked for, which one it was is not known."""
    if len(asked) == 1:
        state_dir, row = asked[0]
        own = {key: row[key] for key in ("user", "uid", "host", "action")}
        with contextlib.suppress(StateError):  # the error itself is what the user must see
            files.append_line(
                state_dir / FILE, {"time": round(time.time(), 3), **own, "outcome": outcome, "of": row["time"]}
            )


def digest(config: Config) -> str:
    """sha256 of the resolved configuration: of what `config.yaml` of the cluster holds."""
    return hashlib.sha256(loader.dump(config).encode()).hexdigest()


def read(state_dir: Path) -> list[dict[str, Any]]:
    """What was asked, oldest first, with its outcome where that was an error; lines that are torn are left out."""
    try:
        rows = files.read_lines(state_dir / FILE)
    except OSError as error:
        raise StateError(f"cannot read {state_dir / FILE}: {error.strerror or error}") from error
    sound = [row for row in rows if isinstance(row, dict) and isinstance(row.get("time"), (int, float))]
    outcomes = {_key(row, "of"): row.get("outcome") for row in sound if "of" in row}
    asked = [row for row in sound if "of" not in row]
    return [row | {"outcome": outcomes[key]} if (key := _key(row, "time")) in outcomes else row for row in asked]


def _key(row: dict[str, Any], moment: str) -> str:
    return f"{row.get('host')} {row.get('uid')} {row.get('action')} {row.get(moment)}"
