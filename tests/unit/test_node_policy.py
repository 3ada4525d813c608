"""The node policy: single decisions, and hundreds of generated histories of a small simulated cluster."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylaunch.cluster.node_loop import policy
from raylaunch.cluster.node_loop.facts import ALIVE, SHORT_LIFE, Base, Joiner, Joiners, Node, NodeLoopFacts
from raylaunch.cluster.node_loop.policy import Amend, Drain, GiveUp, Hold, Join, Release, Resume, decide
from raylaunch.config.schema import ElasticConfig, JoinConfig
from raylaunch.timing import BOOT_LIMIT

ELASTIC = ElasticConfig()


def members(*names: str, state: str = "ready", job: str = "1", age: float = 60.0) -> tuple[Node, ...]:
    return tuple(Node(n, state, job, age, head=n == "a") for n in names)


def base(*nodes: str, state: str = "running", age: float = 600.0, ended: str = "", count: int = 0) -> Base:
    return Base("1", state, count, nodes, age, ended)


FULL = NodeLoopFacts(wanted=3, max_nodes=4, members=members("a", "b", "c"), base=base("a", "b", "c"))
LOST = members("a", "b") + members("c", state="lost", age=90.0)


def waits(job: str, count: int = 1, exclude: tuple[str, ...] = ("a", "b")) -> Joiner:
    return Joiner(job, True, count, exclude=exclude)


def facts(**changes: object) -> NodeLoopFacts:
    return NodeLoopFacts(**{**FULL.__dict__, **changes})  # type: ignore[arg-type]


def test_nothing_to_do() -> None:
    assert decide(FULL, ELASTIC) == [Hold("3 of 3 nodes are alive")]


def test_a_lost_node_is_replaced_once() -> None:
    [join] = decide(facts(members=LOST), ELASTIC)
    assert join == Join(1, ("a", "b"), "2 of 3 nodes are alive, 0 coming", "elastic.replace=true")
    for one in (waits("2"), Joiner("2", pending=False, nodes=("d",))):
        assert isinstance(decide(facts(members=LOST, joiners=(one,)), ELASTIC)[0], Hold)


def test_a_joiner_that_waits_is_told_of_other_nodes_to_keep_off() -> None:
    [amend] = decide(facts(members=LOST, joiners=(waits("2", exclude=("a", "b", "z")),)), ELASTIC)
    assert amend == Amend("2", ("a", "b"), "the nodes to keep off have changed")
    fresh = facts(members=members("a", "b") + members("c", state="lost", age=20.0))
    [join] = decide(fresh, ELASTIC)
    assert isinstance(join, Join) and join.exclude == ("a", "b", "c"), "Slurm may not have noticed yet"


def test_a_node_lost_a_moment_ago_may_come_back_by_itself() -> None:
    young = members("a", "b") + members("c", state="lost", age=1.0)
    assert isinstance(decide(facts(members=young), ELASTIC)[0], Hold)
    assert isinstance(decide(facts(members=young, down=frozenset("c")), ELASTIC)[0], Join)


def test_a_node_that_comes_back_under_a_new_job_is_coming() -> None:
    again = Joiner("2", pending=False, nodes=("c",), age=1.0)
    assert isinstance(decide(facts(members=LOST, joiners=(again,)), ELASTIC)[0], Hold)
    late = Joiner("2", pending=False, nodes=("d",), age=BOOT_LIMIT)
    assert isinstance(decide(facts(members=LOST, joiners=(late,)), ELASTIC)[0], Join)


def test_the_base_boots() -> None:
    young = facts(members=members("a"), base=base("a", "b", "c", age=5.0))
    assert isinstance(decide(young, ELASTIC)[0], Hold)
    broken = facts(members=members("a"), base=base("a", "b", "c", age=5.0), failed=frozenset("c"))
    assert isinstance(decide(broken, ELASTIC)[0], Join)


@pytest.mark.parametrize(
    "held",
    [{"slurm_answers": False}, {"refused": "no sbatch"}, {"failed_joiners": 2, "since_submit": 19.0},
     {"shared": True, "wanted": 4, "joiners": (waits("2"),)},
     {"wanted": 5, "max_nodes": 9, "joiners": (waits("2"), waits("3"))},
     {"base": base(state="pending", count=3)}],
)  # fmt: skip
def test_no_joiner(held: dict[str, object]) -> None:
    assert all(isinstance(d, Hold) for d in decide(facts(members=LOST, **held), ELASTIC))


def test_not_replaced_unless_asked() -> None:
    plain = ElasticConfig(replace=False)
    assert decide(facts(members=LOST), plain) == [Hold("2 of 3 nodes are alive, 0 coming; nothing is replaced")]
    assert isinstance(
        decide(facts(members=LOST), ElasticConfig(replace=False, join=JoinConfig(partition="x")))[0], Join
    )


def test_idle_nodes_are_taken_up_to_the_ceiling() -> None:
    into = ElasticConfig(join=JoinConfig(partition="low"))
    one, other = decide(facts(ceiling=5, max_nodes=5, idle=7), into)
    assert one == other and isinstance(one, Join) and one.n == 1 and "low" in one.setting
    [join] = decide(facts(ceiling=5, max_nodes=5, idle=7, shared=True), into)
    assert isinstance(join, Join) and join.n == 2
    for none in ({"idle": 0}, {"ceiling": 3}, {"joiners": (waits("2", 2, ("a", "b", "c")),)}):
        assert isinstance(decide(facts(**{"ceiling": 5, "max_nodes": 5, "idle": 7, **none}), into)[0], Hold)


def test_too_many() -> None:
    joined = FULL.members + members("d", job="7") + members("e", job="8")
    jobs = (Joiner("7", False, nodes=("d",)), Joiner("8", False, nodes=("e",)), Joiner("9", True))
    [release] = decide(facts(members=joined, joiners=jobs, max_nodes=9), ELASTIC)
    assert isinstance(release, Release) and release.jobs == ("9",) and release.nodes == ("e", "d")
    [release] = decide(facts(members=joined, joiners=jobs, max_nodes=9, wanted=4), ELASTIC)
    assert isinstance(release, Release) and release.jobs == ("9",) and release.nodes == ("e",)
    [release] = decide(facts(members=joined, joiners=jobs, max_nodes=9, wanted=1), ELASTIC)
    assert isinstance(release, Release) and release.nodes == ("e", "d", "c", "b"), "the head stays"
    [release] = decide(facts(wanted=1), ElasticConfig(min_nodes=2))
    assert isinstance(release, Release) and release.nodes == ("c",), "the minimum stays"


def test_a_node_that_slurm_drains_or_that_struck_out_leaves_and_is_replaced() -> None:
    drain, join = decide(facts(draining=frozenset("b")), ELASTIC)
    assert drain == Drain("b", "Slurm drains b") and isinstance(join, Join)
    drain, join = decide(facts(strikes={"b": 3, "c": 2}), ELASTIC)
    assert isinstance(drain, Drain) and drain.node == "b" and drain.setting == "elastic.max_strikes=3"
    assert isinstance(join, Join) and "b" in join.exclude


def test_at_the_minimum_the_replacement_comes_first() -> None:
    least = ElasticConfig(min_nodes=3)
    [join] = decide(facts(draining=frozenset("b")), least)
    assert isinstance(join, Join)
    more = FULL.members + members("d", job="2")
    [drain] = decide(facts(draining=frozenset("b"), members=more, joiners=(Joiner("2", False, nodes=("d",)),)), least)
    assert isinstance(drain, Drain)


def test_giving_up() -> None:
    least = ElasticConfig(min_nodes=3, min_nodes_timeout=60)
    stuck = facts(members=LOST, refused="no sbatch", below_min=61.0)
    [end] = decide(stuck, least)
    assert isinstance(end, GiveUp) and "no sbatch" in end.reason and end.setting == "elastic.min_nodes_timeout=60"
    for hope in ({"watched": True}, {"below_min": 59.0}, {"joiners": (Joiner("2", True),)}, {"slurm_answers": False}):
        assert isinstance(decide(facts(**{**stuck.__dict__, **hope}), least)[0], Hold)


@pytest.mark.parametrize(
    ("ended", "kind"), [("preempted", Resume), ("node_fail", Resume), ("timeout", Resume), ("cancelled", GiveUp)]
)
def test_the_whole_allocation_is_gone(ended: str, kind: type) -> None:
    gone = facts(members=members("a", "b", "c", state="lost"), base=base(state="gone", ended=ended))
    assert isinstance(decide(gone, ELASTIC)[0], kind)
    assert isinstance(
        decide(facts(**{**gone.__dict__, "refused": "no"}), ELASTIC)[0], GiveUp if kind is GiveUp else Hold
    )
    assert isinstance(decide(facts(**{**gone.__dict__, "joiners": (Joiner("2", True, 3),)}), ELASTIC)[0], Hold)
    assert isinstance(decide(gone, ElasticConfig(max_requeues=0))[0], GiveUp)


# --- histories ----------------------------------------------------------------------------------


@dataclass
class World:
    """A cluster of ten machines under a Slurm, and the head's table; one turn is two seconds."""

    elastic: ElasticConfig
    wanted: int
    max_nodes: int
    ceiling: int = 0
    clock: float = 0.0
    machines: dict[str, str] = field(default_factory=lambda: {f"n{i}": "idle" for i in range(10)})
    table: dict[str, Node] = field(default_factory=dict)
    jobs: dict[str, Joiner] = field(default_factory=dict)
    base: set[str] = field(default_factory=set)
    since: dict[str, float] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)
    answers: bool = True
    refused: str = ""
    shared: bool = False
    busy: bool = False
    """Slurm starts nothing."""
    submitted: float = -1e9
    below: float | None = None
    number: int = 1

    def __post_init__(self) -> None:
        self.base = {f"n{i}" for i in range(self.wanted)}
        for node in self.base:
            self._up(node, "1")

    def _up(self, node: str, job: str) -> None:
        self.machines[node] = "held"
        self._set(node, "ready", job)

    def _set(self, node: str, state: str, job: str | None = None) -> None:
        old = self.table.get(node)
        self.table[node] = Node(node, state, job if job is not None else old.job if old else "")
        self.since[node] = self.clock

    def alive(self) -> list[str]:
        return [n for n, m in self.table.items() if m.state in ALIVE]

    def facts(self) -> NodeLoopFacts:
        alive = sorted(self.alive())
        rows = tuple(
            Node(m.name, m.state, m.job, self.clock - self.since[m.name], bool(alive) and m.name == alive[0])
            for m in self.table.values()
        )
        if len(alive) >= (self.elastic.min_nodes or 1):
            self.below = None
        elif self.below is None:
            self.below = self.clock
        return NodeLoopFacts(
            wanted=self.wanted, max_nodes=self.max_nodes, ceiling=self.ceiling, members=rows,
            joiners=tuple(self.jobs.values()),
            base=Base("1", "running" if self.base else "gone", 0, tuple(sorted(self.base)), 600 + self.clock, "node_fail"),
            strikes=dict(self.strikes), slurm_answers=self.answers, refused=self.refused, shared=self.shared,
            draining=frozenset(n for n, s in self.machines.items() if s == "drain"),
            down=frozenset(n for n, s in self.machines.items() if s == "down"),
            idle=sum(s == "idle" for s in self.machines.values()),
            since_submit=self.clock - self.submitted,
            below_min=self.clock - self.below if self.below is not None else 0.0,
        )  # fmt: skip

    def fault(self, what: str, index: int) -> None:
        alive = sorted(self.alive())
        node = alive[index % len(alive)] if alive else ""
        match what:
            case "kill" if node:  # the machine dies; Slurm notices later
                self._set(node, "lost")
                self.machines[node] = "dead"
            case "strike" if node:
                self.strikes[node] = self.strikes.get(node, 0) + 1
            case "hiccup" if node:
                self._set(node, "lost")
            case "drain" if node:
                self.machines[node] = "drain"
            case "mute":
                self.answers = False
            case "refuse":
                self.refused = "no sbatch"
            case "busy":
                self.busy = True
            case "preempt" if self.jobs:
                self._end(sorted(self.jobs)[index % len(self.jobs)])
            case "scale":
                self.wanted = max(self.elastic.min_nodes or 1, 1 + index % self.max_nodes)
                self.ceiling = 0
            case "calm":
                self.calm()

    def calm(self) -> None:
        self.answers, self.refused, self.busy = True, "", False

    def _end(self, job: str) -> None:
        for node in self.jobs.pop(job).nodes:
            if self.machines[node] == "held":
                self.machines[node] = "idle"
            if node in self.table and self.table[node].state not in {"ended"}:
                self._set(node, "lost")

    def turn(self) -> list[policy.Decision]:
        """Decide, check that the decision rests on facts, and do it; then the world goes on."""
        now = self.facts()
        decisions = decide(now, self.elastic)
        assert decisions and all(d.reason for d in decisions)
        if not self.answers:
            assert all(isinstance(d, Hold) for d in decisions), "no decision without a fact"
        minimum = self.elastic.min_nodes or 1
        before = len(self.alive())
        for decision in decisions:
            self._do(decision, now)
        after = len(self.alive())
        assert after >= min(before, minimum), "a decision never goes below the minimum"
        self._go_on()
        return decisions

    def _do(self, decision: policy.Decision, now: NodeLoopFacts) -> None:
        match decision:
            case Join():
                assert not self.refused
                assert sum(j.pending for j in self.jobs.values()) < self.elastic.join.max_pending
                struck = policy.excluded(self.strikes, self.elastic)
                assert struck <= set(decision.exclude) and set(self.alive()) <= set(decision.exclude)
                asked = sum(j.count for j in self.jobs.values() if j.pending)
                assert len(set(self.alive()) - struck - now.draining) + asked + decision.n <= self.max_nodes
                self.number += 1
                self.jobs[str(self.number)] = Joiner(str(self.number), True, decision.n, exclude=decision.exclude)
                self.submitted = self.clock
            case Amend():
                self.jobs[decision.job] = replace(self.jobs[decision.job], exclude=decision.exclude)
            case Release():
                for job in decision.jobs:
                    assert self.jobs[job].pending
                    del self.jobs[job]
                for node in decision.nodes:
                    self._leave(node)
            case Drain():
                self._leave(decision.node)
            case Resume():
                assert not self.alive() and not self.base and not self.jobs
            case GiveUp():
                assert len(self.alive()) < (self.elastic.min_nodes or 1) or not self.base

    def _leave(self, node: str) -> None:
        assert self.table[node].state in ALIVE
        self._set(node, "ended")
        for job in [j for j in self.jobs.values() if node in j.nodes]:
            if all(self.table.get(n, Node(n, "ended")).state == "ended" for n in job.nodes):
                self._end(job.job)

    def _go_on(self) -> None:
        self.clock += 2.0
        for node, state in list(self.machines.items()):
            member = self.table.get(node)
            if state == "dead" and self.clock - self.since[node] > 18:
                self.machines[node] = "down"
                self.base.discard(node)
                for job in [j for j in self.jobs.values() if node in j.nodes]:
                    self._end(job.job)
            elif state == "down" and self.clock - self.since[node] > 60:
                self.machines[node] = "idle"
            elif state == "held" and member is not None and member.state == "lost" and self._holds(node, member.job):
                self._set(node, "ready")  # its keeper
        if self.busy or not self.answers:
            return
        for job in list(self.jobs.values()):
            free = [n for n, s in self.machines.items() if s == "idle" and n not in job.exclude]
            if job.pending and free:
                nodes = tuple(free[: job.count])
                self.jobs[job.job] = Joiner(job.job, False, len(nodes), nodes)
                for node in nodes:
                    self._up(node, job.job)

    def _holds(self, node: str, job: str) -> bool:
        return node in self.base if job == "1" else job in self.jobs


