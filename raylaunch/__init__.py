"""raylaunch keeps N Ray nodes alive on Slurm, and a training function alive on those nodes.

The names in `__all__` are the public API, for trainers and scripts; everything else is private. Each name is imported on
first use: `Loop` imports torch, which the command line does not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from raylaunch.config import former_names

if TYPE_CHECKING:
    from raylaunch.config.schema import Config
    from raylaunch.data.table import Table
    from raylaunch.errors import (
        BringUpError,
        ConfigError,
        DataError,
        RaylaunchError,
        RunError,
        SandboxError,
        SlurmError,
        SlurmUnavailable,
        StateError,
        UsageError,
    )
    from raylaunch.trainers.loop import Batch, Loop
    from raylaunch.training.worker.session import Session

__version__ = "0.1.0"

__all__ = [
    "Batch", "BringUpError", "Config", "ConfigError", "DataError", "Loop", "RaylaunchError", "RunError",
    "SandboxError", "Session", "SlurmError", "SlurmUnavailable", "StateError", "Table", "UsageError",
]  # fmt: skip

_HOMES = {
    "Config": "config.schema", "Table": "data.table", "Batch": "trainers.loop", "Loop": "trainers.loop",
    "Session": "training.worker.session",
}  # fmt: skip
"""Public name → its module; errors are in `errors`."""

former_names.install()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"raylaunch.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
