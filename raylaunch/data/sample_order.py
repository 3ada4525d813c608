"""Which samples a step consumes, at any world size: pure arithmetic, nothing stored.

Training reads an endless row of positions: epoch after epoch, each a seeded permutation of the n
training samples. Step k consumes positions [k*G, (k+1)*G), so the position in the data *is* the
step. `share` cuts a step's positions into one piece per rank, `passes` says how many micro-batches
every rank runs. The permutation is a Feistel network over the next power of four, walked until it
lands below n: each position costs a few multiplications, whatever n is. A mixture of several sources
gives each of them its quota of every BLOCK positions, shuffled within the block (`mixed`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_ROUNDS = 6
BLOCK = 10_000
"""Positions in which a mixture has exactly its shares."""


def samples_at(positions: Positions, n: int, seed: int) -> Positions:
    """The sample indices (each in [0, n)) at these positions of the endless row."""
    assert n >= 1
    samples = np.empty_like(positions)
    epochs = positions // n
    for epoch in np.unique(epochs):  # a step crosses into a next epoch now and then
        here = epochs == epoch
        samples[here] = permuted(positions[here] - epoch * n, n, seed, int(epoch))
    return samples


def permuted(indices: Positions, n: int, seed: int, epoch: int) -> Positions:
    """The images of `indices` (each in [0, n)) under the permutation of [0, n) named by (seed, epoch)."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = _keys(seed, epoch)
    words = _feistel(indices.astype(np.uint64), half_bits, keys)
    # Cycle walking: an image outside [0, n) is sent on until it falls inside. The network permutes
    # a domain of less than 4n, so that takes under four turns on average and stays a bijection.
    outside = np.flatnonzero(words >= n)
    while outside.size:
        words[outside] = _feistel(words[outside], half_bits, keys)
        outside = outside[words[outside] >= n]
    return words.astype(np.int64)


def quotas(weights: Sequence[float]) -> Positions:
    """Of every BLOCK positions, how many each source gets: by weight, within one."""
    ends = np.floor(np.cumsum(weights) / sum(weights) * BLOCK + 0.5).astype(np.int64)
    return np.diff(ends, prepend=0)


def mixed(positions: Positions, quotas: Positions, seed: int) -> tuple[Positions, Positions]:
    """For each position of a mixture: its source, and its position in that source's own endless row.

    Every position of every source's row comes exactly once. A single source is read as it is."""
    if len(quotas) == 1:
        return np.zeros_like(positions), positions
    blocks, slots = np.divmod(positions, BLOCK)
    for block in np.unique(blocks):
        here = blocks == block
        slots[here] = permuted(slots[here], BLOCK, seed, int(block))
    ends = np.cumsum(quotas)
    sources = np.searchsorted(ends, slots, side="right").astype(np.int64)
    return sources, blocks * quotas[sources] + slots - (ends - quotas)[sources]


def share(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rank's contiguous part of [start, stop); parts differ by at most one and may be empty."""
    count = stop - start
    return start + count * rank // world_size, start + count * (rank + 1) // world_size


def passes(count: int, world_size: int, local_batch_size: int) -> int:
    """Micro-batches each rank runs for `count` samples: as many as the largest share needs.

    The same on all ranks, because every pass of a sharded model is a collective."""
    largest = -(-count // world_size)
    return -(-largest // local_batch_size)


def pieces(start: int, stop: int, rank: int, world_size: int, local_batch_size: int) -> list[Positions]:
    """Rank's positions of [start, stop), one piece per pass; pieces that are short or empty get padded."""
    mine = np.arange(*share(start, stop, rank, world_size), dtype=np.int64)
    count = passes(stop - start, world_size, local_batch_size)
    return [mine[i * local_batch_size : (i + 1) * local_batch_size] for i in range(count)]


def split_validation(samples: int, fraction: float) -> tuple[int, int]:
    """(training, validation) counts; validation is the last part, and leaves training at least one."""
    held_out = min(samples - 1, max(1, round(samples * fraction))) if fraction > 0 else 0
    return samples - held_out, held_out


def _keys(seed: int, epoch: int) -> list[np.uint64]:
    digest = hashlib.blake2b(f"raylaunch order {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return [np.uint64(int.from_bytes(digest[i : i + 8], "little")) for i in range(0, len(digest), 8)]


def _feistel(words: _Words, half_bits: int, keys: list[np.uint64]) -> _Words:
    """A bijection of [0, 4**half_bits): swap the halves, mixing one into the other, once per key."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = words >> shift, words & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(words: _Words) -> _Words:
    """Every output bit depends on every input bit (the finaliser of splitmix64; wraps at 64 bits)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
