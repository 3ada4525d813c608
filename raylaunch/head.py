"""The head's duties, beside its own node's: the table of nodes, the requests, the runs, the end.

The head's agent publishes where it is (head.json), admits the other agents (`link`), writes what it
knows of them (members.json), takes requests from the cluster directory, and runs one driver at a
time, run after run. All file work is done off the event loop: shared storage that stalls must not
look like a dead head. How a run goes on after a fault is the driver's business, not ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from raylaunch import layout, runs, state
from raylaunch.errors import RaylaunchError
from raylaunch.layout import Cluster, Head
from raylaunch.link import Member, Members
from raylaunch.runs import Run

log = logging.getLogger("raylaunch.head")
T = TypeVar("T")

REQUEST_EVERY = 0.3
ABOARD_LIMIT, LATE_LIMIT = 300.0, 5.0
"""Seconds that a submitted run waits for the minimum of nodes, and then for the rest."""
DRIVER_TRIES = 3
_TROUBLE = (RaylaunchError, OSError, ValueError, KeyError, TypeError, AttributeError)
"""What one bad file or a full disk raises: logged, and the next one tried."""
SAVE_LIMIT = 60.0
"""Seconds that a run gets to save when the cluster is to end, unless the request says otherwise."""
ENDING_LIMIT = 10.0


class HeadDuties:
    """What the head's agent does for the whole cluster."""

    def __init__(
        self,
        directory: Path,
        cluster: Cluster,
        head: Head,
        token: str,
        env: Mapping[str, str],
        notice: float,
        stop: Callable[[str], None],
    ) -> None:
        self.directory, self.cluster, self.head, self._env, self._stop = directory, cluster, head, env, stop
        self.members = Members(token, cluster.incarnation, self._member_changed)
        self.exit_code = 0
        self._notice = notice
        self._ready = asyncio.Event()  # Ray runs on the head: a driver can connect
        self.enough = asyncio.Event()
        """The minimum of nodes is ready: what is not needed for that may start now."""
        self._queue: deque[str] = deque([cluster.run] if cluster.run else [])
        self._queued = asyncio.Event()
        self._table_changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._driver: asyncio.subprocess.Process | None = None
        self._running: str | None = None
        self._ending = self._closed = False
        self._unclean: dict[str, Any] = {}
        self._lost: list[str] = []
        self._files = ThreadPoolExecutor(1, "files")  # one thread: what is written first is there first
        if self._queue:
            self._queued.set()

    async def open(self) -> None:
        """Begin: listen for agents, publish head.json, take requests."""
        await self.members.serve(self.head.address, self.head.control_port)
        await self._off_loop(self.head.write, self.directory / layout.HEAD_FILE)
        self._event("head", node=self.head.node, address=self.head.address, incarnation=self.head.incarnation)
        for duty in (self._write_table(), self._take_requests(), self._run_queue()):
            self._spawn(duty)

    async def _off_loop(self, work: Callable[..., T], *arguments: Any) -> T:
        """File work in its own thread; in order."""
        return await asyncio.get_running_loop().run_in_executor(self._files, work, *arguments)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("duty failed", exc_info=task.exception())
            self.exit_code = 1
            self._stop(f"the head failed: {task.exception()}")

    # -- the table of nodes ------------------------------------------------------------------

    def _member_changed(self, member: Member, what: str) -> None:
        if self._closed:
            return  # our own node's farewell, after the last word
        log.info("member node=%s alive=%s state=%s what=%r", member.node, member.alive, member.info.get("state"), what)
        self._table_changed.set()
        if what == "joined":
            self._event("node_joined", node=member.node, address=member.info.get("address"))
            if self._ready.is_set():
                self.members.order("join", only=member)
        elif what == "changed":
            if member.node == self.head.node and member.info["state"] == "ready":
                self._ready.set()
                self.members.order("join")
            if self._ready_nodes() >= self.cluster.min_nodes:
                self.enough.set()
            self._event(f"node_{member.info['state']}", node=member.node, error=member.info.get("error"))
        elif not self._ending and member.info.get("state") not in {"ended", "failed"}:
            self._event("node_lost", node=member.node, reason=what)

    def table(self) -> list[dict[str, Any]]:
        """The nodes as members.json has them."""
        return [
            {
                "name": m.node,
                "role": "head" if m.node == self.head.node else "worker",
                **m.info,
                "state": m.info["state"] if m.alive or m.info["state"] in {"ended", "failed"} else "lost",
                "since": m.since,
            }
            for m in self.members.table.values()
        ]

    async def _write_table(self) -> None:
        while True:
            await self._table_changed.wait()
            self._table_changed.clear()
            try:
                await self._off_loop(self._save_table, self.table())
            except _TROUBLE as error:
                log.error("the table could not be written error=%r", str(error))
                await asyncio.sleep(1.0)
                self._table_changed.set()

    def _save_table(self, rows: list[dict[str, Any]]) -> None:
        state.write_json(self.directory / layout.MEMBERS_FILE, {"canary": self.cluster.canary, "nodes": rows})

    # -- requests ----------------------------------------------------------------------------

    async def _take_requests(self) -> None:
        folder = self.directory / layout.REQUESTS
        while True:
            try:
                for wanted in await self._off_loop(_collect, folder):
                    self._take(wanted)
            except _TROUBLE as error:
                log.error("a request could not be taken error=%r", str(error))
            await asyncio.sleep(REQUEST_EVERY)

    def _take(self, wanted: Mapping[str, Any]) -> None:
        log.info("request %s", dict(wanted))
        match wanted.get("kind"):
            case "run":
                self._queue.append(str(wanted["run"]))
                self._queued.set()
            case "down":
                self.begin_end("down", float(wanted.get("save_limit", SAVE_LIMIT)))
            case "walltime":
                self.out_of_time()
            case kind:
                log.warning("unknown request kind=%r", kind)

    # -- runs --------------------------------------------------------------------------------

    async def _run_queue(self) -> None:
        """One run after the other, the whole cluster for each."""
        await self._ready.wait()
        if self.cluster.run is not None:
            await self._all_aboard()
        while True:
            await self._queued.wait()
            if not self._queue:
                self._queued.clear()
                continue
            name = self._queue.popleft()
            try:
                outcome = await self._run(name)
            except _TROUBLE as error:  # of this run; the cluster lives on
                outcome = "failed"
                log.error("run failed run=%s", name, exc_info=error)
            if self.cluster.run is not None:
                self.exit_code = 0 if outcome == "finished" else 1
                self.begin_end(f"run {name} {outcome}")

    async def _all_aboard(self) -> None:
        """A submitted run begins with the minimum of nodes, and gives the others a moment."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.enough.wait(), ABOARD_LIMIT)
        deadline = time.monotonic() + LATE_LIMIT
        while time.monotonic() < deadline and self._ready_nodes() < self.cluster.max_nodes:
            await asyncio.sleep(0.1)

    def _ready_nodes(self) -> int:
        return sum(m.alive and m.info["state"] == "ready" for m in self.members.table.values())

    async def _run(self, name: str) -> str:
        """Run a driver until it ends; the run's last state."""
        directory = runs.directory(self.directory, name)
        record = await self._off_loop(Run.read, directory)
        if record is None:
            return "failed"  # it was moved away while it waited
        self._event("run_started", run=name)
        for _ in range(DRIVER_TRIES):
            status = await self._drive(directory)
            now = await self._off_loop(Run.read, directory)
            if status >= 0 or self._ending or now is None or now.id != record.id or now.state in runs.FINAL:
                break
            self._event("driver_lost", run=name, status=status)
        outcome = await self._off_loop(runs.settle, directory, status, record.id)
        self._event("run_ended", run=name, state=outcome, status=status)
        return outcome

    async def _drive(self, run: Path) -> int:
        """One driver, from its start to its end; the exit status."""
        with (run / layout.LOGS / "driver.log").open("ab") as out:
            self._driver = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "raylaunch.driver", str(self.directory), str(run),
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env={**self._env, "RAY_ADDRESS": self.head.gcs},
            )  # fmt: skip
        self._running = run.name
        status = await self._driver.wait()
        self._running = None
        return status

    def out_of_time(self) -> None:
        """Slurm's notice before the time limit: the run may use most of what is left to save."""
        self.begin_end("walltime", max(5.0, self._notice - ENDING_LIMIT))

    # -- the end -----------------------------------------------------------------------------

    def begin_end(self, reason: str, save_limit: float = SAVE_LIMIT) -> None:
        """End the cluster: save the run (bounded), then all agents, then this one."""
        if not self._ending:
            self._ending = True
            self._event("ending", reason=reason)
            self._spawn(self._end(reason, save_limit))

    async def _end(self, reason: str, save_limit: float) -> None:
        self._queue.clear()
        if self._running is not None:
            run, driver = runs.directory(self.directory, self._running), self._driver
            assert driver is not None
            await self._off_loop(runs.request_stop, run, reason)
            try:
                await asyncio.wait_for(driver.wait(), save_limit)
            except TimeoutError:
                self._event("save_timed_out", run=self._running, seconds=save_limit)
        self._stop(reason)

    async def close(self) -> None:
        """Send the other agents home and wait for their word, bounded."""
        self._ending = True
        for task in list(self._tasks):
            task.cancel()
        if self._driver is not None and self._driver.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._driver.kill()  # before the nodes: it would take their end for a fault
            await self._driver.wait()
        everyone = [m for m in self.members.table.values() if m.node != self.head.node]
        others = [m for m in everyone if m.alive]  # of a node lost before, nothing is ours to end any more
        self._lost = [m.node for m in everyone if not m.alive and m.info["state"] not in {"ended", "failed"}]
        self.members.order("end")
        deadline = time.monotonic() + ENDING_LIMIT
        while any(m.alive for m in others) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._unclean = {m.node: m.info.get("left", -1) for m in others if m.info.get("left") != 0}
        await self._off_loop(self._save_table, self.table())
        self.members.close()

    def write_end(self, reason: str, left_here: int) -> None:
        """The last word: ended.json and the job's exit code. Nodes that did not report count as unclean."""
        self._closed = True
        self._files.shutdown()
        if self.cluster.run is not None and self.exit_code == 0:
            run = Run.read(runs.directory(self.directory, self.cluster.run))
            self.exit_code = 0 if run is not None and run.state == "finished" else 1
        unclean = dict(self._unclean) | ({self.head.node: left_here} if left_here else {})
        layout.write_end(self.directory, self.cluster.canary, reason, unclean, self._lost, self.exit_code)
        state.append_event(self.directory, "ended", reason=reason, unclean=unclean, lost=self._lost)

    def _event(self, kind: str, **fields: Any) -> None:
        """One line of the cluster's events, written off the loop."""
        self._files.submit(functools.partial(state.append_event, self.directory, kind, **fields))


def _collect(folder: Path) -> list[dict[str, Any]]:
    """Take the requests that lie there, oldest first."""
    found = []
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            found.append(dict(state.read_json(path) or {}))
        except _TROUBLE as error:
            log.error("not a request path=%s error=%r", path, str(error))
        path.unlink(missing_ok=True)
    return found
