"""The training policy: stepped by hand, and through generated histories."""

from __future__ import annotations

import ast
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylaunch.config.schema import ElasticConfig
from raylaunch.training import policy
from raylaunch.training.hang_detector import Hang
from raylaunch.training.policy import (
    MAX_BACKOFF,
    Abort,
    AttemptOutcome,
    AttemptSnapshot,
    Continue,
    FailureCounts,
    Finish,
    Gathering,
    Hold,
    Resize,
    Start,
    TrainerOutcome,
    TrainingFacts,
    TrainingNode,
    Withdraw,
    decide,
    during,
    ending,
    patient,
    progressed,
    usable,
)
from raylaunch.training.stop_request import AT_COMMIT, NOW

FAULT = AttemptOutcome("fault", "lost rank 3", "lost rank 3: SIGKILL", 3)
ERROR = AttemptOutcome("error", "ValueError: #", "rank 0: ValueError: 7", 0)


def facts(**given: object) -> TrainingFacts:
    return TrainingFacts(**{"nodes": 4, "workers_per_node": 2, **given})  # type: ignore[arg-type]


def test_starts_with_every_worker_of_every_node() -> None:
    assert decide(facts(), ElasticConfig()) == Start(8, 0.0, "4 nodes are alive", "elastic.min_nodes=1")


def test_goes_on_smaller_after_a_fault_at_once() -> None:
    decision = decide(facts(nodes=3, last=FAULT, idle_attempts=1, same_error=1), ElasticConfig())
    assert isinstance(decision, Start) and decision.workers == 6 and decision.delay == 0
    assert "lost rank 3" in decision.reason


def test_the_same_error_twice_ends_the_run_and_a_fault_does_not() -> None:
    assert isinstance(decide(facts(last=ERROR, same_error=1), ElasticConfig()), Start)
    verdict = decide(facts(last=ERROR, same_error=2), ElasticConfig())
    assert isinstance(verdict, Finish) and verdict.state == "failed" and "ValueError" in verdict.reason
    assert verdict.setting == "elastic.max_identical_errors=2"
    assert isinstance(decide(facts(last=FAULT, same_error=50, idle_attempts=50), ElasticConfig()), Start)


@pytest.mark.parametrize(
    ("nodes", "per_node", "together", "expected"),
    [(5, 8, 1, 5), (5, 8, 8, 5), (5, 8, 16, 4), (5, 8, 4, 5), (3, 1, 4, 0), (7, 2, 4, 6), (7, 4, 6, 6)],
)
def test_a_plan_is_not_torn_apart(nodes: int, per_node: int, together: int, expected: int) -> None:
    assert usable(nodes, per_node, together) == expected
    assert expected * per_node % together == 0


def test_holds_until_the_plan_fits() -> None:
    decision = decide(facts(nodes=0, workers_per_node=2, model_parallel_size=8), ElasticConfig())
    assert decision == Hold(
        "0 of at least 4 nodes", "distributed: the parallelism settings need a multiple of 8 workers"
    )


def test_grows_by_as_many_nodes_as_the_plan_can_share() -> None:
    nodes = {n: TrainingNode("ready", 99) for n in "abc"}
    two = view(on=frozenset("ab"), nodes=nodes, model_parallel_size=2)
    assert during(two, ElasticConfig()) == Continue()  # three nodes of one worker are no multiple of two
    four = view(on=frozenset("ab"), nodes=nodes | {"d": TrainingNode("ready", 99)}, model_parallel_size=2)
    grow = during(four, ElasticConfig())
    assert isinstance(grow, Resize) and grow.nodes == frozenset("cd")
    gone = view(on=frozenset("ab"), nodes=nodes, model_parallel_size=2, asked=AT_COMMIT, asked_for=frozenset("cd"))
    assert isinstance(during(gone, ElasticConfig()), Withdraw)


