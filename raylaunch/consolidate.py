"""The weights of a finished run, written by a process beside its driver (`checkpoint.save_consolidated`).

The run is finished, whatever becomes of it: it takes LIMIT seconds at the most and ends when the cluster does. How it
went is an event, which names the command that tries again.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from raylaunch import configfile, export, layout, runs, state
from raylaunch.config import Config

LOG_FILE = "export.log"
LIMIT = 2 * 3600.0
LOOK_EVERY = 0.2
TERM_LIMIT = 5.0
"""Seconds that it has to tidy up, when it is ended."""


def target(run_dir: Path) -> Path:
    """The directory that gets them."""
    return run_dir / "model"


def consolidate(run_dir: Path, config: Config, event: Callable[..., None], over: Callable[[], str | None]) -> None:
    """Write them. `over` says why there is no more time, None while there is; it is asked all the while."""
    to, log = target(run_dir), run_dir / LOG_FILE
    reason = _in_the_way(to)
    if not reason:
        event("exporting", to=str(to))
        reason = _run(run_dir, to, log, over)
    if not reason:
        return event("exported", to=str(to))
    return event("export_failed", reason=reason, log=str(log), hint=_again(run_dir, config))


def tell_cut_off(run_dir: Path) -> None:
    """Where the driver was lost while it exported, or before: tidy up, and say that it failed; nobody else does."""
    told = state.read_events(run_dir, *runs.FINAL, "exporting", "exported", "export_failed")
    last = told[-1]["kind"] if told else ""
    if last not in {"finished", "exporting"}:
        return
    config = configfile.load_resolved(run_dir / layout.CONFIG_FILE)
    if last == "exporting" or config.checkpoint.save_consolidated:
        for part in run_dir.glob(export.scratch_of(target(run_dir), "*").name):
            shutil.rmtree(part, ignore_errors=True)
        log, hint = str(run_dir / LOG_FILE), _again(run_dir, config)
        state.append_event(run_dir, "export_failed", reason="its driver was lost", log=log, hint=hint)


def _in_the_way(to: Path) -> str:
    """Why it cannot be written there, "" when it can."""
    try:
        return f"{to} is there already: move it away" if to.exists() else ""
    except OSError as error:
        return f"{to} cannot be looked at: {error}"


def _again(run_dir: Path, config: Config) -> str:
    """The command that tries it again."""
    ema = ["--ema"] if config.optimizer.ema is not None else []
    words = ["raylaunch", "checkpoints", run_dir.name, "export", "latest", "--to", str(target(run_dir)), *ema]
    return shlex.join(words)


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
    shutil.rmtree(export.scratch_of(to, process.pid), ignore_errors=True)
    return reason or (f"exit code {process.returncode}: {_last_line(log)}" if process.returncode else "")


def _start(run_dir: Path, to: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", export.MODULE, str(run_dir), str(to)]
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