FAULTS = st.tuples(
    st.sampled_from(
        ["kill", "kill", "hiccup", "strike", "drain", "preempt", "mute", "refuse", "busy", "scale", "calm", "calm"]
    ),
    st.integers(0, 9),
    st.integers(1, 15),
)


@settings(max_examples=300, deadline=None)
@given(
    nodes=st.integers(1, 5), more=st.integers(0, 3), minimum=st.integers(1, 3), pending=st.integers(1, 3),
    taking=st.booleans(), shared=st.booleans(), history=st.lists(FAULTS, max_size=12),
)  # fmt: skip
def test_whatever_happens(
    nodes: int, more: int, minimum: int, pending: int, taking: bool, shared: bool, history: list[tuple[str, int, int]]
) -> None:
    """The minimum stands, the maximum too, and once the faults end the wanted number is there, to stay."""
    join = JoinConfig(partition="low" if taking else None, max_pending=pending)
    elastic = ElasticConfig(min_nodes=min(minimum, nodes), join=join, min_nodes_timeout=100_000)
    world = World(elastic, wanted=nodes, max_nodes=nodes + more, ceiling=nodes + more if taking else 0, shared=shared)
    for what, index, turns in history:
        world.fault(what, index)
        for _ in range(turns):
            world.turn()
    world.calm()
    if not world.alive() and not world.base and not world.jobs:
        assert isinstance(world.turn()[0], Resume)
        return
    # Ten machines, some struck out or drained for good: as many as can be had.
    bad = policy.excluded(world.strikes, elastic) | {n for n, s in world.machines.items() if s == "drain"}
    target = min(max(world.wanted, world.ceiling), 10 - len(bad))
    for _ in range(120):
        if isinstance(world.turn()[0], Resume):  # the last job that waited was for too many nodes: a successor follows
            return
    staying = set(world.alive()) - bad
    # A node that was let go is held by its job, as long as that has others: it cannot be had again.
    held = world.base | {n for j in world.jobs.values() for n in j.nodes}
    let_go = {n for n in held if world.table[n].state == "ended"} - bad
    assert len(staying) >= min(target, 10 - len(bad) - len(let_go)), world
    assert len(staying) <= max(world.wanted, world.ceiling), world
    quiet = [world.turn() for _ in range(20)]
    assert all(isinstance(d, Hold) for turn in quiet for d in turn), "no flapping"


