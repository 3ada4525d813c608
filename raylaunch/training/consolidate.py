"""The weights of a finished run, written by a process beside its driver (`checkpoint.save_consolidated`).

The run is finished, whatever becomes of it: it takes LIMIT seconds at the most and ends when the cluster does. How it
went is an event, which names the command that tries again.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from raylaunch.checkpoint.events import Event
from raylaunch.config.schema import Config
from raylaunch.state import export_files
from raylaunch.state.run_events import Exported, ExportFailed, Exporting

MODULE = "raylaunch.training.export"
LIMIT = 2 * 3600.0
LOOK_EVERY = 0.2
TERM_LIMIT = 5.0
"""Seconds that it has to tidy up, when it is ended."""


def consolidate(run_dir: Path, config: Config, event: Callable[[Event], None], over: Callable[[], str | None]) -> None:
    """Write them. `over` says why there is no more time, None while there is; it is asked all the while."""
    to, log = export_files.target(run_dir), run_dir / export_files.LOG_FILE
    reason = _in_the_way(to)
    if not reason:
        event(Exporting(str(to)))
        reason = _run(run_dir, to, log, over)
    if not reason:
        return event(Exported(str(to)))
    return event(ExportFailed(reason, str(log), export_files.command(run_dir, config)))


def _in_the_way(to: Path) -> str:
    """Why it cannot be written there, "" when it can."""
    try:
        return f"{to} already exists: move it away" if to.exists() else ""
    except OSError as error:
        return f"{to} cannot be looked at: {error}"


def _run(run_dir: Path, to: Path, log: Path, over: Callable[[], str | None]) -> str:
    """One export; why it failed, "" when it did not."""
    try:
        process = _start(run_dir, to, log)
    except OSError as error:
        return f"it cannot be started: {error}"
    try:
        reason = _wait(process, over)
    finally:
        _end(process)
    shutil.rmtree(export_files.scratch_of(to, process.pid), ignore_errors=True)
    return reason or (f"exit code {process.returncode}: {_last_line(log)}" if process.returncode else "")


def _start(run_dir: Path, to: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", MODULE, str(run_dir), str(to)]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def _wait(process: subprocess.Popen[bytes], over: Callable[[], str | None]) -> str:
    """Until it has ended by itself; or why it must be ended."""
    deadline = time.monotonic() + LIMIT
    while process.poll() is None:
        if (why := over()) is not None:
            return f"ended before it was done: {why}"
        if time.monotonic() > deadline:
            return f"not done within {LIMIT:.0f} s"
        time.sleep(LOOK_EVERY)
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it if it lives: it may tidy up first."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TERM_LIMIT)
        process.kill()
        process.wait()


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError as error:
        return f"its log cannot be read: {error}"
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
