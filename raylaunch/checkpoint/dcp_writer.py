"""DCP's writer of files, with digests of all of them and the commit as the end of it. Runs wherever the save does."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from raylaunch.checkpoint import checksums, store
from raylaunch.errors import StateError

METADATA = ".metadata"
"""The file that DCP's rank 0 writes: what lies where."""

Digests = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class SaveRequest:
    """One save: where it is written to, and what is said of it when it is committed (see `store.commit`)."""

    path: Path
    step: int
    world_size: int
    attempt: int
    run: str
    facts: dict[str, Any]
    run_incarnation: int


class _Written(list[WriteResult]):
    """What a rank wrote, for DCP, which passes it to rank 0, and the digests of its files, for us."""

    files: Digests


class CheckpointWriter(FileSystemWriter):
    """The commit lies inside DCP's last exchange: when it fails, all ranks get its error."""

    def __init__(self, order: SaveRequest) -> None:
        super().__init__(order.path)
        self._order = order

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            written = _Written(super().write_data(plan, planner).wait())
        except RuntimeError as error:
            raise _storage_error(error) from error
        names = sorted({result.storage_data.relative_path for result in written})
        written.files = {name: checksums.digest(self._order.path / name) for name in names}
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        order, files = self._order, {METADATA: checksums.digest(self._order.path / METADATA)}
        for written in results:
            assert isinstance(written, _Written)
            files |= written.files
        store.commit(
            order.path, step=order.step, world_size=order.world_size, attempt=order.attempt, run=order.run,
            facts=order.facts, run_incarnation=order.run_incarnation, files=files,
        )  # fmt: skip


def cause(error: CheckpointException) -> BaseException:
    """The first rank's error, one of the storage before others."""
    causes = [error.failures[rank][0] for rank in sorted(error.failures)]
    return next((c for c in causes if isinstance(c, (OSError, StateError))), causes[0])


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
