"""The processes of the present run: its driver, and what sends its alerts when it has none."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from raylaunch.cluster.head.context import HeadContext
from raylaunch.config import loader
from raylaunch.host import sidecar
from raylaunch.state import records

log = logging.getLogger("raylaunch.head")
NOT_STARTED = 127
"""The exit status of a driver that could not be started; as in shells."""


class Drivers:
    """One driver at a time. `env`: what it finds in its environment."""

    def __init__(self, context: HeadContext, env: Mapping[str, str]) -> None:
        self._context, self._env = context, env
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, run: Path) -> int:
        """One driver, from its start to its end; the exit status."""
        command = [sys.executable, "-P", "-m", "raylaunch.training.driver", str(self._context.directory), str(run)]
        out = await self._context.retry_on_storage_error(_open_log, run)
        try:
            self._process = await self._start(out, command, stdin=subprocess.DEVNULL)
        except OSError as error:  # no memory, no further process, or our Python's storage fails
            log.error("a driver could not be started run=%s error=%r", run.name, str(error))
            return NOT_STARTED
        return await self._process.wait()

    async def send_alerts(self, run: Path, limit: float, *why: str) -> None:
        """Send the alerts that are left of a run without a driver, within `limit` seconds. `why` it ends, where its
        events do not say so."""
        if not (await self._context.off_loop(loader.load_resolved, run / records.CONFIG_FILE)).alerts.sinks:
            return
        out = await self._context.off_loop(_open_log, run)
        process = await self._start(out, [*sidecar.command(sidecar.ALERTS, run), *why], stdin=subprocess.PIPE)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.communicate(b""), limit)  # the end of its stdin
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self, out: IO[bytes], command: Sequence[str], stdin: int) -> asyncio.subprocess.Process:
        """A process of a run, which writes into `out`; that is closed here."""
        try:
            return await asyncio.create_subprocess_exec(
                *command, stdin=stdin, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=self._env
            )
        finally:
            await self._context.off_loop(out.close)

    @property
    def running(self) -> bool:
        """Whether there is a driver."""
        return self._process is not None and self._process.returncode is None

    def kill(self) -> None:
        """End the present driver, if there is one, at once."""
        if self._process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def ended(self) -> None:
        """Wait for the present driver's end."""
        if self._process is not None:
            await self._process.wait()


def _open_log(run: Path) -> IO[bytes]:
    """Where a run's driver writes, and who tells of its end."""
    return (run / records.LOGS / "driver.log").open("ab")