def test_holds_below_the_minimum_and_gives_up_in_the_end() -> None:
    elastic = ElasticConfig(min_nodes=3, min_nodes_timeout=60)
    assert isinstance(decide(facts(nodes=2), elastic), Hold)
    assert isinstance(decide(facts(nodes=2, held=61), elastic), Finish)
    assert isinstance(decide(facts(nodes=3, held=61), elastic), Start)


def test_a_finished_run_is_finished_even_when_it_was_asked_to_stop() -> None:
    done = decide(facts(last=AttemptOutcome("finished"), stop_reason="down"), ElasticConfig())
    assert isinstance(done, Finish) and done.state == "finished"
    stopped = decide(facts(last=AttemptOutcome("stopped"), stop_reason="down"), ElasticConfig())
    assert isinstance(stopped, Finish) and stopped.state == "stopped" and stopped.reason == "down"


@given(
    nodes=st.integers(0, 64),
    per_node=st.integers(1, 8),
    minimum=st.one_of(st.none(), st.integers(1, 64)),
    kind=st.sampled_from(["finished", "stopped", "error", "fault", None]),
    same=st.integers(0, 9),
    idle=st.integers(0, 200),
    held=st.floats(0, 1e5),
    stop=st.one_of(st.none(), st.just("down")),
)
def test_every_decision_keeps_the_promises(
    nodes: int,
    per_node: int,
    minimum: int | None,
    kind: str | None,
    same: int,
    idle: int,
    held: float,
    stop: str | None,
) -> None:
    last = None if kind is None else AttemptOutcome(kind, "f", "t")  # type: ignore[arg-type]
    elastic = ElasticConfig(min_nodes=minimum)
    decision = decide(TrainingFacts(nodes, per_node, stop, last, same, idle, held), elastic)
    assert decision.reason
    match decision:
        case Start():
            assert nodes >= (minimum or 1)
            assert decision.workers == nodes * per_node
            assert 0 <= decision.delay <= MAX_BACKOFF
            assert stop is None and kind not in {"finished", "stopped"}
        case Hold():
            assert nodes < (minimum or 1) and held <= elastic.min_nodes_timeout
        case Finish():
            assert decision.state != "finished" or kind == "finished"


def test_a_pause_is_no_end_and_a_hang_at_the_same_line_is_bounded() -> None:
    paused = decide(facts(stop_reason="walltime", continues=True), ElasticConfig())
    assert isinstance(paused, Finish) and paused.state == "paused" and "walltime" in paused.reason
    hang = AttemptOutcome("fault", "hang of rank 1: a.py:7 in f", "rank 1 hangs", 1, "hang", "node2")
    assert isinstance(decide(facts(last=hang, same_error=1), ElasticConfig()), Start)
    verdict = decide(facts(last=hang, same_error=2), ElasticConfig())
    assert isinstance(verdict, Finish) and verdict.state == "failed" and "same hang 2 times" in verdict.reason


def view(**given: object) -> AttemptSnapshot:
    on = frozenset({"a", "b"})
    return AttemptSnapshot(
        **{"on": on, "nodes": {n: TrainingNode("ready", 99) for n in on}, "age": 99, "begun": True, **given}
    )  # type: ignore[arg-type]


def nodes(**states: str) -> dict[str, TrainingNode]:
    return {name: TrainingNode(what, 99 if what == "ready" else 0) for name, what in states.items()}


@pytest.mark.parametrize("what", ["lost", "failed", "ended", "starting"])
def test_a_node_that_went_ends_the_attempt_at_once(what: str) -> None:
    move = during(view(nodes=nodes(a="ready", b=what)), ElasticConfig())
    assert (
        isinstance(move, Abort) and move.cause == "node_lost" and move.nodes == ("b",) and "b is " + what in move.reason
    )
    raylet = during(view(nodes=nodes(a="restarting", b="ready")), ElasticConfig())
    assert isinstance(raylet, Abort) and raylet.cause == "raylet_lost"
    assert during(view(nodes=nodes(a="ready", b="ready", c=what)), ElasticConfig()) == Continue()  # not one of ours
    assert during(view(nodes={}), ElasticConfig()) == Continue()  # nothing known is nothing lost


