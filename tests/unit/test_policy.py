"""The training policy: stepped by hand, and through generated histories."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raylaunch.config import ElasticConfig
from raylaunch.policy import MAX_BACKOFF, Ending, Facts, Finish, Hold, Start, decide

FAULT = Ending("fault", "lost rank 3", "lost rank 3: SIGKILL", 3)
ERROR = Ending("error", "ValueError: #", "rank 0: ValueError: 7", 0)


def facts(**given: object) -> Facts:
    return Facts(**{"nodes": 4, "workers_per_node": 2, **given})  # type: ignore[arg-type]


def test_starts_with_every_worker_of_every_node() -> None:
    assert decide(facts(), ElasticConfig()) == Start(8, 0.0, "4 nodes are alive", "elastic.backoff=1")


def test_goes_on_smaller_after_a_fault_at_once() -> None:
    decision = decide(facts(nodes=3, last=FAULT, idle_attempts=1, same_error=1), ElasticConfig())
    assert isinstance(decision, Start) and decision.workers == 6 and decision.delay == 0
    assert "lost rank 3" in decision.reason


def test_the_same_error_twice_ends_the_run_and_a_fault_does_not() -> None:
    assert isinstance(decide(facts(last=ERROR, same_error=1), ElasticConfig()), Start)
    verdict = decide(facts(last=ERROR, same_error=2), ElasticConfig())
    assert isinstance(verdict, Finish) and verdict.state == "failed" and "ValueError" in verdict.reason
    assert verdict.setting == "elastic.max_same_error=2"
    assert isinstance(decide(facts(last=FAULT, same_error=50, idle_attempts=50), ElasticConfig()), Start)


def test_holds_below_the_minimum_and_gives_up_in_the_end() -> None:
    elastic = ElasticConfig(min_nodes=3, hold_timeout=60)
    assert isinstance(decide(facts(nodes=2), elastic), Hold)
    assert isinstance(decide(facts(nodes=2, held=61), elastic), Finish)
    assert isinstance(decide(facts(nodes=3, held=61), elastic), Start)


def test_a_finished_run_is_finished_even_when_it_was_asked_to_stop() -> None:
    done = decide(facts(last=Ending("finished"), stop_reason="down"), ElasticConfig())
    assert isinstance(done, Finish) and done.state == "finished"
    stopped = decide(facts(last=Ending("stopped"), stop_reason="down"), ElasticConfig())
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
    last = None if kind is None else Ending(kind, "f", "t")  # type: ignore[arg-type]
    elastic = ElasticConfig(min_nodes=minimum)
    decision = decide(Facts(nodes, per_node, stop, last, same, idle, held), elastic)
    assert decision.reason
    match decision:
        case Start():
            assert nodes >= (minimum or 1)
            assert decision.workers == nodes * per_node
            assert 0 <= decision.delay <= MAX_BACKOFF
            assert stop is None and kind not in {"finished", "stopped"}
        case Hold():
            assert nodes < (minimum or 1) and held <= elastic.hold_timeout
        case Finish():
            assert decision.state != "finished" or kind == "finished"
