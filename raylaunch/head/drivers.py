"""The processes of the present run: its driver, and what sends its alerts when it has none."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from raylaunch import alerts, beside, configfile, layout
from raylaunch.head.context import Context


class Drivers:
    """One driver at a time. `env`: what it finds in its environment."""

    def __init__(self, context: Context, env: Mapping[str, str]) -> None:
        self._context, self._env = context, env
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, run: Path) -> int:
        """One driver, from its start to its end; the exit status."""
        command = [sys.executable, "-P", "-m", "raylaunch.driver", str(self._context.directory), str(run)]
        self._process = await self._start(run, command, stdin=subprocess.DEVNULL)
        return await self._process.wait()

    async def tell(self, run: Path, limit: float, *why: str) -> None:
        """Send the alerts that are left of a run without a driver, within `limit` seconds. `why` it ends, where its
        events do not say so."""
        if not (await self._context.off_loop(configfile.load_resolved, run / layout.CONFIG_FILE)).alerts.sinks:
            return
        process = await self._start(run, [*beside.command(alerts.MODULE, run), *why], stdin=subprocess.PIPE)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.communicate(b""), limit)  # the end of its stdin
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self, run: Path, command: Sequence[str], stdin: int) -> asyncio.subprocess.Process:
        """A process of this run, which writes into driver.log."""
        out = await self._context.off_loop((run / layout.LOGS / "driver.log").open, "ab")
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
