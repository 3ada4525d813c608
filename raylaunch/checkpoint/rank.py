"""A rank of the training, as far as checkpoints need it. `Session` is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Rank(Protocol):
    """`incarnation` and `attempt` say who may commit (see `store`); `device` is "cpu" or "cuda:N"."""

    run: str
    checkpoint_dir: Path
    incarnation: int
    attempt: int
    rank: int
    world_size: int
    device: str

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to the run's events."""

    def progress(self, step: int, phase: str = "step") -> None:
        """Say that `phase` begins with `step` steps done."""
