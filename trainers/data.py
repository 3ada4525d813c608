"""From the token store to the micro-batches of a step.

A sample is a window of seq_len+1 tokens, windows start every seq_len tokens; the last
val_fraction of them is held out. `Loader.training(step)` gives this rank's share of the step's
samples as micro-batches of one fixed shape; where the share does not fill them, rows of weight 0
do. Reading is memory-mapped and runs one step ahead in a thread. Nothing here has a state to save:
the step says it all (see `order`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from raylaunch.errors import RunError
from trainers import order
from trainers.corpus import BATCH_TOKENS, COLUMN, Store


@dataclass(frozen=True)
class MicroBatch:
    """One pass: `inputs` and `targets` [local_batch_size, seq_len] int64, `weights` [local_batch_size]
    float32, 1 for a sample and 0 for padding. `samples`: how many are real."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    samples: int

    def to(self, device: torch.device) -> MicroBatch:
        """On the device; from pinned memory the copies do not block."""
        inputs, targets = (t.to(device, non_blocking=True) for t in (self.inputs, self.targets))
        return MicroBatch(inputs, targets, self.weights.to(device, non_blocking=True), self.samples)


class Tokens:
    """Random access to the store's memory-mapped column."""

    def __init__(self, path: Path, count: int) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches: dict[int, npt.NDArray[np.uint16]] = {}
        assert self._file.num_record_batches == -(-count // BATCH_TOKENS)

    def read(self, start: int, length: int) -> npt.NDArray[np.uint16]:
        """A view of the mapped file, or a copy where the window crosses record batches."""
        pieces = []
        while length:
            index, offset = divmod(start, BATCH_TOKENS)
            piece = self._batch(index)[offset : offset + length]
            assert len(piece), "the window leaves the store"
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _batch(self, index: int) -> npt.NDArray[np.uint16]:
        if index not in self._batches:
            column = self._file.get_batch(index).column(COLUMN)
            self._batches[index] = column.to_numpy(zero_copy_only=True)
        return self._batches[index]


@dataclass(frozen=True)
class Plan:
    """What fixes the samples of a step, and this rank's part in it."""

    seq_len: int
    seed: int
    global_batch_size: int
    local_batch_size: int
    rank: int
    world_size: int


class Loader:
    """The micro-batches of this rank, for training steps and for validation."""

    def __init__(self, store: Store, plan: Plan, *, val_fraction: float, pin: bool) -> None:
        samples = (store.tokens - 1) // plan.seq_len
        if samples < 1:
            raise RunError(
                f"data.text holds {store.tokens} tokens; one sample of data.seq_len {plan.seq_len} needs "
                f"{plan.seq_len + 1}",
                "Add text or lower data.seq_len.",
            )
        self.training_samples, self.validation_samples = order.split_validation(samples, val_fraction)
        self._plan, self._pin = plan, pin
        self._tokens = Tokens(store.path, store.tokens)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def training(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of training step `step` (from 0); starts on those of the next."""
        if self._ahead is not None and self._ahead[0] == step:
            batches = self._ahead[1].result()
        else:
            batches = self._training(step)
        self._ahead = step + 1, self._reader.submit(self._training, step + 1)
        return batches

    def validation(self, batches: int) -> list[MicroBatch]:
        """This rank's part of `batches` global batches of held-out samples: the same ones every time
        and at any world size, each at most once; fewer when fewer are held out."""
        count, size = self.validation_samples, self._plan.global_batch_size
        if not count:
            return []

        def sample(positions: order.Positions) -> order.Positions:
            return self.training_samples + order.samples_at(positions, count, self._plan.seed)

        stop = min(batches * size, count)
        return [b for at in range(0, stop, size) for b in self._share(at, min(at + size, stop), sample)]

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown(cancel_futures=True)

    def _training(self, step: int) -> list[MicroBatch]:
        size = self._plan.global_batch_size

        def sample(positions: order.Positions) -> order.Positions:
            return order.samples_at(positions, self.training_samples, self._plan.seed)

        return self._share(step * size, (step + 1) * size, sample)

    def _share(self, start: int, stop: int, sample: Callable[[order.Positions], order.Positions]) -> list[MicroBatch]:
        plan = self._plan
        mine = sample(np.arange(*order.share(start, stop, plan.rank, plan.world_size), dtype=np.int64))
        size = plan.local_batch_size
        count = order.passes(stop - start, plan.world_size, size)
        return [self._micro_batch(mine[i * size : (i + 1) * size]) for i in range(count)]

    def _micro_batch(self, samples: order.Positions) -> MicroBatch:
        plan = self._plan
        rows = np.zeros((plan.local_batch_size, plan.seq_len + 1), dtype=np.int64)
        for row, sample in enumerate(samples):
            rows[row] = self._tokens.read(int(sample) * plan.seq_len, plan.seq_len + 1)
        weights = (torch.arange(plan.local_batch_size) < len(samples)).float()
        tokens = torch.from_numpy(rows)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if self._pin:
            inputs, targets, weights = inputs.pin_memory(), targets.pin_memory(), weights.pin_memory()
        return MicroBatch(inputs, targets, weights, samples=len(samples))
