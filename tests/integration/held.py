"""A trainer that waits for its test: raylaunch's own, but in the first attempt every rank stands before step HELD_AT until
the test lets it go on. So a fault strikes at a known step, however fast or slow the machine is."""

from __future__ import annotations

import time
from pathlib import Path

from raylaunch import entry
from raylaunch.config import Config, TrainerConfig
from raylaunch.session import Session

HELD_AT = 8


def waits(run_dir: Path, rank: int) -> bool:
    """Whether that rank stands there."""
    return (run_dir / f"waits-{rank}").exists()


def let_go(run_dir: Path) -> None:
    (run_dir / "go").touch()


def train(config: Config, session: Session) -> None:
    progress = session.progress

    def held(step: int, phase: str = "step") -> None:
        progress(step, phase)
        if session.attempt == 1 and (step, phase) == (HELD_AT, "step"):
            (session.run_dir / f"waits-{session.rank}").touch()
            while not (session.run_dir / "go").exists():
                time.sleep(0.02)

    session.progress = held  # type: ignore[method-assign]
    entry.function(TrainerConfig())(config, session)
