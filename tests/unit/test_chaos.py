"""Faults on purpose: the plan, the campaign's loop on a made-up run, who may be hit, and the model."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from raylaunch.cli.chaos import chaos
from raylaunch.errors import UsageError
from raylaunch.observe.history import goodput, timeline
from raylaunch.state import files
from raylaunch.tools.chaos import campaign, cluster_model, faults, remote, schedule, summary
from raylaunch.tools.chaos.campaign import Campaign
from raylaunch.tools.chaos.faults import Aim, Broken
from raylaunch.tools.chaos.schedule import KINDS, Planned

# --- the plan -----------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.lists(st.sampled_from(sorted(KINDS)), min_size=1, unique=True))
def test_the_same_seed_gives_the_same_sequence(seed: int, kinds: list[str]) -> None:
    one = list(itertools.islice(schedule.plan(kinds, seed), 3 * len(kinds)))
    assert one == list(itertools.islice(schedule.plan(kinds, seed), 3 * len(kinds)))
    assert [p.seq for p in one] == list(range(1, 3 * len(kinds) + 1))
    for begin in range(0, len(one), len(kinds)):  # each kind once a round
        assert {p.kind for p in one[begin : begin + len(kinds)]} == set(kinds)
    assert all(0 <= p.pick < 1 and 0.75 <= p.pause <= 1.25 for p in one)


def test_a_plan_does_not_change_between_versions() -> None:
    """A seed in a closing note must give the same faults years later."""
    first = [
        (p.kind, round(p.pick, 3), p.coin) for p in itertools.islice(schedule.plan(["node", "worker", "head"], 7), 4)
    ]
    assert first == [("worker", 0.651, True), ("node", 0.366, True), ("head", 0.037, True), ("node", 0.827, True)]


def test_words_of_the_command_line() -> None:
    assert [schedule.seconds(w) for w in ("60s", "10m", "1.5h", "30d", "7", "250ms")] == [
        60,
        600,
        5400,
        2592000,
        7,
        0.25,
    ]
    assert [schedule.spoken(v) for v in (12.0, 90.0, 7200.0, 2592000.0)] == ["12s", "1.5m", "2h", "30d"]
    for bad in ("", "x", "0s", "-1s", "1w", "1h30"):
        with pytest.raises(UsageError, match="no duration"):
            schedule.seconds(bad)
    assert schedule.parse_kinds("node, worker") == ["node", "worker"]
    for bad, words in (("node,fire", "unknown fault fire"), ("", "no fault"), ("node,node", "twice")):
        with pytest.raises(UsageError, match=words):
            schedule.parse_kinds(bad)


def test_what_needs_root_is_refused_without() -> None:
    faults.check(["worker", "driver", "hang"], None, "slurm")
    with pytest.raises(UsageError, match=r"fault node, cut needs a sandbox \(backend local\)"):
        faults.check(["node", "worker", "cut"], None, "local")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "no run is named"),
        ("nothing --faults fire", "unknown fault fire"),
        ("nothing --every soon", "no duration"),
        ("nothing", "no run nothing"),
        ("--simulate", "needs --nodes and --mttf-node"),
        ("--simulate --nodes many --mttf-node 1d", "not a number of nodes"),
        ("--simulate --nodes 8 --mttf-node 1d --phases lunch=3", "no phase 'lunch'"),
        ("--check nothing", "no run nothing"),
    ],
)
def test_bad_input(line: str, words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(chaos, [*line.split(), "--state-dir", str(tmp_path)])
    assert isinstance(done.exception, UsageError) and words in done.exception.message and done.exception.hint


# --- reaching into a node -----------------------------------------------------------------------------


def test_only_what_carries_the_marker_is_hit() -> None:
    """A child of a marked process counts too, whatever it calls itself; anything else is refused."""
    here = remote.Reach("secret", lambda node, argv: remote._finished(node, argv, os.environ))
    marked = {**os.environ, "RAYLAUNCH_CANARY": "secret"}
    ours = subprocess.Popen(["sh", "-c", "env -i sleep 60 & echo ready; wait"], env=marked, stdout=subprocess.PIPE)
    other = subprocess.Popen(["sleep", "60"])
    try:
        assert ours.stdout is not None and ours.stdout.readline() == b"ready\n"
        found = {p.pid: p for p in here.processes("here")}
        assert ours.pid in found and other.pid not in found and os.getpid() not in found
        (child,) = [p for p in found.values() if p.program == "sleep" or (p.has("sleep 60") and p.pid != ours.pid)]
        here.signal(child, signal.SIGKILL)
        assert ours.wait(10) == 0  # its child is gone
        fake = remote.Process("here", other.pid, found[ours.pid].start, ("sleep",))
        for process in (fake, found[ours.pid]):
            with pytest.raises(remote.Miss):
                here.signal(process, signal.SIGKILL)
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.communicate()


def test_the_sandbox_of_a_shell() -> None:
    assert remote.sandbox_of(Path("/home/me/.raylaunch"), {}) is None
    assert remote.sandbox_of(Path("/home/me/.raylaunch"), {"SLURM_CONF": "/etc/slurm/slurm.conf"}) is None


# --- the campaign -------------------------------------------------------------------------------------


class Clock:
    """Time that passes when somebody sleeps; what is due happens then."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for item in sorted(self.due, key=lambda item: item[0]):
            if item[0] <= self.now:
                self.due.remove(item)
                item[1]()

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        self.due.append((self.now + seconds, act))


