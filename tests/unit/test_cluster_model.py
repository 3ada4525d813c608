"""benchmarks/cluster_model: the closed form, the simulation and the ledger agree."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import cluster_model
from raylaunch.errors import UsageError
from raylaunch.observe.history import goodput, timeline


@pytest.mark.parametrize("nodes", [64, 2048])
@pytest.mark.parametrize("interval", [60.0, 300.0])
@pytest.mark.parametrize("replacement", [0.0, 600.0])
def test_the_closed_form_and_the_simulation_agree(nodes: int, interval: float, replacement: float) -> None:
    costs = cluster_model.SANDBOX.saving(5.0).changed("connect=40,detect=3")
    month = 30 * 86400.0
    says = cluster_model.predicted(costs, nodes, month, interval, replacement)
    does = cluster_model.simulated(costs, nodes, month, interval, replacement, seed=1)
    assert says == pytest.approx(does, rel=0.02)
    assert does == cluster_model.simulated(costs, nodes, month, interval, replacement, seed=1)


def test_the_best_interval_is_the_best() -> None:
    for save, mtbf in ((0.25, 1265.0), (20.0, 1265.0), (30.0, 10125.0), (60.0, 600.0)):
        best = cluster_model.best_interval(save, mtbf)
        there = cluster_model.ettr(best, save, 60.0, mtbf)
        around = [cluster_model.ettr(best * factor, save, 60.0, mtbf) for factor in (0.25, 0.5, 0.8, 1.25, 2, 4)]
        assert there >= max(around) - 1e-3
        assert 0.5 < best / (2 * save * mtbf) ** 0.5 < 1.5  # Young's, to first order
    assert cluster_model.best_interval(100.0, 10.0) == 10.0


@given(st.floats(1, 1e4), st.floats(0, 100), st.floats(0, 1000), st.floats(10, 1e7))
def test_a_ratio_is_a_ratio(interval: float, save: float, recovery: float, mtbf: float) -> None:
    worse = cluster_model.ettr(interval, save, recovery, mtbf)
    assert 0 <= worse <= 1 and worse <= cluster_model.ettr(interval, save, recovery, mtbf, while_down=False) + 1e-9
    assert worse <= cluster_model.ettr(interval, save, recovery, 2 * mtbf) + 1e-9


def test_the_model_against_a_ledger() -> None:
    """Faults at random moments of a made-up run: the model says from the means what the ledger adds up."""
    source = random.Random(5)
    events: list[dict[str, Any]] = [{"time": 0.0, "kind": "queued"}]
    metrics: list[dict[str, Any]] = []
    now, step, commit = 1.0, 0, 0
    for attempt in range(1, 300):
        events.append({"time": now, "kind": "attempt_started", "attempt": attempt, "workers": 3, "from_step": commit})
        now, step = now + 10.0, commit
        events.append({"time": now, "kind": "model_built", "attempt": attempt})
        fault = now + source.expovariate(1 / 60)
        while now + 1.0 < fault:
            now, step = now + 1.0, step + 1
            metrics.append({"step": step, "loss": 1.0, "attempt": attempt, "world_size": 3, "time": now})
            if step % 8 == 0 and now + 1.0 < fault:
                now, commit = now + 0.5, step
                events.append({"time": now, "kind": "commit", "attempt": attempt, "step": step, "seconds": 0.5})
        now = fault
        events.append({"time": now, "kind": "fault_injected", "seq": attempt, "fault": "node"})
        events.append({"time": now + 1, "kind": "fault", "attempt": attempt, "cause": "node_lost"})
        events.append(
            {"time": now + 1.5, "kind": "attempt_ended", "attempt": attempt, "how": "fault", "committed": commit}
        )
        now += 2.0
    found = cluster_model.check(goodput.compute(timeline.read(events, metrics)))
    assert (
        found.faults > 250 and found.interval == pytest.approx(8, rel=0.1) and found.save == pytest.approx(0.5, rel=0.1)
    )
    assert found.predicted == pytest.approx(found.real, abs=0.02)


def test_the_table_of_sizes() -> None:
    text = cluster_model.table(cluster_model.SANDBOX, cluster_model.sizes("2048"), 30 * 86400.0, None, 300.0, seed=0)
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["256", "512", "1024", "2048"]
    assert "save 5m" in text and "best" in text
    assert cluster_model.sizes("16,4") == [16, 4]


def test_what_is_no_number_of_nodes_or_phase_is_refused() -> None:
    with pytest.raises(UsageError, match="not a number of nodes"):
        cluster_model.sizes("many")
    with pytest.raises(UsageError, match="no phase 'lunch'"):
        cluster_model.SANDBOX.changed("lunch=3")


def test_durations_for_people() -> None:
    assert [cluster_model.spoken(v) for v in (12.0, 90.0, 7200.0, 2592000.0)] == ["12s", "1.5m", "2h", "30d"]
