"""Processes beside a run's driver: what they do costs neither the training nor the driver anything.

    start → it follows the run's files as they grow → end: its stdin ends, it finishes its work, bounded

One is a module called with the run's directory. It dies with whoever started it; what it has to remember lies in the
run's directory, and the next driver's goes on from there.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from raylaunch.timing import BESIDE_LIMIT

ALERTS, TRACKERS = "raylaunch.observe.alerts.sender", "raylaunch.observe.trackers.uploader"
"""Modules by name: nobody who starts one imports it."""


def command(module: str, run_dir: Path) -> list[str]:
    return [sys.executable, "-P", "-m", module, str(run_dir)]


def start(module: str, run_dir: Path) -> subprocess.Popen[bytes]:
    """Begin; what it prints goes to our stderr."""
    return subprocess.Popen(command(module, run_dir), stdin=subprocess.PIPE, stdout=2)


def end(*processes: subprocess.Popen[bytes]) -> None:
    """Let them finish, all at the same time, within BESIDE_LIMIT. One that has died gets another go at what is left."""
    living = [subprocess.Popen(p.args, stdin=subprocess.PIPE, stdout=2) if p.poll() else p for p in processes]
    for process in living:
        assert process.stdin is not None
        process.stdin.close()
    deadline = time.monotonic() + BESIDE_LIMIT
    for process in living:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.wait()
