"""A trainer that goes as far as its test allows: the default one, whose rank 0 waits at a gate. So what a test does happens
at a known step, on a machine of any speed. Two small files in the run directory stand between the two:

allowed.json   by the test: the number of steps that may be done. Absent: FIRST.
waiting.json   by rank 0 of the trainer: the attempt and the number of steps done when it began to wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from raylaunch.config import user_code
from raylaunch.config.schema import Config, TrainerConfig
from raylaunch.errors import StateError
from raylaunch.state import files
from raylaunch.training.worker.session import NOW, Session

FIRST = 11
"""Where a run waits first: one step after a commit where every fifth step is one, so that a fault loses a step."""
EVERYTHING = 10**9
TRAINER, PATH = "gate:train", str(Path(__file__).parent)
"""Its name in a config, and where Python finds it."""


def train(config: Config, session: Session) -> None:
    """Rank 0 waits; the other ranks wait for it in the collective of that step, where real faults find them."""

    def deed(session: Session, step: int) -> None:
        if session.rank == 0:
            wait(session, step)

    before_each_step(config, session, deed)


def before_each_step(config: Config, session: Session, deed: Callable[[Session, int], None]) -> None:
    """The default trainer, with something done before each step."""

    class Told(Session):
        def progress(self, step: int, phase: str = "step") -> None:
            super().progress(step, phase)
            if phase == "step":
                deed(self, step)

    session.__class__ = Told
    user_code.function(TrainerConfig())(config, session)


def allow(run_dir: Path, steps: int) -> None:
    """Let the run go on until it has done so many steps."""
    files.write_json(run_dir / "allowed.json", steps)


def wait(session: Session, step: int) -> None:
    """Wait in the trainer's rank 0, with `step` steps done, until it may do another, or is to save and stop at the
    next one."""
    told = False
    while step >= allowed(session.run_dir) and session.stop_requested() != NOW:
        if not told:
            files.write_json(session.run_dir / "waiting.json", {"attempt": session.attempt, "step": step})
            told = True
        time.sleep(0.02)


def open_gate(run_dir: Path) -> None:
    """Let the run go on to its end."""
    allow(run_dir, EVERYTHING)


def waiting(run_dir: Path) -> tuple[int, int]:
    """(attempt, steps done) of the last wait; (0, 0) before the first."""
    value = files.read_json(run_dir / "waiting.json") or {"attempt": 0, "step": 0}
    return int(value["attempt"]), int(value["step"])


def allowed(run_dir: Path) -> int:
    """The number of steps that may be done."""
    try:
        steps = files.read_json(run_dir / "allowed.json")
    except StateError:
        return 0  # a storage that hiccups: ask again
    return FIRST if steps is None else int(steps)
