"""The order of samples: a permutation per epoch, and shares that cover a step exactly once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylaunch.data import sample_order


def row(start: int, stop: int, n: int, seed: int = 0) -> list[int]:
    return [int(s) for s in sample_order.samples_at(np.arange(start, stop, dtype=np.int64), n, seed)]


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    image = sample_order.permuted(np.arange(n, dtype=np.int64), n, seed, epoch)
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


@given(weights=st.lists(st.floats(0.01, 10), min_size=2, max_size=6), seed=st.integers(0, 99), block=st.integers(0, 99))
def test_a_mixture_takes_each_of_its_sources_in_turn(weights: list[float], seed: int, block: int) -> None:
    """Every position of every source once, and the shares exact in every block."""
    quotas = sample_order.quotas(weights)
    assert quotas.sum() == sample_order.BLOCK
    assert np.all(np.abs(quotas - np.array(weights) / sum(weights) * sample_order.BLOCK) <= 1)
    positions = np.arange(block * sample_order.BLOCK, (block + 1) * sample_order.BLOCK, dtype=np.int64)
    sources, places = sample_order.mixed(positions, quotas, seed)
    for number, quota in enumerate(quotas):
        mine = np.sort(places[sources == number])
        assert np.array_equal(mine, np.arange(block * quota, (block + 1) * quota))
    cut = [sample_order.mixed(part, quotas, seed) for part in np.split(positions, [7, 5000])]
    assert np.array_equal(np.concatenate([s for s, _ in cut]), sources)
    assert np.array_equal(np.concatenate([p for _, p in cut]), places)


def test_orders_differ_by_seed_and_epoch_and_stay_as_they_are() -> None:
    assert row(0, 10, 10) != row(10, 20, 10)
    assert row(0, 10, 10) != row(0, 10, 10, seed=1)
    # Written down: a change here would give every run in progress another order.
    assert row(0, 10, 10) == [6, 7, 9, 5, 8, 3, 2, 1, 0, 4]


def test_the_order_looks_random() -> None:
    n = 100_000
    image = sample_order.permuted(np.arange(n, dtype=np.int64), n, 7, 3)
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.02
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    fixed = int((image == np.arange(n)).sum())
    assert fixed < 10  # one is expected


def test_a_step_of_a_billion_samples_costs_as_much_as_its_own_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, feistel = [], sample_order._feistel

    def counted(words: Any, *more: Any) -> Any:
        sizes.append(words.size)
        return feistel(words, *more)

    monkeypatch.setattr(sample_order, "_feistel", counted)
    samples = row(5 * 10**9, 5 * 10**9 + 4096, 10**9 + 7)
    assert len(set(samples)) == 4096
    assert sum(sizes) < 4 * 4096  # the network permutes a domain of less than four times as many


@given(start=st.integers(0, 10**12), count=st.integers(0, 600), world_size=st.integers(1, 70))
def test_shares_cover_each_position_once_and_are_even(start: int, count: int, world_size: int) -> None:
    shares = [sample_order.share(start, start + count, rank, world_size) for rank in range(world_size)]
    covered = [position for low, high in shares for position in range(low, high)]
    assert covered == list(range(start, start + count))
    sizes = [high - low for low, high in shares]
    assert max(sizes) - min(sizes) <= 1


@given(count=st.integers(1, 600), world_size=st.integers(1, 70), local=st.integers(1, 20))
def test_passes_hold_the_largest_share_and_no_more(count: int, world_size: int, local: int) -> None:
    largest = max(high - low for low, high in (sample_order.share(0, count, r, world_size) for r in range(world_size)))
    passes = sample_order.passes(count, world_size, local)
    assert passes * local >= largest > (passes - 1) * local


@given(samples=st.integers(1, 10**6), fraction=st.floats(0, 0.999))
def test_validation_leaves_something_to_train_on(samples: int, fraction: float) -> None:
    training, held_out = sample_order.split_validation(samples, fraction)
    assert training >= 1 and held_out >= 0 and training + held_out == samples
    if fraction > 0 and samples > 1:
        assert held_out >= 1


# The run as a whole: whatever sizes it has and whatever dies, the committed steps are those of the straight run.


@dataclass
class Recipe:
    """What is constant in a run."""

    samples: int
    seed: int
    global_batch_size: int
    local_batch_size: int
    steps: int
    ckpt_every: int

    def step(self, step: int, world_size: int) -> list[int]:
        """The samples of a step in the order of ranks and passes, each rank as `data.Loader` reads it."""
        size = self.global_batch_size
        ranks = [
            sample_order.pieces(step * size, (step + 1) * size, rank, world_size, self.local_batch_size)
            for rank in range(world_size)
        ]
        assert len({len(passes) for passes in ranks}) == 1  # every pass is a collective
        assert all(len(piece) <= self.local_batch_size for passes in ranks for piece in passes)
        read = [sample_order.samples_at(piece, self.samples, self.seed) for passes in ranks for piece in passes]
        return [int(sample) for piece in read for sample in piece]


@dataclass
class History:
    """A run as checkpoints tell it: what the newest commit has consumed, and what was consumed since."""

    recipe: Recipe
    committed: list[list[int]] = field(default_factory=list)

    def attempt(self, world_size: int, dies_after: int | None, saves_fail: bool) -> None:
        """From the last commit on, until it dies or the run is over. What is not committed is lost."""
        recipe, consumed = self.recipe, list(self.committed)
        while len(consumed) < recipe.steps and dies_after != 0:
            consumed.append(recipe.step(len(consumed), world_size))
            if (len(consumed) % recipe.ckpt_every == 0 and not saves_fail) or len(consumed) == recipe.steps:
                self.committed = list(consumed)
            dies_after = None if dies_after is None else dies_after - 1


recipes = st.builds(
    Recipe,
    samples=st.integers(1, 60),
    seed=st.integers(0, 5),
    global_batch_size=st.integers(1, 24),
    local_batch_size=st.integers(1, 5),
    steps=st.integers(1, 20),
    ckpt_every=st.integers(1, 6),
)
attempts = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 12), st.booleans()), max_size=8)


@given(recipe=recipes, attempts=attempts, last_size=st.integers(1, 30))
def test_faults_and_sizes_leave_no_trace_in_what_was_consumed(
    recipe: Recipe, attempts: list[tuple[int, int, bool]], last_size: int
) -> None:
    straight, run = History(recipe), History(recipe)
    straight.attempt(1, None, False)
    for world_size, dies_after, saves_fail in attempts:
        run.attempt(world_size, dies_after, saves_fail)
    run.attempt(last_size, None, False)
    assert run.committed == straight.committed  # the same samples in the same order, step by step
    assert [len(step) for step in run.committed] == [recipe.global_batch_size] * recipe.steps
    flat = [sample for step in run.committed for sample in step]
    counts = np.bincount(flat, minlength=recipe.samples)
    assert counts.max() - counts.min() <= 1  # no sample again before all others have been read


@given(recipe=recipes, attempts=attempts)
def test_a_run_that_is_not_over_is_the_beginning_of_the_straight_one(
    recipe: Recipe, attempts: list[tuple[int, int, bool]]
) -> None:
    straight, run = History(recipe), History(recipe)
    straight.attempt(3, None, False)
    for attempt in attempts:
        before = len(run.committed)
        run.attempt(*attempt)
        assert len(run.committed) >= before
        assert run.committed == straight.committed[: len(run.committed)]
