"""Where a run's time went and what each fault cost, from histories written by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylaunch.observe.history import goodput, recoveries, timeline
from raylaunch.observe.history.step_audit import verify_steps
from raylaunch.tools.chaos.schedule import KINDS

Rows = list[dict[str, Any]]


def event(time: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": time, "kind": kind, **fields}


def steps(attempt: int, first: int, last: int, start: float, world: int = 3, seconds: float = 1.0) -> Rows:
    """Steps that end at start + 1, start + 2, …"""
    return [
        {"step": s, "loss": 1.0, "attempt": attempt, "world_size": world, "time": start + (s - first + 1) * seconds}
        for s in range(first, last + 1)
    ]


def beginning(attempt: int, at: float, workers: int = 3, from_step: int = 0, **fields: Any) -> Rows:
    """Decision, start (+0.1), connected (+2), built (+3), resumed (+3.5) of an attempt."""
    rows = [
        event(at, "decision", decision="start", attempt=attempt - 1),
        event(at + 0.1, "attempt_started", attempt=attempt, workers=workers, from_step=from_step, **fields),
        event(at + 2, "workers_connected", attempt=attempt),
        event(at + 3, "model_built", attempt=attempt),
    ]
    return [*rows, event(at + 3.5, "resumed", attempt=attempt, step=from_step)] if from_step else rows


def one_fault() -> tuple[Rows, Rows]:
    """Ten steps, commits at 4 and 8; a node dies half a second after step 10, known 0.25 s later."""
    events = [
        event(100, "queued"),
        *beginning(1, 101),
        event(108, "commit", attempt=1, step=4, seconds=0.0),
        event(112, "commit", attempt=1, step=8, seconds=0.0),
        event(114.5, "fault_injected", fault="node", node="n2", seq=5),
        event(114.75, "fault", attempt=1, cause="node_lost", node="n2", rank=1, step=10),
        event(115.25, "attempt_ended", attempt=1, how="fault", committed=8),
        *beginning(2, 115.5, workers=2, from_step=8),
        event(128, "attempt_ended", attempt=2, how="finished", committed=16),
        event(128, "decision", decision="finish", attempt=2),
        event(128, "finished"),
    ]
    # The first step of the second attempt takes a second, as the others do.
    return events, [*steps(1, 1, 10, 104), *steps(2, 9, 16, 119)]


def compute(events: Rows, metrics: Rows, cluster: Rows | None = None, **options: Any) -> goodput.Ledger:
    return goodput.compute(timeline.read(events, metrics, cluster or []), **options)


def test_one_fault() -> None:
    book = compute(*one_fault())
    (found,) = book.recoveries
    assert (found.kind, found.causes, found.node, found.workers) == ("fault", ("node_lost",), "n2", (3, 2))
    assert found.injected == (5,) and found.detect == 0.25 and found.steps_lost == 2 and found.to_step == 8
    wanted = {"detect": 0.25, "stop": 0.5, "decide": 0.25, "start": 0.1, "connect": 1.9, "build": 1.0, "restore": 0.5,
              "first_step": 1.0}  # fmt: skip
    assert found.phases == pytest.approx(wanted)
    assert found.total == pytest.approx(5.5) == pytest.approx(sum(found.phases.values()))
    assert book.wall == pytest.approx(28)
    parts = {name: value for name, value in book.parts.items() if value > 1e-9}
    assert parts == pytest.approx(
        # The last second is the end of the attempt, which is a save's.
        {"queue": 1, "decide": 0.45, "connect": 3.8, "build": 2, "restore": 0.5, "productive": 16, "redone": 2.5,
         "detect": 0.25, "stop": 0.5, "checkpoint": 1}
    )  # fmt: skip
    assert book.parts["productive"] == pytest.approx(16) and book.parts["redone"] == pytest.approx(2.5)
    assert book.goodput == pytest.approx(16 / 28) and book.steps_lost == 2


def test_a_window_counts_its_own_time_alone() -> None:
    book = compute(*one_fault(), window=(114, 120))
    assert book.wall == pytest.approx(6) and book.parts["productive"] == pytest.approx(1)
    assert len(book.recoveries) == 1
    assert compute(*one_fault(), window=(120, 130)).recoveries == []


def test_a_fault_during_the_recovery_is_part_of_it() -> None:
    events, metrics = one_fault()
    second = [
        event(117, "fault", attempt=2, cause="node_lost", node="n3"),
        event(117.5, "attempt_ended", attempt=2, how="fault", committed=8),
        *beginning(3, 118, workers=1, from_step=8),
    ]
    events = [e for e in events if e["time"] < 116] + second
    metrics = [*steps(1, 1, 10, 104), *steps(3, 9, 12, 121.5, world=1)]
    (found,) = compute(events, metrics).recoveries
    assert found.attempts == 2 and found.workers == (3, 1) and found.steps_lost == 2
    assert found.phases["retry"] == pytest.approx(117.5 - 115.25)
    assert sum(found.phases.values()) == pytest.approx(found.total)


def test_the_head_is_lost() -> None:
    """Its driver had no last word: the next one writes the end down, the cluster's events know more."""
    events, metrics = one_fault()
    events = [e for e in events if e["time"] < 114.6]
    events += [
        event(122, "fault", attempt=1, cause="head_lost"),
        event(122, "attempt_ended", attempt=1, how="fault", committed=8),
        *beginning(2, 122.25, from_step=8, incarnation=2),
    ]
    cluster = [
        event(90, "head_started", incarnation=1),
        event(117, "election", incarnation=2),
        event(117.5, "head_started", incarnation=2),
    ]
    book = compute(events, [*metrics[:10], *steps(2, 9, 12, 125.75)], cluster)
    (found,) = book.recoveries
    assert found.causes == ("head_lost",) and found.injected == (5,)
    assert found.phases["detect"] == pytest.approx(2.5) and found.phases["elect"] == pytest.approx(0.5)
    assert found.phases["bring_up"] == pytest.approx(4.5) and "stop" not in found.phases
    assert sum(found.phases.values()) == pytest.approx(found.total)
    assert book.parts["bring_up"] == pytest.approx(4.5)


