"""The process beside the head that answers Prometheus: kept running, and never the head's end."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

MODULE = "raylaunch.observe.prometheus.exporter"
"""By its name: it is not imported here."""
LOG_FILE = "metrics.log"
AGAIN_AFTER = 30.0
"""Seconds until another is started in place of one that ended."""
log = logging.getLogger(__name__)


async def keep(directory: Path, address: str, port: int, env: Mapping[str, str]) -> None:
    """Have it run, for as long as this is not cancelled."""
    while True:
        try:
            await _run_once(directory, address, port, env)
        except OSError as error:  # the log cannot be opened, say: metrics are no reason to end a head
            log.warning("the metrics server could not be started error=%r", str(error))
        await asyncio.sleep(AGAIN_AFTER)


async def _run_once(directory: Path, address: str, port: int, env: Mapping[str, str]) -> None:
    with await asyncio.to_thread((directory / "logs" / LOG_FILE).open, "ab") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", MODULE, str(directory), address, str(port),
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env,
        )  # fmt: skip
    try:
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