def joiner(job: str, *nodes: str) -> Joiner:
    return Joiner(job, not nodes, max(1, len(nodes)), nodes)


def test_joiners_that_bring_nothing_are_counted_in_a_row() -> None:
    known = Joiners().with_one("1").with_one("2")
    assert known.after([joiner("1"), joiner("2")], [], 0.0).failed == 0
    known = known.after([joiner("2", "n2")], [], 1.0)
    assert known.failed == 1 and set(known.jobs) == {"2"}
    assert known.after([], [], 2.0).failed == 2
    came = known.after([joiner("2", "n2")], [Node("n2", "ready", "2")], 2.0)
    assert came.failed == 0 and came.after([], [], 3.0).failed == 1  # but not for long
    assert came.after([], [], 2.0 + SHORT_LIFE).failed == 0
    assert known.after([joiner("2", "n2")], [Node("n2", "ready", "7")], 2.0).failed == 1  # another job's agent


@pytest.mark.parametrize("which", [{"jobs": ["1"]}, {"nodes": ["n1"]}])
def test_a_joiner_that_was_let_go_has_not_failed(which: dict[str, list[str]]) -> None:
    known = Joiners().with_one("1").after([joiner("1", "n1")], [], 0.0)
    assert known.after([], [], 1.0).failed == 1
    assert known.let_go(**which).after([], [], 1.0).failed == 0