def test_a_resize_costs_what_lies_between_two_steps() -> None:
    events = [
        event(100, "queued"),
        *beginning(1, 100),
        event(105, "resize_requested", attempt=1, why="grow", when="commit"),
        event(107.25, "commit", attempt=1, step=4, seconds=0.25),
        event(107.5, "attempt_ended", attempt=1, how="resized", committed=4),
        *beginning(2, 107.5, workers=4, from_step=4),
    ]
    book = compute(events, [*steps(1, 1, 4, 103), *steps(2, 5, 8, 111, world=4)])
    (found,) = book.recoveries
    assert (found.kind, found.causes, found.steps_lost) == ("resize", ("grow",), 0)
    assert found.total == pytest.approx(5) and found.phases["stop"] == pytest.approx(0.5)
    assert book.parts["redone"] == 0


def test_checkpoint_stalls_are_what_a_save_adds() -> None:
    metrics = steps(1, 1, 9, 103)
    for row in metrics[5:]:
        row["time"] += 0.75  # after step 5 there was a save, which says that it took 0.5 s
    events = [event(100, "queued"), *beginning(1, 100), event(108.5, "commit", attempt=1, step=5, seconds=0.5)]
    book = compute(events, metrics)
    assert book.parts["checkpoint"] == pytest.approx(0.5) and book.save_stall == pytest.approx(0.5)
    assert book.parts["productive"] == pytest.approx(9.25)


def test_a_run_that_holds_and_one_that_was_continued() -> None:
    events, metrics = one_fault()
    events.insert(10, event(115.3, "decision", decision="hold", attempt=1))
    book = compute(events, metrics)
    assert book.parts["holding"] == pytest.approx(0.2)
    later = [event(1000, "queued", continued=True), *beginning(3, 1001, from_step=16)]
    book = compute([*events, *later], [*metrics, *steps(3, 17, 18, 1004.5)])
    assert book.wall == pytest.approx(28 + 6.5)  # the days in between are nobody's
    assert len(book.recoveries) == 1


def the_same_error_twice() -> tuple[Rows, Rows]:
    """Each attempt does the steps up to 31, of which 20 are saved, and fails; then the run has failed."""
    events = [
        event(100, "queued"),
        *beginning(1, 100),
        event(124, "commit", attempt=1, step=20, seconds=0.0),
        event(135, "attempt_ended", attempt=1, how="error", error="KeyError: 1", step=31, committed=20),
        *beginning(2, 135, from_step=20),
        event(151, "attempt_ended", attempt=2, how="error", error="KeyError: 1", step=31, committed=20),
        event(151, "decision", decision="finish", attempt=2, state="failed"),
        event(151, "failed", attempt=2),
    ]
    return events, [*steps(1, 1, 31, 103.5), *steps(2, 21, 31, 139.5)]


