"""How far a gated run may go: two small files in its directory, between the trainer (`trouble.gated`) and the test.

allowed.json   by the test: the number of steps that may be done. Absent: FIRST.
waiting.json   by rank 0 of the trainer: the attempt and the number of steps done when it began to wait.
"""

from __future__ import annotations

import time
from pathlib import Path

from raylaunch import state
from raylaunch.errors import StateError
from raylaunch.session import NOW, Session

FIRST = 11
"""Where a run waits first: one step after a commit where every fifth step is one, so that a fault loses a step."""
EVERYTHING = 10**9


def allow(run_dir: Path, steps: int) -> None:
    """Let the run go on until it has done so many steps."""
    state.write_json(run_dir / "allowed.json", steps)


def wait(session: Session, step: int) -> None:
    """Wait in the trainer's rank 0, with `step` steps done, until it may do another, or is to save and stop at the
    next one."""
    told = False
    while step >= allowed(session.run_dir) and session.stop_requested() != NOW:
        if not told:
            state.write_json(session.run_dir / "waiting.json", {"attempt": session.attempt, "step": step})
            told = True
        time.sleep(0.02)


def waiting(run_dir: Path) -> tuple[int, int]:
    """(attempt, steps done) of the last wait; (0, 0) before the first."""
    value = state.read_json(run_dir / "waiting.json") or {"attempt": 0, "step": 0}
    return int(value["attempt"]), int(value["step"])


def allowed(run_dir: Path) -> int:
    """The number of steps that may be done."""
    try:
        steps = state.read_json(run_dir / "allowed.json")
    except StateError:
        return 0  # a storage that hiccups: ask again
    return FIRST if steps is None else int(steps)
