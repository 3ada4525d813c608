"""What to do when an allocation ends: single cases, and whole histories of a cluster over its allocations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylaunch.cluster.head import allocation_policy
from raylaunch.cluster.head.allocation_policy import (
    JOB_ENDS,
    AllocationEvent,
    AllocationFacts,
    BatchJob,
    Course,
    Decision,
    Drain,
    End,
    Leave,
    Resign,
    Save,
    Work,
    decide,
)
from raylaunch.scheduler.slurm.allocation import Continuation

RUNNING, ENDING = BatchJob("RUNNING", 60.0), BatchJob("COMPLETING")
PREEMPTED = BatchJob("COMPLETING", preempted=True, taken="preempted", again=False)
REQUEUED = replace(PREEMPTED, again=True)


def signal(job: BatchJob | None = ENDING, **more: object) -> AllocationFacts:
    return replace(AllocationFacts(AllocationEvent.SIGTERM, job=job), **more)  # type: ignore[arg-type]


def notice(left: float | None, notice: float = 60.0, **more: object) -> AllocationFacts:
    return replace(AllocationFacts(AllocationEvent.NOTICE, job=BatchJob("RUNNING", left), notice=notice), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        # The notice: train on while there is time for twice the slowest save, and the ending.
        (notice(60.0), Save("walltime", limit=25.0, after=25.0)),
        (notice(60.0, longest_save=20.0), Save("walltime", limit=45.0, after=5.0)),
        (notice(60.0, longest_save=300.0), Save("walltime", limit=50.0)),
        (notice(8.0), Save("walltime", limit=5.0)),
        (notice(None), Save("walltime", limit=25.0, after=25.0)),  # a job without a limit: as long as the notice says
        (AllocationFacts(AllocationEvent.NOTICE), Save("walltime", limit=25.0, after=25.0)),  # Slurm is silent
        # With much more time left it is a preemption, whose grace nobody knows: save at once.
        (notice(3600.0), Save("preempted", limit=50.0)),
        (notice(30.0, job=BatchJob("RUNNING", 30.0, preempted=True)), Save("preempted", limit=20.0)),
        # SIGTERM while the job runs: the grace before a preemption.
        (signal(BatchJob("RUNNING", 3600.0)), Save("preempted", limit=50.0)),
        # The job is over. What Slurm took goes on, what a person ended does not.
        (signal(), End("")),
        (signal(None), End("")),
        (signal(PREEMPTED), End("preempted")),
        (signal(REQUEUED), End("preempted", "itself")),
        (signal(cause="time limit"), End("time limit")),
        (signal(None, cause="node failure"), End("node failure", "itself")),  # Slurm is silent: mostly it does
        (signal(BatchJob("COMPLETING", taken="node_fail")), End("node_fail", "itself")),
        (signal(BatchJob("COMPLETING", taken="node_fail", again=False)), End("node_fail")),  # --no-requeue
        (signal(cancelled=True), End("", cancelled=True)),
        (signal(BatchJob("COMPLETING", again=False)), End("", cancelled=True)),  # Slurm knows of no other reason
        # Where joiners can go on, they do.
        (signal(BatchJob("COMPLETING", taken="JobLaunchFailure"), others=True),
         Resign("the base job ends (JobLaunchFailure), and the joiners go on", base_lost="JobLaunchFailure")),
        (signal(REQUEUED, others=True), End("preempted", "itself")),
        (signal(others=True), End("")),  # a person's scancel of the base job ends the cluster
        # A head that came with a joiner.
        (signal(in_base=False, others=True), Leave(JOB_ENDS)),
        (signal(RUNNING, in_base=False, others=True), Leave(JOB_ENDS)),
        (signal(RUNNING, in_base=False), Save(JOB_ENDS, limit=60.0)),
        (signal(PREEMPTED, in_base=False), End("the last joiner: preempted")),
        (signal(in_base=False), End("")),
        (signal(REQUEUED, in_base=False), End("the last joiner: preempted")),  # a joiner is not run again
        # The end of a joiner's job.
        (AllocationFacts(AllocationEvent.JOINER_ENDS, own=True, why="time"), Save("time", limit=60.0)),
        (AllocationFacts(AllocationEvent.JOINER_ENDS, own=True, others=True, why="time"), Drain("time")),
        (AllocationFacts(AllocationEvent.JOINER_ENDS, own=False, why="time"), Drain("time")),
        # Not ours to see to any more.
        (signal(PREEMPTED, fenced=True), Resign("a newer incarnation has begun")),
        (notice(60.0, fenced=True), Resign("a newer incarnation has begun")),
    ],
)  # fmt: skip
def test_decisions(facts: AllocationFacts, expected: Decision) -> None:
    assert decide(facts) == expected


@pytest.mark.parametrize(
    ("facts", "job", "cause"),
    [
        (notice(60.0), True, False),
        (AllocationFacts(AllocationEvent.JOINER_ENDS), False, False),
        (signal(None), True, True),
        (signal(RUNNING), True, False),
        (signal(PREEMPTED), True, False),
        (signal(in_base=False, others=True), False, False),  # it leaves, whatever it is
        (signal(fenced=True), False, False),
    ],
)
def test_what_is_asked(facts: AllocationFacts, job: bool, cause: bool) -> None:
    """Each question costs seconds at the end of an allocation."""
    assert (facts.wants_job, facts.wants_cause) == (job, cause)


@given(
    event=st.sampled_from(AllocationEvent), fenced=st.booleans(), in_base=st.booleans(), others=st.booleans(), own=st.booleans(),
    job=st.sampled_from([None, RUNNING, ENDING, PREEMPTED, REQUEUED]), cause=st.sampled_from(["", "time limit"]),
    cancelled=st.booleans(),
)  # fmt: skip
def test_what_is_not_asked_for_decides_nothing(
    event: AllocationEvent,
    fenced: bool,
    in_base: bool,
    others: bool,
    own: bool,
    job: BatchJob | None,
    cause: str,
    cancelled: bool,
) -> None:
    word = {"cause": "", "cancelled": True} if cancelled else {"cause": cause, "cancelled": False}
    facts = AllocationFacts(event, fenced, in_base, others, own=own)
    known = replace(facts, job=job) if facts.wants_job else facts
    known = replace(known, **word) if known.wants_cause else known  # type: ignore[arg-type]
    full = replace(facts, job=job)
    if full.job is None or not full.job.taken:
        full = replace(full, **word)  # type: ignore[arg-type]
    assert decide(known) == decide(full)


def test_every_way_can_be_gone() -> None:
    for way in ("requeue", "itself", "successor"):
        assert Continuation(way)


def test_the_limit_of_requeues() -> None:
    work = Work(True, resumes=2, max_requeues=3)
    assert work.goes_on and not work.used_up
    assert not replace(work, resumes=3).goes_on and replace(work, resumes=3).used_up
    assert not replace(work, unfinished=False).goes_on and not replace(work, slurm=False).goes_on


# -- histories -------------------------------------------------------------------------------------

ENDS = {  # what Slurm says of a job that it ended for reasons of its own: (look, slurmstepd's word)
    "preempted": (REQUEUED, ""),
    "cancelled by preemption": (PREEMPTED, ""),
    "time limit": (ENDING, "time limit"),
    "batch host back": (BatchJob("COMPLETING", taken="JobLaunchFailure", again=False), ""),
    "batch host new": (BatchJob("COMPLETING", taken="node_fail", again=True), ""),
    "node failed": (None, "node failure"),
}


@dataclass
class World:
    """A cluster over its allocations. One thing is heard after the other; an allocation that ends is followed by what
    the course says, done once."""

    max_requeues: int
    in_base: bool = True
    others: bool = False
    unfinished: bool = True
    resumes: int = 0
    course: Course = field(default_factory=Course)
    over: str = ""
    person: bool = False
    """A person has ended the cluster, or its job."""
    submitted: list[str] = field(default_factory=list)

    def work(self) -> Work:
        return Work(self.unfinished, self.resumes, self.max_requeues)

    def hear(self, what: str, left: float) -> None:
        """Something happens to the allocation."""
        before = self.course
        facts = AllocationFacts(AllocationEvent.SIGTERM, in_base=self.in_base, others=self.others)
        match what:
            case "time is nearly up":
                self.do(
                    replace(facts, event=AllocationEvent.NOTICE, job=BatchJob("RUNNING", left), longest_save=left / 3)
                )
            case "grace":
                self.do(replace(facts, job=BatchJob("RUNNING", 3600.0)))
            case "scancel":
                # while the end is under way, everybody leaves
                others = self.others and not before.ending
                decision = self.do(replace(facts, job=ENDING, cancelled=True, others=others))
                self.person = self.person or isinstance(decision, End)
                assert isinstance(decision, Leave) or (isinstance(decision, End) and not self.course.goes_on)
            case "down":
                self.course = before.called_off("down") if before.ending else before.begin("down")
                self.person = True
            case "finished":
                self.unfinished = False
                if before.ending:
                    self.course = before.finished()
            case "a joiner ends":
                self.do(replace(facts, event=AllocationEvent.JOINER_ENDS, own=not self.in_base, why="time"))
            case "fenced":
                assert isinstance(decide(replace(facts, fenced=True)), Resign)
            case _:
                job, cause = ENDS[what]
                self.do(replace(facts, job=job, cause=cause, others=self.others and not before.ending))
        assert not before.ending or self.course.reason == before.reason, "an allocation ends once"

    def do(self, facts: AllocationFacts) -> Decision:
        """Decide, check that the decision rests on facts, and do it."""
        decision = decide(facts)
        before, work = self.course, self.work()
        match decision:
            case Save():
                assert facts.event is not AllocationEvent.SIGTERM or (
                    facts.job is not None and facts.job.state == "RUNNING"
                )
                left = facts.job.seconds_left if facts.job is not None else None
                enough = allocation_policy.LEAST_TO_SAVE + allocation_policy.ENDING_LIMIT
                if left is not None:
                    assert decision.after + decision.limit + allocation_policy.ENDING_LIMIT <= max(left, enough), (
                        "no time"
                    )
                self.course = self.course.begin(decision.why, work)
            case End():
                assert (decision.way == "itself") == (facts.runs_again and bool(facts.taken))
                self.course = self.course.end(decision, work)
            case Leave() | Drain():
                assert facts.others or not facts.own
                return decision
            case Resign():
                assert facts.others and decision.base_lost
                self.in_base, self.others = False, False  # a joiner leads, and is all that is left
                return decision
        if not before.ending:
            assert bool(self.course.goes_on) == (work.goes_on and not isinstance(decision, End)) or (
                isinstance(decision, End) and bool(self.course.goes_on) == (bool(decision.taken) and work.goes_on)
            ), "what is unfinished goes on, within the limit"
        return decision

    def end(self) -> None:
        """The allocation is over, if its end had begun; the next one begins, if there is one."""
        if not self.course.ending or self.over:
            return
        if self.course.goes_on:
            assert not self.person, "what a person ended stays ended"
            assert self.unfinished and self.resumes < self.max_requeues
            self.submitted.append(self.course.way)
            self.resumes += 1
            self.course, self.in_base = Course(), True
        else:
            self.over = self.course.reason
            assert self.person or not self.unfinished or self.resumes >= self.max_requeues or self.course.goes_on


THINGS = st.sampled_from(
    ["time is nearly up", "grace", "scancel", "down", "finished", "a joiner ends", "fenced", "end", "end", *ENDS]
)


@settings(max_examples=500, deadline=None)
@given(
    limit=st.integers(0, 3),
    history=st.lists(st.tuples(THINGS, st.floats(1.0, 120.0), st.booleans()), max_size=20),
)
def test_whatever_happens(limit: int, history: list[tuple[str, float, bool]]) -> None:
    """What a person ends stays ended; what Slurm ends goes on once, while something is unfinished and the limit of
    requeues is not reached; nothing is saved without time."""
    world = World(limit)
    for what, left, others in history:
        if world.over:
            break
        world.others = others
        if what == "end":
            world.end()
        else:
            world.hear(what, left)
    world.end()
    assert len(world.submitted) == world.resumes <= limit


def test_what_slurm_says_last_decides_the_way() -> None:
    """The save before the wall time is under way when the job is taken: one way on, not two."""
    course = Course().begin("walltime", Work(True, 0, 3))
    assert (course.goes_on, course.way) == ("walltime", "requeue")
    course = course.end(End("preempted", "itself"), Work(False))
    assert (course.reason, course.goes_on, course.way) == ("walltime", "preempted", "itself")


def test_down_is_obeyed_when_the_allocation_ends_already() -> None:
    course = Course().begin("walltime", Work(True, 0, 3)).called_off("down")
    assert course.ending and not course.goes_on
    assert not course.end(End("timeout"), Work(True, 0, 3)).goes_on
