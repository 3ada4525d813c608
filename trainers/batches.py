"""From a run's data to the micro-batches of a step.

`Loader.training(step)` gives this rank's share of the step's samples as micro-batches of one fixed shape;
where the share does not fill them, rows that count for nothing do. Reading is memory-mapped and runs one
step ahead in a thread; `Loader.waited` says how long steps had to wait for it all the same. Nothing here has
a state to save: the step says it all (see `sample_order`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raylaunch.data import sample_order
from raylaunch.trainers import context_parallel
from raylaunch.trainers.datasets import Data, Source

IGNORED = -100
"""The target of a token that does not count in the loss (what torch's cross-entropy ignores)."""

LOOKED_UP = 4096
"""Positions whose samples are looked up at once."""
FETCHERS = 16
"""Samples that are asked for at a time, of data at a URL."""


@dataclass(frozen=True)
class MicroBatch:
    """One pass: `inputs` and `targets` [local_batch_size, tokens] int64, a target IGNORED where it does not count.

    `tokens` is seq_len, or this worker's part of it (see `context_parallel`). `documents`: of every input of the sample, the
    number of its document, [local_batch_size, seq_len] int64; None: all see each other. `samples`, `counted`: how
    many samples and targets are real; a sample counts where its first tokens are. `rows`: how many rows are no
    padding."""

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None
    samples: int
    counted: int
    rows: int

    def to(self, device: torch.device) -> MicroBatch:
        """On the device; from pinned memory the copies do not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """In memory that a GPU copies from by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> MicroBatch:
        documents = None if self.documents is None else move(self.documents)
        return MicroBatch(move(self.inputs), move(self.targets), documents, self.samples, self.counted, self.rows)


@dataclass(frozen=True)
class Plan:
    """What fixes the samples of a step, and this rank's part in it."""

    seq_len: int
    seed: int
    global_batch_size: int
    local_batch_size: int
    rank: int
    world_size: int
    context: tuple[int, int] = (0, 1)
    """Which part of each sample is this worker's, of how many."""


Where = tuple[Source, int]
"""A sample: its source, and its number there."""


class Loader:
    """The micro-batches of this rank, for training steps and for validation."""

    def __init__(self, data: Data, plan: Plan, *, pin: bool) -> None:
        self._data, self._plan, self._pin = data, plan, pin
        self._places = (
            context_parallel.places(*plan.context, plan.seq_len).numpy() if plan.context[1] > 1 else slice(None)
        )
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._looked_up: tuple[int, list[Where]] = -1, []
        self._fetchers = ThreadPoolExecutor(max_workers=FETCHERS, thread_name_prefix="fetch")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None
        self.waited = 0.0
        """Seconds that training has waited for data, in all."""

    def training(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of training step `step` (from 0); starts on those of the next."""
        asked = time.monotonic()
        if self._ahead is not None and self._ahead[0] == step:
            batches = self._ahead[1].result()
        else:
            batches = self._training(step)
        self.waited += time.monotonic() - asked
        self._ahead = step + 1, self._reader.submit(self._training, step + 1)
        return batches

    def validation(self, batches: int) -> list[MicroBatch]:
        """This rank's part of `batches` global batches of held-out samples: the same ones every time
        and at any world size, each at most once; fewer when fewer are held out."""
        count, size = self._data.validation_samples, self._plan.global_batch_size
        if not count:
            return []
        stop = min(batches * size, count)
        return [b for at in range(0, stop, size) for b in self._share(at, min(at + size, stop), self._held_out)]

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown(cancel_futures=True)
        self._fetchers.shutdown(cancel_futures=True)

    def _training(self, step: int) -> list[MicroBatch]:
        size = self._plan.global_batch_size
        return self._share(step * size, (step + 1) * size, self._trained_on)

    def _trained_on(self, positions: sample_order.Positions) -> list[Where]:
        found: list[Where] = []
        known = self._looked_up  # another thread may put another there meanwhile
        for position in positions.tolist():
            block, at = divmod(position, LOOKED_UP)
            if known[0] != block:
                known = self._looked_up = block, self._look_up(block)
            found.append(known[1][at])
        return found

    def _look_up(self, block: int) -> list[Where]:
        """The samples at LOOKED_UP positions: as many cost little more than one."""
        positions = np.arange(block * LOOKED_UP, (block + 1) * LOOKED_UP, dtype=np.int64)
        seed, sources = self._plan.seed, self._data.training
        numbers, places = sample_order.mixed(positions, self._data.quotas, seed)
        samples = np.empty_like(positions)
        for number in np.unique(numbers):
            here = numbers == number
            samples[here] = sample_order.samples_at(places[here], sources[number].training, seed)
        return [(sources[n], sample) for n, sample in zip(numbers.tolist(), samples.tolist(), strict=True)]

    def _held_out(self, positions: sample_order.Positions) -> list[Where]:
        sources = self._data.validation
        samples = sample_order.samples_at(positions, self._data.validation_samples, self._plan.seed)
        ends = np.cumsum([source.validation for source in sources])
        numbers = np.searchsorted(ends, samples, side="right")
        return [
            (sources[n], sources[n].training + int(sample - (ends[n] - sources[n].validation)))
            for n, sample in zip(numbers, samples, strict=True)
        ]

    def _share(
        self, start: int, stop: int, samples: Callable[[sample_order.Positions], list[Where]]
    ) -> list[MicroBatch]:
        plan = self._plan
        cut = sample_order.pieces(start, stop, plan.rank, plan.world_size, plan.local_batch_size)
        return [self._micro_batch(samples(positions)) for positions in cut]

    def _micro_batch(self, samples: list[Where]) -> MicroBatch:
        length, size = self._plan.seq_len, self._plan.local_batch_size
        tokens = np.empty((size, length + 1), dtype=np.int64)
        tokens[len(samples) :] = 0
        # Where each target counts; None: all of them do.
        whole = len(samples) == size and not self._data.masked and all(s.counted is None for s, _ in samples)
        counts = None if whole else np.zeros((size, length), dtype=bool)

        def fill(row: int) -> None:
            source, sample = samples[row]
            at = sample * length
            tokens[row] = source.tokens.read(at, length + 1)
            if counts is not None:
                counts[row] = True if source.counted is None else source.counted.read(at + 1, length)

        if any(source.tokens.far for source, _ in samples):
            list(self._fetchers.map(fill, range(len(samples))))
        else:
            for row in range(len(samples)):
                fill(row)
        here = self._places
        inputs, targets, documents = tokens[:, :-1], tokens[:, 1:], None
        if counts is not None:
            if self._data.masked:
                ends = inputs == self._data.separator
                counts &= ~ends
                documents = torch.from_numpy(np.cumsum(ends, axis=1) - ends)
            targets, counts = np.where(counts, targets, IGNORED), counts[:, here]
        batch = MicroBatch(
            torch.from_numpy(np.ascontiguousarray(inputs[:, here])),
            torch.from_numpy(np.ascontiguousarray(targets[:, here])),
            documents,
            samples=len(samples) if self._plan.context[0] == 0 else 0,
            counted=targets[:, here].size if counts is None else int(counts.sum()),
            rows=len(samples),
        )
        return batch.pinned() if self._pin else batch
