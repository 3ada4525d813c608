"""Sharded checkpoints with torch.distributed.checkpoint: every rank writes and reads its own part.

A checkpoint is a dict of named tensors (sharded or plain), or of such dicts; what they mean is the
trainer's business. Saving: all ranks write into the pending directory and hash what they wrote; in DCP's last
exchange rank 0 commits (`store`), so that every rank knows whether it counts. In the background the
same happens over copies, in a thread or a process (`save_thread`, `save_process`), one save in flight. A save that fails for want of space or the
like ends nothing: it is told, and tried again at the next one. Loading: the newest commit whose files
verify, each rank checking a share of them; resharding happens by itself. All exchanges go over a gloo
group of their own, so that they never mix with the training's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from raylaunch.checkpoint import checksums, dcp_writer, store
from raylaunch.checkpoint.dcp_writer import CheckpointWriter, SaveRequest
from raylaunch.checkpoint.events import CheckpointFailed, CheckpointInvalid, CheckpointSlow, Committed, Event
from raylaunch.checkpoint.rank import Rank
from raylaunch.checkpoint.save_process import SaveProcess
from raylaunch.checkpoint.save_thread import SaveThread
from raylaunch.checkpoint.store import Commit, Fenced, InvalidCheckpoint, RetentionPolicy
from raylaunch.errors import StateError

T = TypeVar("T")
Beside = Literal["thread", "process"]
"""Where a save in the background runs; torch's AsyncCheckpointerType."""

LOOKS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds to wait before each look at a checkpoint that rank 0 sees whole and another rank does not (yet)."""
LONGEST_PAUSE = 30.0
"""Between two tries of a last save, in seconds; the first is half a second, each next one twice as long."""


def make_group(timeout: float) -> dist.ProcessGroup:
    """The gloo group for everything about checkpoints; all ranks call this. `timeout` in seconds."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    return group


def newest(session: Rank, group: dist.ProcessGroup) -> Commit | None:
    """The newest commit that verifies, the same on all ranks; None when there is none to use.

    A damaged one is told as an event and set aside; one that cannot be read is told and passed over,
    but when nothing else is left, that is a StateError: to begin anew would be the wrong answer.
    """
    refused: dict[Path, InvalidCheckpoint] = {}
    while True:
        commit = _on_rank_0(group, lambda: _candidate(session, refused))
        if commit is None:
            return None
        bad = _verify(commit, group)
        if bad is None:
            return commit
        if session.rank == 0:
            _refuse(session, bad, refused)


