"""What the parts of a head have in common: who it is, what it remembers, where files are written, and its tasks."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from raylaunch.checkpoint.events import Event
from raylaunch.cluster.head.allocation_policy import Course
from raylaunch.config.schema import Config
from raylaunch.errors import RaylaunchError, StateError
from raylaunch.host.internal_errors import EXPECTED, InternalErrors
from raylaunch.state import event_log, records, requests
from raylaunch.state.cluster_events import InternalError, WaitingForStorage
from raylaunch.state.head_state import HeadState
from raylaunch.state.published import Published
from raylaunch.state.records import Cluster, Head

log = logging.getLogger("raylaunch.head")
T = TypeVar("T")

AGAIN, AGAIN_AT_MOST = 1.0, 30.0
"""Seconds until storage that failed is asked again: after the first time, and at the most."""


STAYS = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""What waiting does not mend: there is something else than a file there. (Nor does it make JSON of what is none.)"""


class Replaced(RaylaunchError):
    """A newer head leads."""

    def __init__(self) -> None:
        super().__init__("a newer incarnation has begun")


class HeadContext:
    """One head. `stop` ends its node and with it the cluster, `resign` ends its node as head only."""

    def __init__(
        self, directory: Path, cluster: Cluster, config: Config, head: Head, stop: Callable[[str], None],
        resign: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.directory, self.cluster, self.config, self.head = directory, cluster, config, head
        self.stop, self.resign = stop, resign
        self.notice = float(config.slurm.signal.partition("@")[2])
        """Seconds before the end of a job's time at which Slurm's notice comes."""
        self.memory = HeadState(cluster.canary)
        self.course = Course()
        self.exit_code = 0
        self.elected = False
        self.ready, self.enough = asyncio.Event(), asyncio.Event()
        """Ray runs on the head, so a driver can connect; the minimum of nodes is ready."""
        self.table_changed, self.nodes_changed = asyncio.Event(), asyncio.Event()
        self.errors = InternalErrors(lambda work, error: self.event(InternalError(work, error)), self._table_is_another)
        self.duties_file = Published(directory / records.DUTIES_FILE)
        self.waits = 0
        """How often storage that failed was waited for (see `retry_on_storage_error`)."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._files = ThreadPoolExecutor(1, "files")  # one thread: what is written first is there first

    # -- files: shared storage that stalls must not look like a dead head ------------------------------

    async def off_loop(self, work: Callable[..., T], *arguments: Any) -> T:
        """File work in its own thread; in order."""
        self._loop = asyncio.get_running_loop()
        return await self._loop.run_in_executor(self._files, work, *arguments)

    async def retry_on_storage_error(self, work: Callable[..., T], *arguments: Any) -> T:
        """As `off_loop`, for what there is no going on without: storage that fails is waited for, until this is
        cancelled; after half a minute of that there is an event. Raises Replaced instead of working for a head that a newer
        one has replaced."""
        pause, told = AGAIN, False
        while True:
            try:
                await self.still_leads()
                return await self.off_loop(work, *arguments)
            except (Replaced, FileNotFoundError):
                raise  # the storage has answered
            except EXPECTED as error:
                cause = error.__cause__ or error
                if isinstance(cause, ValueError) or getattr(cause, "errno", None) in STAYS:
                    raise
                if pause == AGAIN:  # once: it may be gone for hours
                    log.error("waiting for the storage error=%r", str(error))
                if pause == AGAIN_AT_MOST and not told:
                    await self.off_loop(self._append, WaitingForStorage(str(error)))
                    told = True
            self.waits += 1
            await asyncio.sleep(pause)
            pause = min(AGAIN_AT_MOST, 2 * pause)

    def event(self, event: Event) -> None:
        """One line of the cluster's events, written off the loop."""
        try:
            self._files.submit(self._append, event)
        except RuntimeError:  # that thread is over: these are the last words, from one of their own
            self._append(event)

    def _append(self, event: Event) -> None:
        try:
            event_log.append(self.directory, event)
        except StateError as error:
            log.error("the event %s was not written error=%r", event, str(error))

    def tried(self, work: Callable[..., Any], *arguments: Any) -> None:
        """File work without which the rest goes on."""
        with self.errors.caught(f"end ({getattr(work, '__name__', work)})"):
            work(*arguments)

    def is_fenced(self) -> bool:
        return records.is_fenced(self.directory, self.head.incarnation)

    async def still_leads(self) -> None:
        """Raises Replaced where a newer head has begun: the files are its own."""
        if await self.off_loop(self.is_fenced):
            raise Replaced

    def close_files(self) -> None:
        """When all is written that was to be."""
        self._files.shutdown()

    def _table_is_another(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.table_changed.set)

    # -- what the next head must know ------------------------------------------------------------------

    def recall(self, nodes: int) -> None:
        """Take over what the head before this one left, and count the allocations. `nodes`: of the base job."""
        memory = self.memory = HeadState.read(self.directory, self.cluster)
        memory.taken = requests.unfinished(self.directory, self.head.incarnation, memory.taken)
        memory.wanted = memory.wanted or nodes
        if memory.running:  # its driver died with its head
            memory.queue.insert(0, memory.running)
            memory.running = ""
        if memory.allocation and memory.allocation != self.head.allocation:
            memory.continued += 1
        memory.allocation = self.head.allocation
        self.duties_file.write(memory.values())

    def remember(self) -> None:
        """Write down what the next head must know."""
        self._files.submit(self._write_memory, self.memory.values())

    def _write_memory(self, memory: dict[str, Any]) -> None:
        with self.errors.caught("duties.json"):
            if not self.is_fenced():
                self.duties_file.write(memory)

    # -- tasks -----------------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """A duty. One that fails ends the cluster: the loops that must go on catch what they raise."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def cancel_all(self) -> None:
        for task in list(self._tasks):
            task.cancel()

    async def all_done(self) -> None:
        """For tests: until nothing is under way any more."""
        while self._tasks:
            await asyncio.gather(*self._tasks)
        await self.off_loop(lambda: None)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("duty failed", exc_info=task.exception())
            self.exit_code = 1
            self.stop(f"the head failed: {task.exception()}")
