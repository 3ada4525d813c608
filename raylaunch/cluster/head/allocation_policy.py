"""What to do when an allocation ends: facts in, one decision out. Pure: no clock, no files, no Slurm.

    Slurm's notice, SIGTERM, the end of a joiner's job → Facts → decide → Save | Leave | Drain | Resign | End
      → Course: how far the end is, and how the cluster goes on after it

Slurm ends allocations for reasons of its own: time limits, preemption, nodes that fail. What is unfinished then goes on
in another allocation, until `elastic.max_requeues`. What a person ends (scancel, `down`) does not. `ending` gathers the
facts, and does what is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from raylaunch.timing import ALLOCATION_ENDING, ENDING_LIMIT, SAVE_LIMIT

SIGNAL_EARLY = 90.0
"""Slurm may send --signal up to a minute early (sbatch(1)); with more time left than that it is a preemption."""
LEAST = 20.0
LEAST_TO_SAVE = 5.0
JOB_ENDS = "its job was told to end"
_COMES_BACK = {"preempted", "preemption", "node_fail", "node failure", "boot_fail", "requeued", "job requeue"}
"""After which Slurm mostly runs a job again, where it does not say whether it does."""

Way = Literal["requeue", "itself", "successor"]
"""How a cluster goes on in another allocation: the head has its job requeued (or submits a successor where Slurm
refuses); Slurm runs the job again by itself; the head submits a successor, for the job is over."""


class AllocationEvent(Enum):
    """What the head hears of."""

    NOTICE = "notice"
    """The base job's time is nearly up, or it is preempted after a grace (--signal, or what squeue says)."""
    SIGTERM = "SIGTERM"
    """Slurm ends the job that the head's node belongs to."""
    JOINER_ENDS = "a joiner's job ends"
    """Its nodes had SIGTERM, or its time is nearly up."""


@dataclass(frozen=True)
class BatchJob:
    """What Slurm says of the job. `taken`: why Slurm ends it for reasons of its own, "" where it is not known to."""

    state: str
    seconds_left: float | None = None
    preempted: bool = False
    taken: str = ""
    again: bool | None = None
    """Slurm runs it again by itself; None where it does not say."""


@dataclass(frozen=True)
class AllocationFacts:
    """What the head knows when it has to decide."""

    event: AllocationEvent
    fenced: bool = False
    """A newer head leads: what ends is not ours to see to any more."""
    in_base: bool = True
    """The head's node belongs to the base job; else it came with a joiner."""
    others: bool = False
    """Nodes of other jobs than the head's are ready."""
    job: BatchJob | None = None
    """The job that the event is about; None when Slurm does not say."""
    cause: str = ""
    cancelled: bool = False
    """Why it ended, by slurmstepd's own line; or that a person ended it, for sure. Known where `wants_cause`."""
    notice: float = 60.0
    """Seconds before the end at which Slurm's notice comes."""
    longest_save: float = 0.0
    """Seconds of the slowest save of the present run so far."""
    own: bool = False
    """Of JOINER_ENDS: it is the head's own job."""
    why: str = ""
    """Of JOINER_ENDS: what is known."""

    @property
    def wants_job(self) -> bool:
        """Whether the decision depends on `job`, and what belongs to it."""
        leaves = self.event is AllocationEvent.SIGTERM and not self.in_base and self.others
        return not (self.fenced or leaves or self.event is AllocationEvent.JOINER_ENDS)

    @property
    def wants_cause(self) -> bool:
        """Whether the decision depends on `cause`."""
        if self.event is not AllocationEvent.SIGTERM or not self.wants_job:
            return False
        return self.job is None or (self.job.state != "RUNNING" and not self.job.taken)

    @property
    def taken(self) -> str:
        """Why Slurm ended the job; "" where a person did, and where nobody knows."""
        return (self.job.taken if self.job is not None else "") or self.cause

    @property
    def runs_again(self) -> bool:
        """Slurm itself runs the job again. (A joiner is never run again.)"""
        says = self.job.again if self.job is not None else None
        return self.in_base and (self.taken in _COMES_BACK if says is None else says)


@dataclass(frozen=True)
class Save:
    """Train on for `after` seconds, then save within `limit`, end the allocation, and go on in another one."""

    why: str
    limit: float
    after: float = 0.0


@dataclass(frozen=True)
class Leave:
    """The run leaves the head's node; then, or after TERM_LIMIT, this node resigns and another one leads."""

    why: str


@dataclass(frozen=True)
class Drain:
    """The run leaves the job's nodes; the cluster stays."""

    why: str


