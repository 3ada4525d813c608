"""The audit trail: STATE/audit.jsonl, who asked for what, when, on which cluster or run, with which configuration.

The command line adds one line at the moment something is asked, before it is done; whether it then succeeded is in the
events of the cluster or the run. A line has names, numbers and a sha256 of the resolved configuration: never arguments
or values, which may be secret. A trail that cannot be written is a warning, and stops nothing.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylaunch import configfile, state
from raylaunch.config import Config
from raylaunch.errors import StateError
from raylaunch.words import user

FILE = "audit.jsonl"


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
        state.make_dir(state_dir)
        state.append_line(state_dir / FILE, {key: value for key, value in row.items() if value is not None})
    except StateError as error:
        tell(f"warning: the audit trail has no line of this: {error.message}")


def digest(config: Config) -> str:
    """sha256 of the resolved configuration: of what `config.yaml` of the cluster holds."""
    return hashlib.sha256(configfile.dump(config).encode()).hexdigest()


def read(state_dir: Path) -> list[dict[str, Any]]:
    """The lines, oldest first; those that are torn are left out."""
    try:
        rows = state.read_lines(state_dir / FILE)
    except OSError as error:
        raise StateError(f"cannot read {state_dir / FILE}: {error.strerror or error}") from error
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("time"), (int, float))]