def load(commit: Commit, state: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Fill the tensors in place, each rank its shards, whatever the sharding was when saved, and replace the rest."""
    try:
        state_dict_loader.load(state, storage_reader=FileSystemReader(commit.path), process_group=group)
    except CheckpointException as error:
        raise StateError(
            f"cannot load the checkpoint {commit.path}: {dcp_writer.cause(error)}",
            "If it is damaged, move that directory away. The run then resumes from the previous checkpoint.",
        ) from error


class Saver:
    """Saves, commits and retains; one per worker and attempt."""

    def __init__(
        self,
        session: Rank,
        group: dist.ProcessGroup,
        *,
        keep: RetentionPolicy,
        background: Beside | None,
        timeout: float,
    ) -> None:
        """`timeout`: of the exchanges of a process that saves, in seconds."""
        self._session, self._group, self._keep = session, group, keep
        self._beside: SaveThread | SaveProcess | None = None
        if background == "process":
            self._beside = SaveProcess(session.device, group, f"{session.run_incarnation}-{session.attempt}", timeout)
        elif background == "thread":
            self._beside = SaveThread(session.device, group)
        self._in_flight: tuple[int, Future[StateError | None]] | None = None
        self._committed: int | None = None
        self._collected = False
        self._seconds: list[float] = []  # that the saves took (rank 0)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Any],
        facts: dict[str, Any],
        *,
        wait: bool = False,
        patience: float = 0.0,
    ) -> bool:
        """Save after `step` steps; all ranks call this, after the save before it. Whether it is committed; in
        the background (unless `wait`) True once the copies are made.

        One that fails is told as an event and tried again for `patience` seconds, after which it is a
        StateError; without patience it is the next regular save's turn. Fenced ends the attempt at once.
        """
        self.wait()
        if step == self._committed:
            return True
        self._collect()
        if self._beside is not None and not wait and not patience:
            self._begin(self._beside, step, tensors, facts)
            return True
        deadline, pause = time.monotonic() + patience, 0.5
        while True:
            self._session.progress(step, "save")
            error = self._save(step, tensors, facts)
            if error is None:
                self._committed = step
                return True
            if not patience:
                return False
            next_at = time.monotonic() + pause
            if not _on_rank_0(self._group, lambda: next_at < deadline):  # noqa: B023  called at once
                raise error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def wait(self) -> bool:
        """Until the save in the background is over; whether it is committed. Raises when the attempt cannot go on."""
        if self._in_flight is None:
            return True
        (step, over), self._in_flight = self._in_flight, None
        if over.result() is not None:
            return False
        self._committed = step
        return True

    def failed(self) -> bool:
        """Whether the save in the background has ended here so that the attempt cannot go on. Tell the others:
        all then `give_up` at the same step, rather than leave some of them in a collective."""
        return self._in_flight is not None and self._in_flight[1].done() and self._in_flight[1].exception() is not None

    def give_up(self) -> NoReturn:
        """Raise what ended the save in the background, here or on another rank."""
        if isinstance(self._beside, SaveProcess):
            self._beside.kill()  # it may wait for that rank's, which is no more
        self.wait()
        raise StateError("the background save failed on another rank", "See the log of rank 0.")

    def close(self) -> None:
        """Wait for the last save, then give back its buffers and the group."""
        self.wait()
        if self._beside is not None:
            self._beside.close()
        dist.destroy_process_group(self._group)

    def _save(self, step: int, tensors: Mapping[str, Any], facts: dict[str, Any]) -> StateError | None:
        """Save here and now; what went wrong if it did and training can go on."""
        failure, started = None, time.monotonic()
        try:
            order = self._order(step, facts)
            state_dict_saver.save(dict(tensors), storage_writer=CheckpointWriter(order), process_group=self._group)
        except CheckpointException as error:
            failure = error
        return self._settle(step, started, failure)

    def _begin(
        self, beside: SaveThread | SaveProcess, step: int, tensors: Mapping[str, Any], facts: dict[str, Any]
    ) -> None:
        """Copy, and have the copies saved; the future that is in flight is done after `_settle`."""
        started = time.monotonic()
        over: Future[StateError | None] = Future()

        def settle(written: Future[Any]) -> None:
            try:
                over.set_result(self._settle(step, started, written.exception()))
            except Exception as error:  # noqa: BLE001  handed to whoever waits
                over.set_exception(error)

        beside.save(tensors, self._order(step, facts)).add_done_callback(settle)
        self._in_flight = step, over

    def _order(self, step: int, facts: dict[str, Any]) -> SaveRequest:
        s = self._session
        return SaveRequest(self._pending(step), step, s.world_size, s.attempt, s.run, facts, s.run_incarnation)

    def _pending(self, step: int) -> Path:
        session = self._session
        return store.pending(session.checkpoint_dir, step, session.run_incarnation, session.attempt)

    def _settle(self, step: int, started: float, error: BaseException | None) -> StateError | None:
        """After a save, the same on all ranks: tell it and tidy up; the failure if training can go on, else it is raised."""
        session = self._session
        if error is None:
            if session.rank == 0:
                seconds = round(time.monotonic() - started, 3)
                _tell(session, Committed(step, seconds))
                if store.unusually_slow(seconds, self._seconds):
                    _tell(session, CheckpointSlow(step, seconds))
                self._seconds.append(seconds)
                _try(lambda: store.retain(session.checkpoint_dir, self._keep, session.run_incarnation, session.attempt))
            return None
        if not isinstance(error, CheckpointException):
            raise error  # a rank or a connection is gone: no agreement with the others
        path = self._pending(step)
        cause = dcp_writer.cause(error)
        if session.rank == 0:
            _try(lambda: store.delete(path))
        if isinstance(cause, OSError):
            cause = store.explanation(path, "write", cause)
        if isinstance(cause, Fenced) or not isinstance(cause, StateError):
            raise cause
        _tell(session, CheckpointFailed(step, cause.message))
        return cause

    def _collect(self) -> None:
        """Before the first save: what older attempts left behind may take the space that we need."""
        session = self._session
        if session.rank == 0 and not self._collected:
            _try(lambda: store.collect(session.checkpoint_dir, session.run_incarnation, session.attempt))
        self._collected = True


def _candidate(session: Rank, refused: dict[Path, InvalidCheckpoint]) -> Commit | None:
    """The newest commit that is not refused (rank 0); the bad ones above it are told."""
    for one in store.iter_checkpoints(session.checkpoint_dir):
        if one.path in refused:
            continue
        if isinstance(one, Commit):
            return one
        _refuse(session, one, refused)
    unreadable = [bad for bad in refused.values() if not bad.damaged]
    if unreadable:
        bad = unreadable[0]
        raise StateError(
            f"no checkpoint in {session.checkpoint_dir} can be read: {bad.path.name}/{bad.file}: {bad.why}",
            "Check the storage. The run resumes from there once it can be read.",
        )
    return None


def _refuse(session: Rank, bad: InvalidCheckpoint, refused: dict[Path, InvalidCheckpoint]) -> None:
    refused[bad.path] = bad
    _tell(session, CheckpointInvalid(bad.step, f"{bad.path.name}/{bad.file}", bad.why))
    if bad.damaged:
        _try(lambda: store.set_aside(bad))


def _verify(commit: Commit, group: dist.ProcessGroup) -> InvalidCheckpoint | None:
    """Check all files, each rank a share of them: the first that rank 0, too, finds bad.

    A rank alone does not condemn a checkpoint: its node may see a shared file system as it was."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for pause in LOOKS:
        time.sleep(pause)
        found: list[InvalidCheckpoint | None] = [None] * size
        dist.all_gather_object(found, checksums.check(commit, checksums.share(commit, rank, size)), group=group)
        doubtful = {bad.file: number for number, bad in enumerate(found) if bad is not None}
        if not doubtful:
            return None
        bad = _on_rank_0(group, lambda: checksums.check(commit, doubtful))  # noqa: B023  called at once
        if bad is not None:
            return bad
    file, number = next(iter(doubtful.items()))
    raise StateError(
        f"rank {number} does not read {commit.path / file} as rank 0 does",
        "Check that checkpoint.checkpoint_dir is on a file system that all nodes share, and its mount on that node.",
    )


def _on_rank_0(group: dist.ProcessGroup, ask: Callable[[], T]) -> T:
    """Rank 0's answer, or its StateError, on all ranks."""
    answer: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            answer = [ask()]
        except StateError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0, group=group)
    if isinstance(answer[0], StateError):
        raise answer[0]
    value: T = answer[0]
    return value


def _tell(session: Rank, event: Event) -> None:
    """An event of rank 0. A full disk may be what it is about: then it goes to the log."""
    try:
        session.record(event)
    except StateError as error:
        print(f"{event} ({error.message})", file=sys.stderr, flush=True)


def _try(tidy: Callable[[], object]) -> None:
    """Tidying up must not fail a save that is done, nor hide why one failed: said in the log, done another time."""
    try:
        tidy()
    except StateError as error:
        print(error.message, file=sys.stderr, flush=True)
