"""The head's driver processes: one run at a time, each driven until it has ended; a driver that is killed
or breaks is started again. How a run goes on after a fault is the driver's business, not ours."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raylaunch import alerts, beside, configfile, layout, runs
from raylaunch.errors import RaylaunchError
from raylaunch.runs import Run

TRIES = 3
"""Drivers that may be lost one after the other without a step between them,"""
LONG = 600.0
"""or, where no steps are told, without one that lived so many seconds."""
BROKEN_PAUSE = 2.0
"""Seconds, after the first driver that broke; more after the next."""
TELL_LIMIT = 25.0
LOOK_EVERY, STOP_LIMIT = 2.0, 10.0
"""Seconds between two looks whether a driver outlives its run, and from its being told to end to its kill."""


class Drivers:
    """`ending`: the cluster is about to end, so nothing is started again; `fenced`: a newer head has the runs.
    `off_loop` does file work; `event` writes one line of the cluster's events."""

    def __init__(
        self,
        directory: Path,
        env: Mapping[str, str],
        ending: Callable[[], bool],
        fenced: Callable[[], bool],
        off_loop: Callable[..., Any],
        event: Callable[..., None],
    ) -> None:
        self._directory, self._env = directory, env
        self._ending, self._fenced, self._off_loop, self._event = ending, fenced, off_loop, event
        self._process: asyncio.subprocess.Process | None = None

    async def drive(self, name: str) -> str:
        """Drive a run until it ends; its last state."""
        directory = runs.directory(self._directory, name)
        record = await self._off_loop(Run.read, directory)
        if record is None:
            return "failed"  # it was moved away while it waited
        if record.state in runs.FINAL:  # the head before this one went when its driver was about to
            self._event("run_ended", run=name, state=record.state, status=0)
            return str(record.state)
        if await self._off_loop(runs.stop_continues, directory):
            await self._off_loop(runs.clear_stop, directory)
        self._event("run_started", run=name)
        tries, last = 0, await self._off_loop(runs.last_metrics, directory)
        while tries < TRIES:
            began = time.monotonic()
            status = await self._one(directory)
            now = await self._off_loop(Run.read, directory)
            if status in {0, runs.DRIVER_FENCED} or self._ending():
                break
            if now is None or now.id != record.id or now.state in runs.FINAL:
                break
            self._event("driver_lost", run=name, status=status)
            before, last = last, await self._off_loop(runs.last_metrics, directory)
            tries = tries + 1 if last == before and time.monotonic() - began < LONG else 1
            if status > 0:  # it broke, as one that cannot read its storage does: the next may be luckier a moment later
                await asyncio.sleep(BROKEN_PAUSE * tries)
        if status == runs.DRIVER_FENCED or await self._off_loop(self._fenced):
            return "fenced"
        outcome = str(await self._off_loop(runs.settle, directory, status, record.id))
        if now is not None and now.id == record.id and now.state not in runs.FINAL and outcome in runs.FINAL:
            with contextlib.suppress(RaylaunchError, OSError):
                await self.tell(name, TELL_LIMIT)  # its driver had no last word
        self._event("run_ended", run=name, state=outcome, status=status)
        return outcome

    async def _one(self, run: Path) -> int:
        """One driver, from its start to its end; the exit status."""
        command = [sys.executable, "-P", "-m", "raylaunch.driver", str(self._directory), str(run)]
        self._process = await self._start(run, command, stdin=subprocess.DEVNULL)
        return await self._process.wait()

    async def _start(self, run: Path, command: Sequence[str], stdin: int) -> asyncio.subprocess.Process:
        """A process of this run, which writes into driver.log."""
        out = await self._off_loop((run / layout.LOGS / "driver.log").open, "ab")
        try:
            return await asyncio.create_subprocess_exec(
                *command, stdin=stdin, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=self._env
            )
        finally:
            await self._off_loop(out.close)

    async def tell(self, name: str, limit: float, *why: str) -> None:
        """Send the alerts that are left of a run without a driver, within `limit` seconds. `why` it ends, where its
        events do not say so."""
        run = runs.directory(self._directory, name)
        if not (await self._off_loop(configfile.load_resolved, run / layout.CONFIG_FILE)).alerts.sinks:
            return
        process = await self._start(run, [*beside.command(alerts.MODULE, run), *why], stdin=subprocess.PIPE)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.communicate(b""), limit)  # the end of its stdin
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def make_way(self, name: str, waits: Callable[[], bool], limit: float) -> None:
        """Have a driver end that has other things to do when its run is over (its weights are written), `limit` seconds
        after another run began to wait for it; for as long as this is not cancelled."""
        directory = runs.directory(self._directory, name)
        ours = await self._off_loop(Run.read, directory)
        since: float | None = None
        while ours is not None:
            await asyncio.sleep(LOOK_EVERY)
            now = await self._off_loop(Run.read, directory) if waits() else None
            is_over = now is not None and (now.state in runs.FINAL or now.id != ours.id)
            since = (since or time.monotonic()) if is_over else None
            if since is not None and time.monotonic() - since >= limit:
                self._event("driver_cut_short", run=name, reason="another run waits")
                if now is not None and now.id == ours.id:
                    await self._off_loop(runs.request_stop, directory, "another run waits")
                    await asyncio.sleep(STOP_LIMIT)
                return self.kill()

    def kill(self) -> None:
        """End the present driver, if there is one, at once."""
        if self._process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    @property
    def running(self) -> bool:
        """Whether there is a driver."""
        return self._process is not None and self._process.returncode is None

    async def ended(self) -> None:
        """Wait for the present driver's end."""
        if self._process is not None:
            await self._process.wait()
