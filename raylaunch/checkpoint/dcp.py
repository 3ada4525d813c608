"""Sharded checkpoints with torch.distributed.checkpoint: every rank writes and reads its own part.

A checkpoint is a dict of named tensors (sharded or plain), or of such dicts; what they mean is the
trainer's business. Saving: all ranks write into the pending directory and hash what they wrote; in DCP's last
exchange rank 0 commits (`store`), so that every rank knows whether it counts. In the background the
same happens in a thread over copies, one save in flight. A save that fails for want of space or the
like ends nothing: it is told, and tried again at the next one. Loading: the newest commit whose files
verify, each rank checking a share of them; resharding happens by itself. All exchanges go over a gloo
group of their own, so that they never mix with the training's.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from raylaunch.checkpoint import digests, store
from raylaunch.checkpoint.store import Bad, Commit, Fenced, Keep
from raylaunch.errors import StateError
from raylaunch.session import Session

T = TypeVar("T")

LOOKS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds to wait before each look at a checkpoint that rank 0 sees whole and another rank does not (yet)."""
LONGEST_PAUSE = 30.0
"""Between two tries of a last save, in seconds; the first is half a second, each next one twice as long."""

METADATA = ".metadata"
"""The file that DCP's rank 0 writes: what lies where."""

Digests = dict[str, tuple[int, str]]


def make_group(timeout: float) -> dist.ProcessGroup:
    """The gloo group for everything about checkpoints; all ranks call this. `timeout` in seconds."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    return group


def newest(session: Session, group: dist.ProcessGroup) -> Commit | None:
    """The newest commit that verifies, the same on all ranks; None when there is none to use.

    A damaged one is told as an event and set aside; one that cannot be read is told and passed over,
    but when nothing else is left, that is a StateError: to begin anew would be the wrong answer.
    """
    refused: dict[Path, Bad] = {}
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
            f"cannot load the checkpoint {commit.path}: {_cause(error)}",
            "If it is damaged, move that directory away: the run then goes on from the commit before it.",
        ) from error


class Saver:
    """Saves, commits and retains; one per worker and attempt."""

    def __init__(self, session: Session, group: dist.ProcessGroup, *, keep: Keep, background: bool) -> None:
        self._session, self._group, self._keep = session, group, keep
        self._stager = _Stager(session.device) if background else None
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
        if self._stager is not None and not wait and not patience:
            self._begin(step, tensors, facts)
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
        self.wait()
        raise StateError("the background save failed on another rank", "See the log of rank 0.")

    def close(self) -> None:
        """Wait for the last save, then give back its buffers and the group."""
        self.wait()
        if self._stager is not None:
            self._stager.close()
        dist.destroy_process_group(self._group)

    def _save(self, step: int, tensors: Mapping[str, Any], facts: dict[str, Any]) -> StateError | None:
        """Save here and now; what went wrong if it did and training can go on."""
        failure, writer = None, self._writer(step, facts)
        try:
            state_dict_saver.save(dict(tensors), storage_writer=writer, process_group=self._group)
        except CheckpointException as error:
            failure = error
        return self._settle(step, failure)

    def _begin(self, step: int, tensors: Mapping[str, Any], facts: dict[str, Any]) -> None:
        """Copy, and save the copies in a thread; the future that is in flight is done after `_settle`."""
        written = state_dict_saver.async_save(
            dict(tensors),
            storage_writer=self._writer(step, facts),
            async_stager=self._stager,
            process_group=self._group,
        )
        assert isinstance(written, Future)
        over: Future[StateError | None] = Future()

        def settle(written: Future[Any]) -> None:
            try:
                over.set_result(self._settle(step, written.exception()))
            except Exception as error:  # noqa: BLE001  handed to whoever waits
                over.set_exception(error)

        written.add_done_callback(settle)
        self._in_flight = step, over

    def _writer(self, step: int, facts: dict[str, Any]) -> _Writer:
        session, started = self._session, time.monotonic()

        def commit(path: Path, files: Digests) -> None:
            """On rank 0, once all ranks have written."""
            store.commit(
                path,
                step=step,
                world_size=session.world_size,
                attempt=session.attempt,
                run=session.run,
                facts=facts,
                incarnation=session.incarnation,
                files=files,
            )
            seconds = round(time.monotonic() - started, 3)
            _tell(session, "commit", step=step, seconds=seconds)
            if store.unusually_slow(seconds, self._seconds):
                _tell(session, "checkpoint_slow", step=step, seconds=seconds)
            self._seconds.append(seconds)

        return _Writer(self._pending(step), commit)

    def _pending(self, step: int) -> Path:
        session = self._session
        return store.pending(session.checkpoint_dir, step, session.incarnation, session.attempt)

    def _settle(self, step: int, error: BaseException | None) -> StateError | None:
        """After a save, the same on all ranks: tidy up; the failure if training can go on, else it is raised."""
        session = self._session
        if error is None:
            if session.rank == 0:
                _try(lambda: store.retain(session.checkpoint_dir, self._keep, session.incarnation, session.attempt))
            return None
        if not isinstance(error, CheckpointException):
            raise error  # a rank or a connection is gone: no agreement with the others
        path = self._pending(step)
        cause = _cause(error)
        if session.rank == 0:
            _try(lambda: store.delete(path))
        if isinstance(cause, OSError):
            cause = store.explanation(path, "write", cause)
        if isinstance(cause, Fenced) or not isinstance(cause, StateError):
            raise cause
        _tell(session, "checkpoint_failed", step=step, error=cause.message)
        return cause

    def _collect(self) -> None:
        """Before the first save: what older attempts left behind may take the space that we need."""
        session = self._session
        if session.rank == 0 and not self._collected:
            _try(lambda: store.collect(session.checkpoint_dir, session.incarnation, session.attempt))
        self._collected = True


class _Written(list[WriteResult]):
    """What a rank wrote, for DCP, which passes it to rank 0, and the digests of its files, for us."""

    files: Digests


class _Writer(FileSystemWriter):
    """DCP's writer, with digests of all files and the commit as the end of it.

    The commit lies inside DCP's last exchange: when it fails, all ranks get its error."""

    def __init__(self, path: Path, commit: Callable[[Path, Digests], None]) -> None:
        super().__init__(path)
        self._directory, self._commit = path, commit

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            written = _Written(super().write_data(plan, planner).wait())
        except RuntimeError as error:
            raise _storage_error(error) from error
        names = sorted({result.storage_data.relative_path for result in written})
        written.files = {name: digests.digest(self._directory / name) for name in names}
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        files: Digests = {}
        for written in results:
            assert isinstance(written, _Written)
            files |= written.files
        files[METADATA] = digests.digest(self._directory / METADATA)
        self._commit(self._directory, files)


