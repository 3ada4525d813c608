"""What code a run was handed over with: the git state of its directory, and versions. RUN/code.json.

    git (two questions, 2 s together) + the packages installed here → one entry a hand-over, the newest last

It never fails, and delays nothing: `runs.prepared` calls it behind the hand-over, git is given up on when it is slow,
and what cannot be found out is left out. Nothing of the code itself is kept, and no address of a remote: those may
hold a password.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from raylaunch import __version__
from raylaunch.errors import StateError
from raylaunch.host.processes import kill_child
from raylaunch.state import files

FILE = "code.json"
GIT_LIMIT = 2.0
KEPT = 50
"""Hand-overs that are remembered: the first and the newest."""


def record(run: Path, directory: str | None) -> None:
    """Add an entry to RUN/code.json; `directory`: where the user's code lies (trainer.chdir)."""
    with contextlib.suppress(StateError, OSError, ValueError):
        before = read(run)
        entry = {"time": round(time.time(), 3), "host": socket.gethostname(), "versions": versions()}
        found = git_state(Path(directory)) if directory else None
        if found is not None:
            entry["git"] = {"directory": directory, **found}
        entries = [*before, entry]
        files.write_json(run / FILE, {"hand_overs": [*entries[:1], *entries[1:][-KEPT:]]})


def read(run: Path) -> list[dict[str, Any]]:
    """The hand-overs of a run, the newest last; [] where none was recorded or the file cannot be read."""
    with contextlib.suppress(StateError):
        value = files.read_json(run / FILE)
        rows = value.get("hand_overs") if isinstance(value, dict) else None
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return []


def versions() -> dict[str, str]:
    """Of Python and of the packages that a training rests on, as they are installed here; nothing is imported."""
    found = {"python": platform.python_version(), "raylaunch": __version__}
    for name in ("torch", "ray"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_state(directory: Path, limit: float = GIT_LIMIT) -> dict[str, Any] | None:
    """commit, branch ("" when detached), dirty (None: not known in time), changed (how many tracked files differ).
    None where there is no git, no repository or no commit."""
    deadline = time.monotonic() + limit
    head = _git(directory, deadline, "rev-parse", "HEAD", "--abbrev-ref", "HEAD")
    words = (head or "").split()
    if len(words) != 2:
        return None
    # Untracked files are left out: outputs lie among them, and finding them can take minutes.
    changes = _git(directory, deadline, "status", "--porcelain", "--untracked-files=no")
    changed = None if changes is None else len(changes.splitlines())
    return {
        "commit": words[0],
        "branch": "" if words[1] == "HEAD" else words[1],
        "dirty": None if changed is None else changed > 0,
        "changed": changed,
    }


def _git(directory: Path, deadline: float, *words: str) -> str | None:
    """What it says; None for a failure, and when the time is up: it is killed then, and left if it hangs on a dead
    file system."""
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    command = ["git", "-C", str(directory), "-c", "core.fsmonitor=false", *words]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
        )
        said, _ = process.communicate(timeout=max(0.01, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        kill_child(process)
        return None
    except OSError:
        return None
    return said.decode(errors="replace") if process.returncode == 0 else None
