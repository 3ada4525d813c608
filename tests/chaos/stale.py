"""A writer of an old attempt that does not know it: once it is told to, it commits what it has, asking nobody.

stale.py PENDING_DIRECTORY RUN_DIRECTORY NODE WORKER INCARNATION ATTEMPT: waits for RUN_DIRECTORY/stale-NODE.go,
as long as the process WORKER lives, and writes what came of it into RUN_DIRECTORY/stale.json. A process of its
own, and nobody's child, since a worker of Ray's ends at once, with all its group, when it is frozen no more.
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


def go(run_dir: Path, node: str) -> Path:
    """The file that tells the stale writer on this node to commit."""
    return run_dir / f"stale-{node}.go"


def main(mine: Path, run_dir: Path, node: str, worker: int, incarnation: int, attempt: int) -> None:
    if os.fork():
        return
    os.setsid()
    while not go(run_dir, node).exists():
        if not Path(f"/proc/{worker}").exists() and not go(run_dir, node).exists():
            return
        time.sleep(0.02)
    said = "committed"
    try:
        mine.mkdir()
        store.commit(mine, step=STEP, world_size=1, attempt=attempt, run=run_dir.name, incarnation=incarnation)
    except StateError as error:
        said = type(error).__name__
    state.write_json(run_dir / "stale.json", {"said": said, "attempt": attempt})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
