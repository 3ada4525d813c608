"""The training loop on a made-up cluster: attempts, holds, faults, fences, and the run's end; no Ray, no process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_cluster import Clock, FakeRay, Made, Work

from raylaunch.checkpoint import store
from raylaunch.config.schema import CheckpointConfig, Config, ElasticConfig
from raylaunch.errors import StateError
from raylaunch.state import files, runs
from raylaunch.state.runs import Run
from raylaunch.training import attempt_monitor, consolidate
from raylaunch.training.policy import AttemptOutcome
from raylaunch.training.training_loop import NewerHead, TrainingLoop
from raylaunch.training.worker_group import WorkerGroupSpec

LOST = AttemptOutcome("fault", "lost rank 1", "lost rank 1: SIGKILL", 1, "worker_lost")
ERROR = AttemptOutcome("error", "ValueError", "rank 0: ValueError", 0, "error")


class Bench:
    """A driver, and what it runs on."""

    def __init__(self, tmp_path: Path, config: Config) -> None:
        self.made, self.clock, self.ray = Made(tmp_path, config), Clock(), FakeRay("a", "b", "c")
        self.made.members(a="ready", b="ready", c="ready")

    def driver(self, **changes: Any) -> TrainingLoop:
        made = self.made
        run = Run.read(made.run_dir)
        assert run is not None
        given = {"incarnation": 1, "clock": self.clock, "sleep": self.clock.sleep, **changes}
        return TrainingLoop(made.directory, made.run_dir, made.record, made.config, run, self.ray, **given)

    def does(self, *work: Work) -> Bench:
        self.ray.work += work
        return self

    def says(self, outcome: str, step: int = 40) -> Work:
        """The trainer saves and leaves with this word."""

        def work(order: WorkerGroupSpec) -> None:
            self.made.finish(order.spec.attempt, outcome, step)

        return work

    def sizes(self) -> list[int]:
        return [len(group.order.nodes) for group in self.ray.groups]

    def state(self) -> tuple[str, str]:
        run = Run.read(self.made.run_dir)
        assert run is not None
        return run.state, run.reason


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    monkeypatch.setattr(attempt_monitor, "EVERY", 1e6)  # the loop's own looks are enough

    def make(**sections: Any) -> Bench:
        return Bench(tmp_path, Config(**sections))

    return make


def ends(ending: AttemptOutcome) -> Work:
    return lambda order: ending


def test_a_run_is_one_attempt_on_all_nodes(bench: Callable[..., Bench]) -> None:
    one = bench()
    assert one.does(one.says("finished")).driver().drive() == "finished"
    (group,) = one.ray.groups
    assert [node.id for node in group.order.nodes] == ["id of a", "id of b", "id of c"] and group.order.world == 6
    assert group.order.spec.attempt == 1 and group.order.spec.global_batch_size > 0 and not group.aborted
    assert one.state() == ("finished", "all steps are done")
    kinds = [event["kind"] for event in one.made.events()]
    assert kinds == [
        "queued",
        "decision",
        "global_batch_size",
        "attempt_started",
        "attempt_ended",
        "decision",
        "finished",
    ]
    assert store.owner(one.made.run_dir / "checkpoints") == (1, 1)


def test_a_lost_worker_costs_an_attempt_and_its_group_is_ended(bench: Callable[..., Bench]) -> None:
    one = bench()
    assert one.does(ends(LOST), one.says("finished")).driver().drive() == "finished"
    assert one.sizes() == [3, 3] and [group.aborted for group in one.ray.groups] == [1, 0]
    (fault,) = one.made.events("fault")
    assert (fault["cause"], fault["rank"], fault["attempt"]) == ("worker_lost", 1, 1)
    assert [event["how"] for event in one.made.events("attempt_ended")] == ["fault", "finished"]


def test_a_lost_node_is_known_by_its_agent_and_left_out(bench: Callable[..., Bench]) -> None:
    one = bench()

    def loses(order: WorkerGroupSpec) -> AttemptOutcome:
        one.clock.at(one.clock.now - 1000 + 1.5, lambda: one.made.members(b="lost"))  # the news come after the errors
        return AttemptOutcome("fault", "communication", "gloo", 0, "communication")

    assert one.does(loses, one.says("finished")).driver().drive() == "finished"
    assert one.sizes() == [3, 2]
    assert [(event["cause"], event["node"]) for event in one.made.events("fault")] == [("node_lost", "b")]


def test_the_same_error_twice_ends_the_run(bench: Callable[..., Bench]) -> None:
    one = bench()
    assert one.does(ends(ERROR), ends(ERROR)).driver().drive() == "failed"
    assert "the same error 2 times" in one.state()[1] and not one.made.events("fault")


def test_a_trainer_without_a_word_is_an_error(bench: Callable[..., Bench]) -> None:
    one = bench()
    assert one.does(lambda order: None, lambda order: None).driver().drive() == "failed"
    assert "returned without session.finish()" in one.state()[1]


def test_attempts_without_a_commit_are_paused_and_decided_again_after_the_pause(bench: Callable[..., Bench]) -> None:
    one = bench(elastic=ElasticConfig(restart_backoff=4, max_strikes=9))
    one.does(ends(LOST), ends(LOST), ends(LOST), one.says("finished"))
    one.clock.at(6, lambda: one.made.members(b="ended"))  # while the fourth attempt is waited for
    assert one.driver().drive() == "finished"
    starts = [event for event in one.made.events("decision") if event["decision"] == "start"]
    assert [event["delay"] for event in starts] == [0, 0, 4, 8] and one.sizes() == [3, 3, 3, 2]


def test_a_pause_ends_with_a_stop(bench: Callable[..., Bench]) -> None:
    one = bench(elastic=ElasticConfig(restart_backoff=50))
    one.does(ends(LOST), ends(LOST))
    one.clock.at(10, lambda: runs.request_stop(one.made.run_dir, "raylaunch stop"))
    assert one.driver().drive() == "stopped" and one.state() == ("stopped", "raylaunch stop")
    assert len(one.ray.groups) == 2 and one.clock.now < 1012


def test_below_the_minimum_it_holds_until_a_node_is_there(bench: Callable[..., Bench]) -> None:
    one = bench(elastic=ElasticConfig(min_nodes=4, min_nodes_timeout=100))
    one.does(one.says("finished"))
    one.clock.at(30, lambda: one.made.members(d="ready"))
    one.clock.at(30, lambda: one.ray.names.append("d"))
    assert one.driver().drive() == "finished" and one.sizes() == [4]
    (hold,) = [event for event in one.made.events("decision") if event["decision"] == "hold"]
    assert hold["reason"] == "3 of at least 4 nodes" and hold["setting"] == "elastic.min_nodes=4"


def test_it_gives_up_after_the_hold_timeout(bench: Callable[..., Bench]) -> None:
    one = bench(elastic=ElasticConfig(min_nodes=4, min_nodes_timeout=100))
    assert one.driver().drive() == "failed" and "3 of at least 4 nodes for 10" in one.state()[1]


def test_a_plan_that_cannot_share_a_node_leaves_it(bench: Callable[..., Bench]) -> None:
    one = bench(distributed={"tp_size": 2, "cp_size": 2})  # two workers a node: an even number of nodes
    assert one.does(one.says("finished")).driver().drive() == "finished" and one.sizes() == [2]


def test_ray_is_waited_for_but_not_for_ever(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.ray.names = ["a"]
    one.clock.at(5, lambda: one.ray.names.append("b"))
    assert one.does(one.says("finished")).driver().drive() == "finished"
    assert one.sizes() == [2] and 1020 <= one.clock.now < 1022


def test_a_node_that_is_drained_is_left_and_the_head_is_told_once(bench: Callable[..., Bench]) -> None:
    one = bench()

    def drains(order: WorkerGroupSpec) -> AttemptOutcome:
        one.made.members(c="draining")
        return LOST

    assert one.does(drains, ends(LOST), one.says("finished")).driver().drive() == "finished"
    assert one.sizes() == [3, 2, 2]
    assert [(r["kind"], r["node"]) for r in one.made.requests()] == [("drained", "c")]


def test_losses_on_one_node_are_a_strike(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench()
    monkeypatch.setattr("raylaunch.training.heartbeat_server.HeartbeatServer.node", lambda self, rank: "b")
    one.does(ends(LOST), ends(LOST), ends(LOST), one.says("finished"))
    assert one.driver().drive() == "finished"
    assert [(r["kind"], r["node"]) for r in one.made.requests()] == [("strike", "b")]


def test_a_stop_that_goes_on_elsewhere_queues_the_run(bench: Callable[..., Bench]) -> None:
    one = bench()

    def stops(order: WorkerGroupSpec) -> None:
        runs.request_stop(one.made.run_dir, "walltime", continues=True)
        one.made.finish(order.spec.attempt, "stopped", 20)

    assert one.does(stops).driver().drive() == "paused" and one.state()[0] == "queued"


def test_a_newer_head_ends_the_driver_with_nothing_written(bench: Callable[..., Bench]) -> None:
    one = bench()

    def elects(order: WorkerGroupSpec) -> AttemptOutcome:
        one.made.head(2)
        return LOST

    driver = one.does(elects).driver()
    with pytest.raises(NewerHead):
        driver.drive()
    assert one.state()[0] == "running" and not one.made.events("attempt_ended")


def test_a_newer_fence_ends_the_driver(bench: Callable[..., Bench]) -> None:
    one = bench()
    driver = one.driver()
    checkpoints = files.make_dir(one.made.run_dir / "checkpoints")
    store.fence(checkpoints, 5, 1)
    with pytest.raises(NewerHead):
        driver.drive()
    assert not one.ray.groups


def test_storage_that_hiccups_is_waited_for(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench()
    driver, real, fails = one.does(one.says("finished")).driver(), store.latest, itertools.count()

    def latest(directory: Path) -> Any:
        if next(fails) < 4:
            raise StateError("cannot read it")
        return real(directory)

    monkeypatch.setattr(store, "latest", latest)
    assert driver.drive() == "finished" and one.clock.now >= 1000 + 1 + 2 + 4 + 8


def test_the_next_driver_writes_down_how_the_attempt_of_the_last_one_ended(bench: Callable[..., Bench]) -> None:
    one = bench()

    def dies(order: WorkerGroupSpec) -> AttemptOutcome:
        raise MemoryError

    with pytest.raises(MemoryError):
        one.does(dies).driver().drive()
    assert one.state()[0] == "running"
    one.made.members(2)
    assert one.does(one.says("finished")).driver(incarnation=2).drive() == "finished"
    first, _ = one.made.events("attempt_ended")
    assert (first["cause"], first["attempt"]) == ("head_lost", 1) and one.ray.groups[-1].order.spec.attempt == 2


class Weights:
    """In place of the export: the run's state when it began, and what it was asked meanwhile."""

    def __init__(self, one: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: list[str] = []
        self.over: list[str | None] = []
        self._one = one
        monkeypatch.setattr(consolidate, "consolidate", self)

    def __call__(
        self, run_dir: Path, config: Config, event: Callable[..., None], over: Callable[[], str | None]
    ) -> None:
        self.states.append(self._one.state()[0])
        self.over.append(over())
        runs.request_stop(run_dir, "raylaunch down")
        self.over.append(over())


SAVES = CheckpointConfig(save_consolidated=True)


def test_a_run_is_saved_as_finished_before_its_weights_are_written_which_hear_a_stop(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bench(checkpoint=SAVES)
    weights = Weights(one, monkeypatch)
    assert one.does(one.says("finished")).driver().drive() == "finished"
    assert weights.states == ["finished"] and weights.over == [None, "raylaunch down"]
    assert one.made.events()[-1]["kind"] == "finished"


def test_of_a_run_that_is_over_nothing_is_done(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench(checkpoint=SAVES)
    weights = Weights(one, monkeypatch)
    run = Run.read(one.made.run_dir)
    assert run is not None
    run.save(one.made.run_dir, state="finished")
    assert one.driver().drive() == "finished" and not one.ray.groups and not weights.states


def test_a_thread_that_dies_is_an_event(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.driver().thread_died("pulse", "ValueError: x")
    assert one.made.events("thread_died")[0]["thread"] == "pulse"
