"""Telling people what happens to a run.

rows of its files → `rules` (pure) → `limits` → `follow`, a process beside the driver → `sinks`
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from raylaunch import beside
from raylaunch.config import Config

MODULE = "raylaunch.alerts.follow"


def start(config: Config, run_dir: Path) -> subprocess.Popen[bytes] | None:
    """Begin to tell what happens to a run, if somebody wants to know."""
    return beside.start(MODULE, run_dir) if config.alerts.sinks else None