@dataclass(frozen=True)
class Resign:
    """Be no head any more. `base_lost`: the base job is over, and the joiners go on under another head."""

    why: str
    base_lost: str = ""


@dataclass(frozen=True)
class End:
    """End at once, without saving. `taken`: why Slurm took the allocation, and what is unfinished goes on that way;
    "": nothing goes on, unless that was settled before. `cancelled`: nothing goes on, for a person ended it."""

    taken: str
    way: Way = "successor"
    cancelled: bool = False


Decision = Save | Leave | Drain | Resign | End


def decide(facts: AllocationFacts) -> Decision:
    """The one move that follows from what was heard."""
    if facts.fenced:
        return Resign("a newer incarnation has begun")
    match facts.event:
        case AllocationEvent.NOTICE:
            return _noticed(facts)
        case AllocationEvent.JOINER_ENDS:
            alone = facts.own and not facts.others
            return Save(facts.why, SAVE_LIMIT) if alone else Drain(facts.why)
        case AllocationEvent.SIGTERM:
            return _terminated(facts)


def _noticed(facts: AllocationFacts) -> Save:
    """Train on while there is time: twice the slowest save, and the ending. Of a preemption's grace, nobody knows."""
    job = facts.job
    left = job.seconds_left if job is not None and job.seconds_left is not None else facts.notice
    if job is not None and (job.preempted or left > facts.notice + SIGNAL_EARLY):
        return Save("preempted", _to_save(min(left, facts.notice)))
    needed = budget(facts.longest_save)
    return Save("walltime", _to_save(min(left, needed)), max(0.0, left - needed))


def _terminated(facts: AllocationFacts) -> Decision:
    if not facts.in_base and facts.others:  # the run leaves this node first, then another one leads
        return Leave(JOB_ENDS)
    if facts.job is not None and facts.job.state == "RUNNING":  # the grace before a preemption
        return _noticed(facts) if facts.in_base else Save(JOB_ENDS, SAVE_LIMIT)
    if not facts.taken:
        # Of all else that ends a job, Slurm gives a reason, where it says anything.
        says = facts.job is not None and facts.job.again is not None
        return End("", cancelled=facts.cancelled or says)
    why = facts.taken if facts.in_base else f"the last joiner: {facts.taken}"
    if facts.runs_again:
        return End(why, "itself")
    if facts.others:
        return Resign(f"the base job ends ({why}), and the joiners go on", base_lost=why)
    return End(why)


def budget(longest_save: float) -> float:
    """Seconds before the end at which saving has to begin: twice the slowest save so far, and the ending."""
    return max(LEAST, 2.0 * longest_save) + ALLOCATION_ENDING


def _to_save(seconds: float) -> float:
    return max(LEAST_TO_SAVE, seconds - ENDING_LIMIT)


@dataclass(frozen=True)
class Work:
    """What there is to go on with. `resumes`: how often the cluster went on in another allocation."""

    unfinished: bool
    resumes: int = 0
    max_requeues: int = 0
    slurm: bool = True

    @property
    def goes_on(self) -> bool:
        return self.unfinished and self.slurm and self.resumes < self.max_requeues

    @property
    def used_up(self) -> bool:
        """It would go on, but for the limit."""
        return self.unfinished and self.resumes >= self.max_requeues


@dataclass(frozen=True)
class Course:
    """How far the end of the allocation is. `reason`: why it ends, "" while it does not; `goes_on`: why the cluster goes
    on in another one, "" when it does not. There is one end, so there is one way on."""

    reason: str = ""
    goes_on: str = ""
    way: Way = "requeue"

    @property
    def ending(self) -> bool:
        return bool(self.reason)

    def begin(self, reason: str, work: Work | None = None) -> Course:
        """The end begins, if it has not. With `work`: of this allocation only."""
        if self.ending:
            return self
        return Course(reason, reason if work is not None and work.goes_on else "")

    def end(self, end: End, work: Work) -> Course:
        """There is no time any more. Also when the end had begun: how the cluster goes on is known now."""
        reason = self.reason or f"signal SIGTERM{f' ({end.taken})' if end.taken else ''}"
        if end.cancelled:
            return self.called_off(reason)
        if end.taken and (self.goes_on or (not self.ending and work.goes_on)):
            return Course(reason, end.taken, end.way)
        return replace(self, reason=reason)

    def called_off(self, reason: str) -> Course:
        """A person wants an end, whatever was to come after this allocation."""
        return replace(self, reason=self.reason or reason, goes_on="")

    def finished(self) -> Course:
        """There is nothing left to go on with."""
        return replace(self, goes_on="")
