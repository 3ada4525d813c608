"""A writer of an old attempt that does not know it: once it is told to, it commits what it has, asking nobody.

stale.py PENDING_DIRECTORY RUN_DIRECTORY NODE WORKER INCARNATION ATTEMPT: waits for the file `go`, as long as the
process WORKER lives, and writes what came of it into the file `said`. A process of its own, and nobody's child,
since a worker of Ray's ends at once, with all its group, when it is frozen no more.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from raylaunch import state
from raylaunch.checkpoint import store
from raylaunch.errors import StateError

STEP = 1000
"""The step that it would commit; no run gets there."""


def go(run_dir: Path, node: str, attempt: int) -> Path:
    """The file that tells this attempt's writer on this node to commit."""
    return run_dir / f"stale-{node}-{attempt}.go"


def said(run_dir: Path, attempt: int) -> str | None:
    """What this attempt's writer was answered: "committed" or an error's name; None: it has not tried."""
    return state.read_json(run_dir / f"stale-{attempt}.json")


def main(mine: Path, run_dir: Path, node: str, worker: int, incarnation: int, attempt: int) -> None:
    if os.fork():
        return
    os.setsid()
    told = go(run_dir, node, attempt)
    while not told.exists():
        if not Path(f"/proc/{worker}").exists() and not told.exists():
            return
        time.sleep(0.02)
    answer = "committed"
    try:
        mine.mkdir()
        store.commit(mine, step=STEP, world_size=1, attempt=attempt, run=run_dir.name, incarnation=incarnation)
    except StateError as error:
        answer = type(error).__name__
    state.write_json(run_dir / f"stale-{attempt}.json", answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
