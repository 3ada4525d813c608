"""The files of a run's exported weights: where they lie, and what is left of an export that was cut off."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.state import event_log, records, runs
from raylaunch.state.run_events import ExportFailed

LOG_FILE = "export.log"


def target(run_dir: Path) -> Path:
    """The directory that gets them."""
    return run_dir / "model"


def scratch_of(to: Path, pid: int | str) -> Path:
    """Where the process `pid` writes what becomes `to`; "*": a pattern for all processes."""
    return to.with_name(f".{to.name}.part-{pid}")


def command(run_dir: Path, config: Config) -> str:
    """The command that tries it again."""
    ema = ["--ema"] if config.optimizer.ema is not None else []
    words = ["raylaunch", "checkpoints", run_dir.name, "export", "latest", "--to", str(target(run_dir)), *ema]
    return shlex.join(words)


def record_interrupted(run_dir: Path) -> None:
    """Where the driver was lost while it exported, or before: tidy up, and say that it failed; nobody else does."""
    told = event_log.read(run_dir, *runs.FINAL, "exporting", "exported", "export_failed")
    last = told[-1]["kind"] if told else ""
    if last not in {"finished", "exporting"}:
        return
    config = loader.load_resolved(run_dir / records.CONFIG_FILE)
    if last == "exporting" or config.checkpoint.save_consolidated:
        for part in run_dir.glob(scratch_of(target(run_dir), "*").name):
            shutil.rmtree(part, ignore_errors=True)
        log, hint = str(run_dir / LOG_FILE), command(run_dir, config)
        event_log.append(run_dir, ExportFailed("its driver was lost", log, hint))