class FakeRun:
    """A run that recovers 3 s after each fault, unless told otherwise."""

    def __init__(self, clock: Clock, directory: Path) -> None:
        self.clock, self.run_dir = clock, directory
        self.state, self.attempt, self.recovers = "running", 1, True
        self.is_training = True
        self.events: list[dict[str, Any]] = []
        self.broken: list[str] = []
        self.mended: list[str] = []

    def look(self) -> list[dict[str, Any]]:
        return self.events

    def commits(self, after: int) -> list[dict[str, Any]]:
        return [e for e in self.events[after:] if e["kind"] == "commit"]

    def known(self) -> str:
        return "nothing is known"

    def commit(self) -> None:
        self.events.append({"kind": "commit", "attempt": self.attempt, "time": self.clock.now})

    # What Faults offers.
    @property
    def victim(self) -> FakeRun:
        return self

    def aim(self, planned: Planned) -> Aim:
        return Aim(planned.kind, "node2")

    def strike(self, aim: Aim) -> Broken | None:
        def back() -> None:
            if self.recovers:
                self.attempt += KINDS[aim.kind].restarts
                self.commit()

        for seconds in (3.0, 9.0, 20.0, 40.0):
            self.clock.after(seconds, back if seconds == 3.0 else self.commit)
        if not KINDS[aim.kind].lasts and aim.kind != "node":
            return None
        self.broken.append(aim.kind)
        return Broken(f"mend {aim.kind}", lambda: self.mended.append(aim.kind))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRun]:
    clock = Clock()
    monkeypatch.setattr(campaign, "time", clock)
    monkeypatch.setattr(files, "append_event", lambda directory, kind, **fields: None)
    yield FakeRun(clock, tmp_path)


def make(fake: FakeRun, kinds: list[str], seed: int = 0) -> Campaign:
    return Campaign(fake, schedule.plan(kinds, seed), 10.0, 60.0, 5.0, lambda text: None)  # type: ignore[arg-type]


def test_faults_come_and_are_recovered(fake: FakeRun) -> None:
    made = make(fake, ["worker", "node", "freeze", "slurmd"])
    assert made.go(None, 8)
    assert len(made.outcomes) == 8
    assert all(o.recovered and not o.why for o in made.outcomes)
    assert {o.kind: o.restarted for o in made.outcomes} == {
        "worker": True,
        "node": True,
        "freeze": True,
        "slurmd": False,
    }
    assert fake.mended == fake.broken  # each, and before the next


def test_what_is_waited_for_is_said(fake: FakeRun) -> None:
    said: list[str] = []
    made = make(fake, ["worker"])
    made.say = said.append
    fake.is_training = False
    fake.clock.after(7.0, lambda: setattr(fake, "is_training", True))
    assert made.go(None, 2)
    assert said[0].startswith("waits until the run trains") and said[1].startswith("the run trains; the first fault")
    assert sum("first fault" in line for line in said) == 1


def test_the_time_is_up(fake: FakeRun) -> None:
    made = make(fake, ["worker"])
    assert made.go(60.0, None)
    assert 3 <= len(made.outcomes) <= 7