def test_a_draining_node_is_left_now_and_once() -> None:
    for seen in (view(nodes=nodes(a="ready", b="draining")), view(draining=frozenset("b"))):
        move = during(seen, ElasticConfig())
        assert isinstance(move, Resize) and move.when == NOW and move.why == "drain" and move.nodes == {"b"}
    assert during(view(nodes=nodes(a="ready", b="draining"), asked=NOW), ElasticConfig()) == Continue()
    grown = view(nodes=nodes(a="ready", b="draining", c="ready"), asked=AT_COMMIT, asked_for=frozenset("c"))
    move = during(grown, ElasticConfig())
    assert isinstance(move, Resize) and move.when == NOW


def test_growth_waits_for_nodes_that_stay_and_is_taken_back_when_they_do_not() -> None:
    three = nodes(a="ready", b="ready", c="ready")
    elastic = ElasticConfig(scale_up_delay=10)
    move = during(view(nodes=three), elastic)
    assert isinstance(move, Resize) and move.when == AT_COMMIT and move.nodes == {"c"}
    assert move.setting == "elastic.scale_up_delay=10"
    for too_early in (
        view(nodes={**three, "c": TrainingNode("ready", 9)}), view(nodes=three, age=9), view(nodes=three, begun=False),
        view(nodes=three, excluded=frozenset("c")), view(nodes=three, draining=frozenset("c")),
        view(nodes=three, stopping=True), view(nodes=three, asked=AT_COMMIT, asked_for=frozenset("c")),
    ):  # fmt: skip
        assert during(too_early, elastic) == Continue()
    gone = view(nodes=nodes(a="ready", b="ready", c="lost"), asked=AT_COMMIT, asked_for=frozenset("c"))
    assert isinstance(during(gone, elastic), Withdraw)


def test_three_losses_on_one_node_or_broken_hardware_are_a_strike() -> None:
    lost = AttemptOutcome("fault", "lost rank 1", "t", 1, "worker_lost", "b")
    tally, strikes = FailureCounts(), []
    for progress in (False, False, True, False, False, False):
        tally, strike = tally.count(lost, progress)
        strikes.append(strike)
    assert strikes == [None, None, None, None, "b", None]
    assert FailureCounts().count(AttemptOutcome("fault", "hardware", "ECC", 1, "hardware", "c"), True)[1] == "c"
    assert (
        FailureCounts().count(AttemptOutcome("fault", "x", "x", None, "node_lost", "c"), False)[1] is None
    )  # the head's own count


STEPS, COMMIT_EVERY, RETURNS_AFTER = 60, 5, 25
FATES = ["none", "node", "two nodes", "all nodes", "worker", "error", "other error", "hang", "drain", "flap", "join"]