def _storage_error(error: RuntimeError) -> Exception:
    """The OSError behind what torch.save raises when a write fails, where there is one to be found."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError):
            return behind
        behind = behind.__cause__ or behind.__context__
    if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
        return OSError(errno.EIO, f"a write failed: {str(error).splitlines()[0]}")
    return error


def _candidate(session: Session, refused: dict[Path, Bad]) -> Commit | None:
    """The newest commit that is not refused (rank 0); the bad ones above it are told."""
    for one in store.walk(session.checkpoint_dir):
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
            "Check that storage; the run goes on from there when it can be read again.",
        )
    return None


def _refuse(session: Session, bad: Bad, refused: dict[Path, Bad]) -> None:
    refused[bad.path] = bad
    _tell(session, "checkpoint_bad", step=bad.step, file=f"{bad.path.name}/{bad.file}", why=bad.why)
    if bad.damaged:
        _try(lambda: store.set_aside(bad))


def _verify(commit: Commit, group: dist.ProcessGroup) -> Bad | None:
    """Check all files, each rank a share of them: the first that rank 0, too, finds bad.

    A rank alone does not condemn a checkpoint: its node may see a shared file system as it was."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for pause in LOOKS:
        time.sleep(pause)
        found: list[Bad | None] = [None] * size
        dist.all_gather_object(found, digests.check(commit, digests.share(commit, rank, size)), group=group)
        doubtful = {bad.file: number for number, bad in enumerate(found) if bad is not None}
        if not doubtful:
            return None
        bad = _on_rank_0(group, lambda: digests.check(commit, doubtful))  # noqa: B023  called at once
        if bad is not None:
            return bad
    file, number = next(iter(doubtful.items()))
    raise StateError(
        f"rank {number} does not read {commit.path / file} as rank 0 does",
        "Is checkpoint.checkpoint_dir on a file system that all nodes share, and is that node sound?",
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


def _tell(session: Session, kind: str, **fields: Any) -> None:
    """An event of rank 0. A full disk may be what it is about: then it goes to the log."""
    try:
        session.event(kind, **fields)
    except StateError as error:
        print(f"{kind} {fields} ({error.message})", file=sys.stderr, flush=True)


def _try(tidy: Callable[[], object]) -> None:
    """Tidying up must not fail a save that is done, nor hide why one failed: said in the log, done another time."""
    try:
        tidy()
    except StateError as error:
        print(error.message, file=sys.stderr, flush=True)


def _cause(error: CheckpointException) -> BaseException:
    """The first rank's error, one of the storage before others."""
    causes = [error.failures[rank][0] for rank in sorted(error.failures)]
    return next((c for c in causes if isinstance(c, (OSError, StateError))), causes[0])


class _Stager(DefaultStager):
    """Copies the tensors before the next step changes them; keeps its buffers from save to save.

    torch's own walks the whole state tensor by tensor each time. Where all of it is tensors, as in our trainer, the
    copies of the first time are filled again in one call (nine times quicker: 300 tensors, 60 MB)."""

    def __init__(self, device: str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._copies: dict[str, Any] = {}
        options = StagingOptions(
            use_pinned_memory=self._on_gpu,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=self._on_gpu,
        )
        super().__init__(options)

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The copies; complete when this returns."""
        if not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
            return super().stage(state_dict, **kwargs)
        if self._copies.keys() != state_dict.keys():
            self._copies = cast(dict[str, Any], super().stage(state_dict, **kwargs))
            return self._copies
        here, there = ([local(d[name]).detach() for name in self._copies] for d in (state_dict, self._copies))
        torch._foreach_copy_(there, here, non_blocking=self._on_gpu)
        if self._on_gpu:
            torch.cuda.synchronize()
        return self._copies


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, or the tensor itself where it is none."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