def test_what_a_run_ended_with_is_no_recovery(tmp_path: Path) -> None:
    events, metrics = the_same_error_twice()
    survived, last = compute(events, metrics).recoveries
    assert (survived.steps_lost, survived.final) == (11, False) and survived.total is not None
    assert (last.steps_lost, last.final, last.total) == (0, True, None)
    run = tmp_path / "runs" / "bug"
    run.mkdir(parents=True)
    for name, rows in (("events.jsonl", events), ("metrics.jsonl", metrics)):
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = goodput.summary(run)
    assert (told["recoveries"], told["steps_lost"]) == (1, 11) and told["last_recovery"]["total"] == survived.total
    # Before its end was decided, and when it is taken up again, it may yet recover.
    for more in (events[:-1], [*events, event(200, "queued", continued=True)]):
        assert compute(more, metrics).recoveries[-1].final is False


def test_one_that_goes_on() -> None:
    events, metrics = one_fault()
    alive = [e for e in events if e["time"] < 127]
    assert compute(alive, metrics, until=127.5).parts["productive"] == pytest.approx(16.5)
    stuck = compute(alive, metrics, until=187)
    assert stuck.parts["productive"] == pytest.approx(16) and stuck.parts["detect"] > 59
    begun = [e for e in events if e["time"] < 115.3]
    (open_,) = compute(begun, metrics[:10], until=116).recoveries
    assert open_.total is None and open_.steps_lost == 2


def test_old_runs_and_torn_files() -> None:
    """Events without incarnation, faults, cause or built; attempts whose beginning is lost; nothing at all."""
    events, metrics = one_fault()
    few = [e for e in events if e["kind"] in {"queued", "attempt_started", "attempt_ended", "finished"}]
    book = compute(few, metrics)
    (found,) = book.recoveries
    assert found.causes == ("fault",) and found.steps_lost == 2
    assert sum(found.phases.values()) == pytest.approx(found.total)
    assert book.parts["productive"] == pytest.approx(16)
    assert compute([], metrics).parts["productive"] > 10
    assert compute([], []).goodput == 0.0 and compute(events, []).goodput == 0.0
    odd = [*events, {"kind": "commit"}, {"time": "x", "kind": "commit"}, {"time": 1.0}]
    assert compute(odd, [*metrics, {"step": 3, "val_loss": 1.0}, {"loss": 1.0}]).steps == 16


def test_a_clock_that_jumps_moves_nothing_else() -> None:
    events, metrics = one_fault()
    plain = compute(events, metrics)
    for jump in (-5000.0, 5000.0):
        bent = [
            dict(e, time=e["time"] + jump) if e["kind"] == "workers_connected" and e["attempt"] == 2 else e
            for e in events
        ]
        book = compute(bent, metrics)
        assert book.wall == pytest.approx(plain.wall)
        assert book.parts["productive"] == pytest.approx(plain.parts["productive"])


@given(st.integers(0, 10**6))
def test_the_parts_always_add_up(seed: int) -> None:
    source = random.Random(seed)
    events, metrics = one_fault()
    kept = [e for e in events if source.random() < 0.7]
    rows = [dict(m, time=m["time"] + source.uniform(-2, 2)) for m in metrics if source.random() < 0.8]
    cluster = [event(source.uniform(95, 130), source.choice(["head", "election", "driver_lost"])) for _ in range(3)]
    book = compute(kept, rows, cluster, until=source.choice([None, 130.0]))
    assert sum(book.parts.values()) == pytest.approx(book.wall) and min(book.parts.values()) >= 0
    for found in book.recoveries:
        assert found.steps_lost >= 0
        if found.total is not None:
            assert sum(found.phases.values()) == pytest.approx(found.total, abs=0.01)


def test_each_step_counts_once() -> None:
    events, metrics = one_fault()
    found = verify_steps(metrics, events)
    assert found.ok and found.steps == 16 and not found.unlogged
    # A committed step is done again.
    bad = [dict(m, step=m["step"]) for m in metrics] + [dict(metrics[3], attempt=2, time=128.0)]
    assert verify_steps(bad, events).repeated == [4]
    # A step that nobody did; one that nobody wrote down, but a checkpoint from behind it was resumed.
    assert verify_steps([m for m in metrics if m["step"] != 12], events).missing == [12]
    unlogged = verify_steps([m for m in metrics if m["step"] != 7], events)
    assert unlogged.ok and unlogged.unlogged == [7]
    # Twice in one attempt; every other step in the log.
    assert verify_steps([*metrics, metrics[-1]], events).twice == [16]
    assert verify_steps([m for m in metrics if m["step"] % 2 == 0], events, every=2).ok


def test_a_stale_writer_has_no_word() -> None:
    """A worker that was frozen comes back and writes a line: it is of an attempt that is over."""
    events, metrics = one_fault()
    late = dict(metrics[9], step=11, time=125.0)
    found = verify_steps([*metrics, late], events)
    assert found.ok and found.stale == 1
    assert compute(events, [*metrics, late]).parts["productive"] == pytest.approx(16)


