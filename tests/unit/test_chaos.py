"""Faults on purpose: the plan, the campaign's loop on a made-up run, who may be hit, and the model."""

from __future__ import annotations

import itertools
import json
import os
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
from raylaunch.state import event_log, files
from raylaunch.tools.chaos import campaign, faults, recovery_summary, remote, schedule
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
    for bad in ("", "x", "0s", "-1s", "1w", "1h30"):
        with pytest.raises(UsageError, match="not a duration"):
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
        ("nothing --faults fire", "unknown fault fire"),
        ("nothing --every soon", "not a duration"),
        ("nothing", "no run nothing"),
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
        self.rows: list[dict[str, Any]] = []
        self.broken: list[str] = []
        self.mended: list[str] = []

    def events(self) -> list[dict[str, Any]]:
        return self.rows

    def commits(self, after: int) -> list[dict[str, Any]]:
        return [e for e in self.rows[after:] if e["kind"] == "commit"]

    def known(self) -> str:
        return "nothing is known"

    def commit(self) -> None:
        self.rows.append({"kind": "commit", "attempt": self.attempt, "time": self.clock.now})

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
    monkeypatch.setattr(event_log, "append", lambda directory, event: None)
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
    from test_goodput import one_fault

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
    record = recovery_summary.of(run, outcomes, 104.0, 126.0, seed=7)
    row = next(r for r in record["faults"] if r["kind"] == "node")
    assert (row["count"], row["recovered"], row["detect_median"], row["steps_lost"]) == (1, 1, 0.25, 2)
    assert row["recovery_worst"] == pytest.approx(5.5) and record["all"]["count"] == 2
    assert record["steps"]["ok"] and 0.6 < record["goodput"] < 0.75
    text = recovery_summary.table(record)
    for words in ("0.25 s", "5.50 s", "left out: 6 head", "each exactly once; lost 0, repeated 0", "goodput"):
        assert words in text, text
    assert recovery_summary.percentile([1, 2, 3, 4], 0.5) == 2 and recovery_summary.percentile([1.0], 0.95) == 1