def test_a_run_that_does_not_recover_is_a_failure(fake: FakeRun) -> None:
    fake.recovers = False
    fake.clock.due = []
    made = make(fake, ["node"])
    fake.commit = lambda: None  # type: ignore[method-assign]
    assert not made.go(None, 3)
    (outcome,) = made.outcomes
    assert not outcome.recovered and "within 60 s" in outcome.why
    assert fake.mended == ["node"]  # all the same


def test_a_run_that_fails_or_finishes(fake: FakeRun) -> None:
    for last, good in (("finished", True), ("failed", False)):
        fake.state = "running"
        fake.clock.after(15.0, lambda last=last: setattr(fake, "state", last))  # type: ignore[misc]
        assert make(fake, ["worker"]).go(600.0, None) is good


def test_an_interrupt_mends(fake: FakeRun) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    fake.recovers = False
    fake.clock.after(14.0, interrupt)
    made = make(fake, ["freeze"])
    with pytest.raises(KeyboardInterrupt):
        made.go(None, 1)
    assert fake.broken == fake.mended == ["freeze"]
    assert [(o.recovered, o.why) for o in made.outcomes] == [(False, "interrupted")]


def test_what_cannot_be_done_is_left_out(fake: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def miss(planned: Planned) -> Aim:
        raise remote.Miss("2 nodes are ready, and 2 must be left")

    monkeypatch.setattr(fake, "aim", miss)
    for seconds in range(0, 400, 10):
        fake.clock.after(seconds, fake.commit)
    made = make(fake, ["node"])
    assert made.go(300.0, None)
    assert made.outcomes and all("must be left" in o.skipped for o in made.outcomes)


def test_a_run_that_stands_still_before_a_fault(fake: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def miss(planned: Planned) -> Aim:
        raise remote.Miss("no rank 0 on node1")

    monkeypatch.setattr(fake, "aim", miss)
    made = make(fake, ["worker"])
    assert not made.go(300.0, None)
    assert "no commit within 60 s" in made.outcomes[0].why


# --- the report ---------------------------------------------------------------------------------------


def test_the_ledger_of_a_campaign(tmp_path: Path) -> None:
    from test_ledger import one_fault

    events, metrics = one_fault()
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    for name, rows in ((files.EVENTS_FILE, events), (files.METRICS_FILE, metrics)):
        for row in rows:
            with (run / name).open("a") as out:
                out.write(json.dumps(row) + "\n")
    outcomes = [
        campaign.FaultOutcome(4, "slurmd", "n1", 110, recovered=True),
        campaign.FaultOutcome(5, "node", "n2", 114.5, recovered=True, restarted=True),
        campaign.FaultOutcome(6, "head", "", 120, skipped="2 nodes are ready"),
    ]
    record = summary.of(run, outcomes, 104.0, 126.0, seed=7)
    row = next(r for r in record["faults"] if r["kind"] == "node")
    assert (row["count"], row["recovered"], row["detect_median"], row["steps_lost"]) == (1, 1, 0.25, 2)
    assert row["recovery_worst"] == pytest.approx(5.5) and record["all"]["count"] == 2
    assert record["steps"]["ok"] and 0.6 < record["goodput"] < 0.75
    text = summary.table(record)
    for words in ("0.25 s", "5.50 s", "left out: 6 head", "each exactly once; lost 0, repeated 0", "goodput"):
        assert words in text, text
    assert summary.percentile([1, 2, 3, 4], 0.5) == 2 and summary.percentile([1.0], 0.95) == 1


# --- the model ----------------------------------------------------------------------------------------


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
        events.append({"time": now, "kind": "built", "attempt": attempt})
        fault = now + source.expovariate(1 / 60)
        while now + 1.0 < fault:
            now, step = now + 1.0, step + 1
            metrics.append({"step": step, "loss": 1.0, "attempt": attempt, "world_size": 3, "time": now})
            if step % 8 == 0 and now + 1.0 < fault:
                now, commit = now + 0.5, step
                events.append({"time": now, "kind": "commit", "attempt": attempt, "step": step, "seconds": 0.5})
        now = fault
        events.append({"time": now, "kind": "injected", "seq": attempt, "fault": "node"})
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
