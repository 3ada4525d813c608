"""Keeps the Ray of one node: starts it, and starts it again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

from raylaunch.cluster.agent import ray_process
from raylaunch.cluster.agent.ray_process import RayProcess, RayStart
from raylaunch.errors import BringUpError
from raylaunch.host import processes
from raylaunch.host.ports import lease_ports
from raylaunch.state.records import Head

if TYPE_CHECKING:
    from raylaunch.cluster.agent.agent import Agent

log = logging.getLogger("raylaunch.agent")
RAY_PATIENCE = 120.0
RAY_TRIES = 3
RESTART_BACKOFF = 30.0
GROUND_EVERY = 2.0
DASHBOARD_PATIENCE = 15.0


class RayKeeper:
    """Of one agent, which it tells how its Ray stands."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def keep(self, ray: RayProcess, head: Head) -> None:
        """Start Ray, and start it again when it ends; the head's own is not replaceable in place."""
        failures, has_run = 0, False
        is_head = head.node == self._agent.here.node
        while True:
            node = RayStart(
                self._agent.here.node, self._agent.address, self._agent.lease.ports, self._agent.resources, self._agent.temp.path,
                self._agent.cluster.workers_per_node, None if is_head else head.gcs,
            )  # fmt: skip
            if not is_head:
                # Ray itself would ask for its head, and when it is not there yet, sleep for seconds.
                await self._agent.may_join.wait()
            await ray.begin(node)
            began = time.monotonic()
            if await self._has_started(ray):
                log.info(
                    "ray started seconds=%.2f ports=%d-%d", time.monotonic() - began, *self._agent.lease.ports.block
                )
                self._agent.report("ready")
                has_run = True
                if self._agent.duties is not None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._agent.duties.enough.wait(), DASHBOARD_PATIENCE)
                    ray.start_dashboard()
                status = await self._until_it_ends(ray)
                words = await ray.own_words(self._agent.temp.path)
                if time.monotonic() - began > 10 * RESTART_BACKOFF:
                    failures = 0
            else:
                words = await ray.own_words(self._agent.temp.path)
                status = await self._give_up(ray)
            failures += 1
            log.warning("ray ended status=%s failures=%d words=%r", status, failures, words)
            if is_head and has_run:
                self._agent.resign(f"the head's Ray ended ({ray_process.described(status)}): {words}")
                return
            if not has_run and failures >= RAY_TRIES:
                raise BringUpError(f"Ray on {self._agent.here.node} ended ({ray_process.described(status)}): {words}")
            self._agent.report("restarting", words)
            await asyncio.sleep(min(RESTART_BACKOFF, 0.5 * 2 ** (failures - 1)))
            await asyncio.to_thread(self._fresh_ground, is_head)
            self._agent.report("restarting", words)  # with its new ports
            ray = await RayProcess.prepare(self._agent.env, self._agent.ray_log)

    async def _until_it_ends(self, ray: RayProcess) -> int:
        """Wait for the end of Ray; make one when its directory is removed under it, as cleaners of /tmp do: it
        would go on and start no worker any more."""
        exited = asyncio.create_task(ray.exited())
        try:
            while not exited.done():
                await asyncio.wait({exited}, timeout=GROUND_EVERY)
                if not exited.done() and not await asyncio.to_thread(self._agent.temp.is_whole):
                    log.error("Ray's directory was removed under it path=%s", self._agent.temp.path)
                    return await self._give_up(ray)
            return exited.result()
        finally:
            exited.cancel()

    def _fresh_ground(self, same_ports: bool) -> None:
        """What the next start needs: nothing left of the last one, and other ports (see `lease_ports`)."""
        processes.end_tree(os.getpid(), keep_root=True)
        self._agent.temp.claim()
        if not same_ports:  # the head's are published already
            last = self._agent.lease
            self._agent.lease = lease_ports(last.ports)
            last.close()

    async def _has_started(self, ray: RayProcess) -> bool:
        """Whether Ray came up: it says so, ends, or is out of time."""
        started, exited = asyncio.create_task(ray.started.wait()), asyncio.create_task(ray.exited())
        await asyncio.wait({started, exited}, timeout=RAY_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        exited.cancel()
        return ray.started.is_set()

    async def _give_up(self, ray: RayProcess) -> int:
        """End a Ray that did not start, or that cannot go on, and say with what status."""
        await asyncio.to_thread(processes.end_tree, ray.pid)
        return await ray.exited()
