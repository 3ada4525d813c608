"""Sharded checkpoints with torch.distributed.checkpoint: every rank writes and reads its own part.

A checkpoint is a flat dict of named tensors (sharded or plain); what they mean is the trainer's
business. Saving: all ranks write into the pending directory; rank 0 knows from DCP's last exchange
that everybody's files are there and synced, and commits (`store`). In the background the same
happens in a thread over copies, one save in flight. Loading reshards by itself. All exchanges go
over a gloo group of their own, so that they never mix with the training's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from raylaunch.checkpoint import store
from raylaunch.checkpoint.store import Commit
from raylaunch.errors import StateError
from raylaunch.session import Session


def make_group(timeout: float) -> dist.ProcessGroup:
    """The gloo group for everything about checkpoints; all ranks call this. `timeout` in seconds."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    return group


def newest(directory: Path, group: dist.ProcessGroup) -> Commit | None:
    """The newest commit as rank 0 sees it, so that all ranks load the same one."""
    answer: list[Commit | StateError | None] = [None]
    if dist.get_rank(group) == 0:
        try:
            answer = [store.latest(directory)]
        except StateError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0, group=group)
    if isinstance(answer[0], StateError):
        raise answer[0]
    return answer[0]


def load(commit: Commit, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    """Fill the tensors in place, each rank its shards, whatever the sharding was when saved."""
    try:
        state_dict_loader.load(dict(tensors), storage_reader=FileSystemReader(commit.path), process_group=group)
    except CheckpointException as error:
        raise StateError(
            f"cannot load the checkpoint {commit.path}: {_cause(error)}",
            "If it is damaged, move that directory away: the run then goes on from the commit before it.",
        ) from error


class Saver:
    """Saves, commits and retains; one per worker and attempt."""

    def __init__(self, session: Session, group: dist.ProcessGroup, *, keep: int, background: bool) -> None:
        self._session, self._group, self._keep = session, group, keep
        self._stager = _make_stager(session.device) if background else None
        self._in_flight: Future[None] | None = None
        self._last_step: int | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Save after `step` steps; all ranks call this. Returns when it is committed, or when the copies
        for the background are made. Waits for the save before it."""
        self.wait()
        if step == self._last_step:
            return
        session, started = self._session, time.monotonic()
        if session.rank == 0 and self._last_step is None:
            store.collect(session.checkpoint_dir, session.attempt)
        self._last_step = step
        path = store.pending(session.checkpoint_dir, step, session.attempt)
        writer = FileSystemWriter(path)

        def complete() -> None:
            """On rank 0, once all ranks have written: the commit."""
            if session.rank == 0:
                made = store.commit(
                    path,
                    step=step,
                    world_size=session.world_size,
                    attempt=session.attempt,
                    run=session.run,
                    facts=facts,
                )
                session.event("commit", step=made.step, seconds=round(time.monotonic() - started, 3))
                store.retain(session.checkpoint_dir, self._keep)

        if self._stager is None:
            try:
                state_dict_saver.save(dict(tensors), storage_writer=writer, process_group=self._group)
            except CheckpointException as error:
                raise self._failed(path, error) from error
            complete()
            return
        response = state_dict_saver.async_save(
            dict(tensors), storage_writer=writer, async_stager=self._stager, process_group=self._group
        )
        assert isinstance(response, Future)
        self._in_flight = self._after(response, path, complete)

    def failed(self) -> bool:
        """Whether the save in the background has failed here. Tell the others: all then `give_up` at the
        same step, rather than leave some of them in a collective."""
        return self._in_flight is not None and self._in_flight.done() and self._in_flight.exception() is not None

    def give_up(self) -> NoReturn:
        """Raise what made the save in the background fail, here or on another rank."""
        self.wait()
        raise StateError("the background save failed on another rank", "See the log of rank 0.")

    def wait(self) -> None:
        """Until the save in the background is committed; raises if it failed."""
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def close(self) -> None:
        """Wait for the last save, then give back its buffers and the group."""
        self.wait()
        if self._stager is not None:
            self._stager.close()
        dist.destroy_process_group(self._group)

    def _after(self, written: Future[Any], path: Path, complete: Callable[[], None]) -> Future[None]:
        """A future that is done when `complete` is; it runs in the thread that has written."""
        done: Future[None] = Future()

        def finish(written: Future[Any]) -> None:
            try:
                written.result()
                complete()
            except CheckpointException as error:
                done.set_exception(self._failed(path, error))
            except Exception as error:  # noqa: BLE001  handed to whoever waits
                done.set_exception(error)
            else:
                done.set_result(None)

        written.add_done_callback(finish)
        return done

    def _failed(self, path: Path, error: CheckpointException) -> StateError:
        """What went wrong, for people; the half-written directory goes."""
        if self._session.rank == 0:
            store.delete(path)
        cause = _cause(error)
        if isinstance(cause, OSError):
            return store.explanation(path, "write", cause)
        return StateError(f"cannot write the checkpoint {path}: {cause!r}")


def _cause(error: CheckpointException) -> BaseException:
    """The first rank's error, an operating-system error before others."""
    causes = [error.failures[rank][0] for rank in sorted(error.failures)]
    return next((c for c in causes if isinstance(c, OSError)), causes[0])


def _make_stager(device: str) -> DefaultStager:
    """Copies the tensors before the next step changes them; keeps its buffers from save to save."""
    cuda = torch.device(device).type == "cuda"
    options = StagingOptions(
        use_pinned_memory=cuda,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=cuda,
    )
    return DefaultStager(options)