def test_a_bad_checkpoint_may_be_done_again() -> None:
    events, metrics = one_fault()
    events = [dict(e, from_step=4) if e["kind"] == "attempt_started" and e["attempt"] == 2 else e for e in events]
    events = [dict(e, step=4) if e["kind"] == "resumed" else e for e in events]
    metrics = [*steps(1, 1, 10, 104), *steps(2, 5, 12, 119)]
    assert verify_steps(metrics, events).repeated == [5, 6, 7, 8]
    events.insert(9, event(115.3, "checkpoint_invalid", attempt=1, step=8, why="digest"))
    assert verify_steps(metrics, events).ok


def test_a_large_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, _ = one_fault()
    events = [e for e in events if e["kind"] != "finished"]
    first, second = steps(1, 1, 20000, 104), []
    shift = 20000.0 - 10
    events = [dict(e, time=e["time"] + shift) if e["time"] > 108.5 else e for e in events]
    for row in events:
        if row["kind"] == "commit" and row["step"] == 8:
            row["step"] = 19998
        if row.get("from_step") == 8 or (row["kind"] == "resumed" and row["step"] == 8):
            row.update({"from_step": 19998} if "from_step" in row else {"step": 19998})
    second = steps(2, 19999, 30000, 119 + shift)
    events = [e for e in events if e["kind"] != "attempt_ended" or e["attempt"] == 1]
    events = [e for e in events if not (e["kind"] == "decision" and e["decision"] == "finish")]
    run = tmp_path / "runs" / "long"
    run.mkdir(parents=True)
    for name, rows in (("events.jsonl", events), ("metrics.jsonl", [*first, *second])):
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn": ')
    monkeypatch.setattr(goodput, "PIECE", 8192)
    monkeypatch.setattr(goodput, "WHOLE", 100_000)
    pieces = goodput.read_pieces(run / "metrics.jsonl", [108.0 + shift, 122.0 + shift])
    assert 100 < len(pieces) < 1000
    whole, thin = compute(events, [*first, *second]), compute(events, list(pieces))
    assert thin.goodput == pytest.approx(whole.goodput, abs=1e-3)
    assert thin.steps_lost == whole.steps_lost == 2
    told = goodput.summary(run)
    assert told["recoveries"] == 1 and told["last_recovery"]["causes"] == ("node_lost",)
    assert json.loads(json.dumps(told))["goodput"] == pytest.approx(whole.goodput, abs=1e-3)


def test_of_many_attempts_the_older_ones_are_known_by_their_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 attempts of 200 steps, each of which loses its last 20."""
    events: list[dict[str, Any]] = [{"time": 0.0, "kind": "queued"}]
    metrics, now = [], 1.0
    for attempt in range(1, 101):
        first = 180 * (attempt - 1)
        events += [
            {"time": now, "kind": "decision", "decision": "start", "attempt": attempt - 1},
            {"time": now, "kind": "attempt_started", "attempt": attempt, "workers": 2, "from_step": first},
            {"time": now + 5, "kind": "first_step", "attempt": attempt, "step": first + 1},
        ]
        metrics += [
            {"step": first + k, "loss": 1.0, "attempt": attempt, "time": now + 4 + k, "world_size": 2} for k in range(1, 201)
        ]  # fmt: skip
        now += 4 + 200
        events += [
            {"time": now - 20, "kind": "commit", "attempt": attempt, "step": first + 180, "seconds": 0.0},
            {"time": now + 1, "kind": "fault", "attempt": attempt, "cause": "node_lost", "node": "n2"},
            {"time": now + 3, "kind": "attempt_ended", "attempt": attempt, "how": "fault", "step": first + 200,
             "committed": first + 180},
        ]  # fmt: skip
        now += 4
    run = tmp_path / "runs" / "long"
    run.mkdir(parents=True)
    for name, rows in (("events.jsonl", events), ("metrics.jsonl", metrics)):
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(goodput, "WHOLE", 100_000)
    monkeypatch.setattr(goodput, "LAST_TURNS", 20)
    whole, thin = goodput.of_run(run), goodput.of_run(run, whole=False)
    assert thin.goodput == pytest.approx(whole.goodput, abs=0.01) and 0.8 < whole.goodput < 0.9
    assert len(thin.recoveries) == len(whole.recoveries) == 100
    assert thin.steps_lost == whole.steps_lost == 2000


def test_a_fault_has_a_name_and_says_when_chaos_brought_it() -> None:
    (recovery,) = compute(*one_fault()).recoveries
    assert recoveries.named(recovery, {}) == "node lost (n2)"
    assert recoveries.named(recovery, {5: "node"}) == "node killed (chaos)"
    assert all(" " in recoveries.named(recovery, {5: kind}).removesuffix(" (chaos)") for kind in KINDS)
