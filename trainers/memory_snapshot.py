"""When a GPU's memory runs out: what lay in it, and who had asked for it (`logging.memory_snapshots`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from raylaunch.training.worker.session import Session

ENTRIES = 200_000
"""Allocations that are remembered, with their stacks: some hundred MB of host memory at most."""


@contextlib.contextmanager
def on_out_of_memory(session: Session, *, wanted: bool) -> Iterator[None]:
    """Within: an out-of-memory error leaves RUN_DIR/memory/attempt-N-rank-R.pickle, for pytorch.org/memory_viz."""
    recording = wanted and torch.device(session.device).type == "cuda"
    if recording:
        torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
    try:
        yield
    except torch.OutOfMemoryError:
        if recording:
            directory = session.run_dir / "memory"
            directory.mkdir(exist_ok=True)
            path = directory / f"attempt-{session.attempt}-rank-{session.rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
            print(f"out of memory: what lay there is in {path} (open it at https://pytorch.org/memory_viz)", flush=True)
        raise
    finally:
        if recording:
            torch.cuda.memory._record_memory_history(enabled=None)
