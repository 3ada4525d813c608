"""The order of samples: a permutation per epoch, and shares that cover a step exactly once."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers import order


def row(start: int, stop: int, n: int, seed: int = 0) -> list[int]:
    return [int(s) for s in order.samples_at(np.arange(start, stop, dtype=np.int64), n, seed)]


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    image = order.permuted(np.arange(n, dtype=np.int64), n, seed, epoch)
    assert np.array_equal(np.sort(image), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 4**8 - 1, 4**8, 4**8 + 1])
def test_edges_of_the_network_are_permutations(n: int) -> None:
    assert sorted(row(0, n, n)) == list(range(n))


@given(
    n=st.integers(1, 200),
    start=st.integers(0, 10_000),
    sizes=st.lists(st.integers(0, 50), max_size=8),
)
def test_the_row_does_not_depend_on_how_it_is_read(n: int, start: int, sizes: list[int]) -> None:
    """A step may cross epochs, and any cut of the row gives the same samples."""
    whole, pieces, at = row(start, start + sum(sizes), n), [], start
    for size in sizes:
        pieces += row(at, at + size, n)
        at += size
    assert pieces == whole


def test_orders_differ_by_seed_and_epoch_and_stay_as_they_are() -> None:
    assert row(0, 10, 10) != row(10, 20, 10)
    assert row(0, 10, 10) != row(0, 10, 10, seed=1)
    # Written down: a change here would give every run in progress another order.
    assert row(0, 10, 10) == [6, 7, 9, 5, 8, 3, 2, 1, 0, 4]


def test_the_order_looks_random() -> None:
    n = 100_000
    image = order.permuted(np.arange(n, dtype=np.int64), n, 7, 3)
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.02
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    fixed = int((image == np.arange(n)).sum())
    assert fixed < 10  # one is expected


def test_a_step_of_a_billion_samples_costs_little() -> None:
    started = time.process_time()
    samples = row(5 * 10**9, 5 * 10**9 + 4096, 10**9 + 7)
    assert time.process_time() - started < 0.2
    assert len(set(samples)) == 4096


@given(start=st.integers(0, 10**12), count=st.integers(0, 600), world_size=st.integers(1, 70))
def test_shares_cover_each_position_once_and_are_even(start: int, count: int, world_size: int) -> None:
    shares = [order.share(start, start + count, rank, world_size) for rank in range(world_size)]
    covered = [position for low, high in shares for position in range(low, high)]
    assert covered == list(range(start, start + count))
    sizes = [high - low for low, high in shares]
    assert max(sizes) - min(sizes) <= 1


@given(count=st.integers(1, 600), world_size=st.integers(1, 70), local=st.integers(1, 20))
def test_passes_hold_the_largest_share_and_no_more(count: int, world_size: int, local: int) -> None:
    largest = max(high - low for low, high in (order.share(0, count, r, world_size) for r in range(world_size)))
    passes = order.passes(count, world_size, local)
    assert passes * local >= largest > (passes - 1) * local


@given(samples=st.integers(1, 10**6), fraction=st.floats(0, 0.999))
def test_validation_leaves_something_to_train_on(samples: int, fraction: float) -> None:
    training, held_out = order.split_validation(samples, fraction)
    assert training >= 1 and held_out >= 0 and training + held_out == samples
    if fraction > 0 and samples > 1:
        assert held_out >= 1