class World:
    """A cluster and a trainer of one-second steps, driven by the policy alone; time stands still but here."""

    def __init__(self, fates: list[tuple[str, int]], count: int, elastic: ElasticConfig) -> None:
        self.fates, self.elastic, self.now, self.step, self.committed = deque(fates), elastic, 0.0, 0, 0
        self.nodes = {f"n{i}": ("ready", -1e3) for i in range(count)}
        self.tally, self.attempts, self.asked_at = FailureCounts(), 0, -1e9

    def set(self, name: str, what: str) -> None:
        self.nodes[name] = (what, self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for name, (what, since) in list(self.nodes.items()):
            if what != "ready" and self.now - since >= RETURNS_AFTER:
                self.set(name, "ready")

    def ready(self) -> frozenset[str]:
        return frozenset(n for n, (what, _) in self.nodes.items() if what == "ready")

    def run(self) -> Finish:
        held: float | None = None
        minimum = self.elastic.min_nodes or 1
        for _ in range(5000):
            usable = self.ready()
            tally = self.tally
            known = TrainingFacts(
                len(usable), 2, None, tally.last, tally.same_error, tally.idle_attempts,
                self.now - held if held is not None else 0.0,
            )  # fmt: skip
            match decision := decide(known, self.elastic):
                case Finish():
                    return decision
                case Hold():
                    held = self.now if held is None else held
                    assert len(usable) < minimum
                    self.pass_time(1)
                case Start():
                    held = None
                    assert 0 <= decision.delay <= MAX_BACKOFF
                    assert decision.workers == 2 * len(usable) >= 2 * minimum
                    self.pass_time(decision.delay)
                    if self.ready() >= usable:
                        self.attempt(usable)
        raise AssertionError("the run neither ends nor goes on")

    def attempt(self, on: frozenset[str]) -> None:
        self.attempts += 1
        fate, after = self.fates.popleft() if self.fates else ("none", 0)
        self.step, before, began = self.committed, self.committed, self.now
        asked: Resize | None = None
        ending: AttemptOutcome | None = None
        for second in range(10_000):
            hang = None
            if second == after:
                ending, hang = self.befall(fate, on)
            found = AttemptSnapshot(
                on=on, nodes={n: TrainingNode(w, self.now - s if w == "ready" else 0) for n, (w, s) in self.nodes.items()},
                age=self.now - began, begun=self.step > before, asked=asked.when if asked else 0,
                asked_for=asked.nodes if asked else frozenset(), hang=hang,
            )  # fmt: skip
            match move := during(found, self.elastic):
                case Abort():
                    fingerprint = f"hang {fate}" if move.cause == "hang" else f"{move.cause} {move.nodes}"
                    ending = AttemptOutcome("fault", fingerprint, move.reason, None, move.cause, (*move.nodes, "")[0])
                case Resize():
                    assert asked is None or (asked.when, move.when) == (AT_COMMIT, NOW)
                    if move.why == "grow":
                        assert self.now - began >= self.elastic.scale_up_delay
                        assert all(found.nodes[n].ready_for >= self.elastic.scale_up_delay for n in move.nodes)
                        assert not move.nodes & on
                    asked = move
                case Withdraw():
                    assert asked is not None and not asked.nodes & self.ready()
                    asked = None
                case Continue():
                    pass
            if ending is not None:
                break
            self.step += 1
            self.pass_time(1)
            ends = self.step >= STEPS
            now = asked is not None and asked.when == NOW
            if ends or now or self.step % COMMIT_EVERY == 0:
                self.committed = self.step
                if ends:
                    ending = AttemptOutcome("finished")
                elif asked is not None:
                    ending = AttemptOutcome("resized", text=asked.reason)
            if ending is not None:
                break
        assert ending is not None
        self.tally, _ = self.tally.count(ending, self.committed > before)
        for name, (what, _) in list(self.nodes.items()):
            if what == "draining":
                self.set(name, "ended")
        self.pass_time(10)

    def befall(self, fate: str, on: frozenset[str]) -> tuple[AttemptOutcome | None, Hang | None]:
        names = sorted(on)
        match fate:
            case "node" | "two nodes" | "all nodes":
                for name in names[: {"node": 1, "two nodes": 2, "all nodes": 99}[fate]]:
                    self.set(name, "lost")
            case "worker":
                return AttemptOutcome("fault", "lost rank 0", "lost rank 0", 0, "worker_lost", names[0]), None
            case "error" | "other error":
                return AttemptOutcome("error", fate, fate, 0, "error"), None
            case "hang":
                return None, Hang((0,), 99, self.step, "step", "nothing moves", "elastic.hang_timeout")
            case "drain":
                self.set(names[-1], "draining")
            case "flap":
                for name in sorted(set(self.nodes) - on)[:1]:
                    self.set(name, "lost")
            case "join":
                self.set(f"n{len(self.nodes)}", "ready")
        return None, None


HISTORIES = st.lists(st.tuples(st.sampled_from(FATES), st.integers(0, 30)), max_size=25)


@settings(max_examples=400, deadline=None)
@given(fates=HISTORIES, count=st.integers(1, 6), minimum=st.integers(1, 6), scale_up_delay=st.integers(0, 20),
       same=st.integers(1, 4))  # fmt: skip
def test_every_history_ends_as_it_must(
    fates: list[tuple[str, int]], count: int, minimum: int, scale_up_delay: int, same: int
) -> None:
    """Nodes come back and the trainer is healthy in the end: the run finishes, unless the code itself fails
    `max_identical_errors` times with no commit between. (The minimum is asserted at each start.)"""
    elastic = ElasticConfig(
        min_nodes=min(minimum, count), scale_up_delay=scale_up_delay, max_identical_errors=same, max_strikes=9
    )
    world = World(fates, count, elastic)
    end = world.run()
    if end.state == "finished":
        assert world.committed == STEPS
    else:
        own = {"error", "other error", "hang"}
        assert end.state == "failed" and sum(fate in own for fate, _ in fates) >= same
        assert end.setting == f"elastic.max_identical_errors={same}"
    # A resize costs an attempt: no more of them than there were reasons.
    assert world.attempts <= 1 + 2 * len(fates) + count


@settings(max_examples=200, deadline=None)
@given(fates=st.lists(st.tuples(st.sampled_from(["node", "two nodes", "all nodes", "worker", "drain"]), st.integers(0, 4)),
                      max_size=60))  # fmt: skip
def test_faults_of_the_machines_never_end_a_run(fates: list[tuple[str, int]]) -> None:
    world = World(fates, 3, ElasticConfig(max_identical_errors=1, max_strikes=20))
    assert world.run().state == "finished"


def test_a_worker_that_is_lost_on_every_node_is_the_code_s() -> None:
    """Three losses are a strike, three strikes exclude the node; what still happens then is not the node's."""
    world = World([("worker", 1)] * 60, 3, ElasticConfig(max_strikes=3))
    end = world.run()
    assert (end.state, end.setting, world.attempts) == ("failed", "elastic.max_strikes=3", 12)
    assert "lost rank 0 12 times with no commit between" in end.reason


@given(same=st.integers(1, 5))
def test_the_same_error_again_and_again_ends_the_run_after_that_many(same: int) -> None:
    world = World([("error", 1)] * 20, 2, ElasticConfig(max_identical_errors=same))
    assert world.run().state == "failed" and world.attempts == same


def test_the_plan_s_share_of_the_nodes_is_the_policy_s_business() -> None:
    decision = decide(facts(nodes=5, workers_per_node=2, model_parallel_size=8), ElasticConfig())
    assert isinstance(decision, Start) and decision.workers == 8 and decision.reason.startswith("4 nodes are alive")
    elastic = ElasticConfig(min_nodes=5)
    assert decide(facts(nodes=5, model_parallel_size=8), elastic) == Hold(
        "4 of at least 5 nodes", "elastic.min_nodes=5"
    )


def test_a_pause_is_made_once() -> None:
    known = {"last": FAULT, "idle_attempts": 4}
    decision, rested = decide(facts(**known), ElasticConfig()), decide(facts(**known, rested=True), ElasticConfig())
    assert isinstance(decision, Start) and isinstance(rested, Start) and (decision.delay, rested.delay) == (4, 0)


READY, STARTING = TrainingNode("ready", 5), TrainingNode("starting")


@pytest.mark.parametrize(
    ("known", "waits"),
    [
        (Gathering({"a": READY}, frozenset("a"), age=99), False),
        # Ray does not have it yet: bounded.
        (Gathering({"a": READY, "b": READY}, frozenset("a"), waited=19, age=99), True),
        (Gathering({"a": READY, "b": READY}, frozenset("a"), waited=21, age=99), False),
        # A new driver waits for those on their way, and where nobody is ready: bounded, too.
        (Gathering({"a": READY, "b": STARTING}, frozenset("a"), age=14), True),
        (Gathering({"a": READY, "b": TrainingNode("restarting")}, frozenset("a"), age=14), True),
        (Gathering({"a": READY, "b": STARTING}, frozenset("a"), age=16), False),
        (Gathering({"a": READY, "b": TrainingNode("lost")}, frozenset("a"), age=1), False),
        (Gathering({}, frozenset("a"), age=14), True),
        (Gathering({}, frozenset("a"), age=16), False),
        # So does one that took over; one that has made an attempt of its own does not.
        (Gathering({"b": STARTING}, frozenset(), age=1, last=AttemptOutcome("fault", cause="head_lost")), True),
        (Gathering({"b": STARTING}, frozenset(), age=1, last=AttemptOutcome("fault", cause="driver_lost")), True),
        (Gathering({"b": STARTING}, frozenset(), age=1, last=AttemptOutcome("fault", cause="node_lost")), False),
        # Nobody is waited for when there is nothing more to do.
        (Gathering({"a": READY, "b": READY}, frozenset("a"), stopping=True), False),
        (Gathering({"a": READY, "b": READY}, frozenset("a"), last=AttemptOutcome("finished")), False),
        (Gathering({"a": READY, "b": READY}, frozenset("a"), last=AttemptOutcome("stopped")), False),
        (Gathering({"a": READY, "b": READY}, frozenset("a"), last=AttemptOutcome("resized")), True),
    ],
)
def test_how_long_nodes_are_waited_for(known: Gathering, waits: bool) -> None:
    assert patient(known) is waits


def test_the_nodes_to_begin_with_are_ready_for_their_agents_alive_for_ray_and_drained_by_nobody() -> None:
    nodes = {"d": READY, "c": READY, "b": TrainingNode("draining"), "a": READY, "e": READY}
    assert Gathering(nodes, frozenset("abcdx"), draining=frozenset("c")).usable == ["a", "d"]


@pytest.mark.parametrize(
    ("how", "committed", "seconds", "script", "expected"),
    [
        (FAULT, 11, 1, False, True),
        (FAULT, 10, 1e6, False, False),
        (FAULT, 10, 601, True, True),
        (FAULT, 10, 599, True, False),
        (AttemptOutcome("fault", cause="hang"), 10, 601, True, False),
        (ERROR, 10, 601, True, False),
    ],
)
def test_what_counts_as_progress(
    how: AttemptOutcome, committed: int, seconds: float, script: bool, expected: bool
) -> None:
    """A commit; of a script, whose saves we do not see, a long life that the machines ended."""
    assert progressed(how, 10, committed, seconds, script) is expected


def test_the_trainer_s_own_word_counts_first_then_what_we_saw_then_what_ray_told() -> None:
    asked, seen = Resize(NOW, "drain", frozenset("a"), "a must be left"), AttemptOutcome("fault", "node_lost a")
    told = AttemptOutcome("fault", "communication")

    def why(
        outcome: TrainerOutcome | None,
        seen: AttemptOutcome | None = seen,
        told: AttemptOutcome | None = told,
        asked: Resize | None = asked,
    ) -> AttemptOutcome:
        return ending(outcome, seen, told, asked, "my:train")

    assert why(TrainerOutcome("finished", 40)) == AttemptOutcome("finished", text="step 40")
    assert why(TrainerOutcome("finished")) == AttemptOutcome("finished", text="its script ended")
    assert why(TrainerOutcome("stopped", 20)) == AttemptOutcome("resized", text="a must be left (step 20)")
    assert why(TrainerOutcome("stopped", 20), asked=None) == AttemptOutcome("stopped", text="step 20")
    assert why(None) is seen and why(None, seen=None) is told
    silent = why(None, seen=None, told=None)
    assert silent.kind == silent.cause == "error" and silent.text.startswith(
        "my:train returned without session.finish()"
    )


def test_the_policy_is_pure() -> None:
    """It imports no module that opens files or connections."""
    source = ast.parse(Path(policy.__file__).read_text())
    ours = {
        n.module for n in ast.walk(source) if isinstance(n, ast.ImportFrom) and str(n.module).startswith("raylaunch")
    }
    assert ours == {"raylaunch.config.schema", "raylaunch.training.stop_request", "raylaunch.training.hang_detector"}
