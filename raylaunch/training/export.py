"""A checkpoint's weights for other programs, as the trainer's own `export` writes them: whole, or not there.

python -m raylaunch.training.export RUN_DIR TO    the newest checkpoint of a run; its moving averages, where it keeps them
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from raylaunch.checkpoint import store
from raylaunch.config import loader, user_code
from raylaunch.config.schema import Config
from raylaunch.errors import RaylaunchError, UsageError
from raylaunch.host import processes
from raylaunch.state import audit, export_files, files, records, runs


def write(config: Config, checkpoint: Path, to: Path, dtype: str = "float32", ema: bool = False) -> list[Path]:
    """Export a committed checkpoint as `to`, a new directory; its files.

    They are written beside it and renamed: what a killed export leaves is in nobody's way."""
    if to.exists():
        raise UsageError(f"{to} already exists", "Give a new directory with --to.")
    exporter, scratch = _exporter(config), export_files.scratch_of(to, os.getpid())
    files.make_dir(scratch)
    try:
        part = scratch / to.name
        written = exporter(config, checkpoint, part, dtype, **({"ema": True} if ema else {}))
        part.rename(to)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [to / file.relative_to(part) if file.is_relative_to(part) else file for file in written]


def latest(run: str, directory: Path) -> Path:
    """The newest committed checkpoint of a run whose checkpoints lie there; RaylaunchError when there is none."""
    found = store.latest(directory)
    if found is None:
        raise RaylaunchError(f"run {run} has no checkpoint", f"They would be in {directory}.")
    return found.path


def _exporter(config: Config) -> Callable[..., list[Path]]:
    """The `export` of the trainer's module."""
    module = user_code.module(config.trainer)
    found: Callable[..., list[Path]] | None = getattr(module, "export", None)
    if not callable(found):
        raise RaylaunchError(
            f"the trainer's module {module.__name__} has no export",
            f"Give it a function export(config, checkpoint, to, dtype): {module.__file__}.",
        )
    return found


def main(run_dir: Path, to: Path) -> int:
    """Export for the driver, and end with it."""
    processes.die_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to end"))  # by an exception, which tidies up
    audit.add(run_dir.parents[1], "checkpoints export", lambda text: print(text, file=sys.stderr), run=run_dir.name)
    try:
        config = loader.load_resolved(run_dir / records.CONFIG_FILE)
        checkpoint = latest(run_dir.name, runs.checkpoint_dir(run_dir, config))
        write(config, checkpoint, to, ema=config.optimizer.ema is not None)
    except RaylaunchError as error:
        print(f"{error.message} ({error.hint})", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
