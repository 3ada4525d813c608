"""A writer of an attempt that does not know that it was replaced: it commits what it has, asking nobody.

stale.py PENDING_DIRECTORY INCARNATION ATTEMPT: waits until another attempt has taken over, however long it is frozen
meanwhile, tries to commit, and prints what came of it. No child of an agent's, which would end it when the node is
back, sometimes before it has tried.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from raylaunch.checkpoint import store
from raylaunch.errors import StateError

STEP = 1000
"""The step that it would commit; no run gets there."""
READY = "ready"


def main(mine: Path, incarnation: int, attempt: int) -> None:
    print(READY, flush=True)
    while store.owner(mine.parent) <= (incarnation, attempt):
        time.sleep(0.02)
    try:
        mine.mkdir()
        store.commit(mine, step=STEP, world_size=1, attempt=attempt, run="stale", run_incarnation=incarnation)
    except StateError as error:
        print(type(error).__name__)
    else:
        print("committed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
