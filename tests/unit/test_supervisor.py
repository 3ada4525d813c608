"""The keeper: the moment of its fork, for Slurm ends a job whenever it likes; and when it starts another agent."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterable

import pytest

from raylaunch.cluster.agent import supervisor
from raylaunch.cluster.agent.agent import AGAIN
from raylaunch.cluster.agent.supervisor import LONG_LIFE, MAX_PAUSE, MAX_TRIES, Keeper

KEEP = """
import os, signal, sys
from raylaunch.cluster.agent import entry, supervisor

def told():
    for pid in {pids}:
        os.kill(pid, signal.SIGTERM)

entry.main = lambda: signal.pause() or 0
os.register_at_fork({when}=told)
sys.exit(supervisor.Keeper().keep())
"""


@pytest.mark.parametrize(
    ("when", "pids"),
    [
        ("before", "[os.getpid()]"),
        ("after_in_parent", "[os.getpid()]"),
        ("after_in_child", "[os.getppid(), os.getpid()]"),
    ],
)
def test_a_node_that_is_told_to_end_during_the_fork_ends(when: str, pids: str) -> None:
    """Nobody may miss it: what Slurm has to SIGKILL leaves its temp directory."""
    done = subprocess.run([sys.executable, "-c", KEEP.format(when=when, pids=pids)], timeout=120, check=False)
    assert done.returncode == 128 + signal.SIGTERM


class Clock:
    """Stands in for `time`: sleeping takes no time."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


class Scripted(Keeper):
    """Its agents end as told: (exit code, seconds of its life), one after the other."""

    def __init__(self, clock: Clock, lives: Iterable[tuple[int, float]]) -> None:
        super().__init__()
        self.clock, self.lives = clock, iter(lives)
        self.pauses: list[float] = []

    def _one_life(self) -> int:
        self.pauses.append(self.clock.slept)
        self.clock.slept = 0.0
        status, seconds = next(self.lives)
        self.clock.now += seconds
        return status


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(supervisor, "time", made)
    monkeypatch.setattr(supervisor.signal, "signal", lambda *_: None)
    monkeypatch.setattr(supervisor.processes, "end_tree", lambda *_, **__: 0)
    return made


@pytest.mark.parametrize("status", [0, 1])
def test_an_agent_that_ends_by_itself_ends_the_node(clock: Clock, status: int) -> None:
    assert Scripted(clock, [(status, 1.0)]).keep() == status


def test_an_agent_that_was_the_head_comes_back_at_once(clock: Clock) -> None:
    made = Scripted(clock, [(AGAIN, 1.0), (0, 1.0)])
    assert made.keep() == 0 and made.pauses == [0.0, 0.0]


def test_an_agent_that_is_killed_comes_back_until_the_node_counts_as_broken(clock: Clock) -> None:
    made = Scripted(clock, [(-9, 1.0)] * (MAX_TRIES + 1))
    assert made.keep() == 1
    assert len(made.pauses) == MAX_TRIES + 1 and all(0.0 < pause < MAX_PAUSE + 0.1 for pause in made.pauses[1:])
    assert made.pauses == sorted(made.pauses)


def test_ends_that_lie_far_apart_are_not_counted_together(clock: Clock) -> None:
    made = Scripted(clock, [*[(-9, LONG_LIFE + 1.0)] * (3 * MAX_TRIES), (0, 1.0)])
    assert made.keep() == 0 and max(made.pauses) < 0.5


def test_no_agent_is_started_beside_what_the_last_one_left(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor.processes, "end_tree", lambda *_, **__: 2)
    assert Scripted(clock, [(-9, 1.0)]).keep() == 128 + 9


def test_a_node_that_is_told_to_end_during_a_pause_ends(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Scripted(clock, [(-9, 1.0), (-15, 0.0)])

    def sleep(seconds: float) -> None:
        made._hand_on(signal.SIGTERM, None)

    monkeypatch.setattr(clock, "sleep", sleep)
    assert made.keep() == 128 + 15 and len(made.pauses) == 2
