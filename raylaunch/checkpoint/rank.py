"""A rank of the training, as far as checkpoints need it. `Session` is one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from raylaunch.checkpoint.events import Event


class Rank(Protocol):
    """`run_incarnation` and `attempt` say who may commit (see `store`); `device` is "cpu" or "cuda:N"."""

    run: str
    checkpoint_dir: Path
    run_incarnation: int
    attempt: int
    rank: int
    world_size: int
    device: str

    def record(self, event: Event) -> None:
        """Append it to the run's events (rank 0 only)."""

    def progress(self, step: int, phase: str = "step") -> None:
        """Say that `phase` begins with `step` steps done."""
