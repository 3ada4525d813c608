"""What the node loop knows: nodes, joiners, the base job. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

SHORT_LIFE = 60.0
"""Seconds: a joiner that ended sooner after it was ready is not followed by another at once."""
ALIVE = frozenset({"starting", "ready", "restarting"})


@dataclass(frozen=True)
class Node:
    """A node as the head knows it. `age`: seconds in this state; `job`: the job that its agent belongs to."""

    name: str
    state: str
    job: str = ""
    age: float = 0.0
    head: bool = False


@dataclass(frozen=True)
class Joiner:
    """A joiner job that has not ended. `count`: nodes held, or asked for while it is pending."""

    job: str
    pending: bool
    count: int = 1
    nodes: tuple[str, ...] = ()
    age: float = 0.0
    """Seconds since it started, or since it was submitted while it is pending."""
    exclude: tuple[str, ...] = ()
    """Nodes that it must not start on, while it is pending."""
    blocked: str = ""
    """Why it will not start by waiting."""


@dataclass(frozen=True)
class Base:
    """The base job. `ended`: how, for one that is gone: preempted, timeout, node_fail, cancelled, failed, …"""

    job: str = ""
    state: str = "running"
    """running, pending (requeued, or a successor), ending, or gone."""
    count: int = 0
    """Nodes asked for, while it is pending."""
    nodes: tuple[str, ...] = ()
    age: float = 0.0
    ended: str = ""


@dataclass(frozen=True)
class NodeLoopFacts:
    """What the node loop knows when it has to decide."""

    wanted: int
    """As many nodes as the cluster is to have: missing ones are replaced."""
    max_nodes: int
    ceiling: int = 0
    """Idle nodes are taken up to this many; 0: up to `wanted`."""
    members: tuple[Node, ...] = ()
    joiners: tuple[Joiner, ...] = ()
    """Oldest first."""
    base: Base = field(default_factory=Base)
    strikes: Mapping[str, int] = field(default_factory=dict)
    draining: frozenset[str] = frozenset()
    """Nodes that Slurm drains."""
    down: frozenset[str] = frozenset()
    """Nodes that Slurm holds for dead."""
    failed: frozenset[str] = frozenset()
    """Nodes whose agent said that it cannot start."""
    barred: frozenset[str] = frozenset()
    """Nodes that the configuration excludes, for every job."""
    idle: int = 0
    """Idle nodes of elastic.join.partition that are not ours already."""
    shared: bool = False
    """Jobs share nodes, so that two joiners that wait could land on one: only one waits at a time."""
    refused: str = ""
    """Why this place cannot submit jobs; "": it can."""
    watched: bool = False
    """Somebody else submits in our place."""
    failed_joiners: int = 0
    """Joiners in a row that brought no node, or lost it soon."""
    since_submit: float = 1e9
    """Seconds since the last submission."""
    below_min: float = 0.0
    """Seconds since fewer than the minimum of nodes were alive."""
    resumes: int = 0
    """How often the base job was requeued or succeeded."""
    slurm_answers: bool = True


@dataclass(frozen=True)
class JoinerRecord:
    """What is remembered of a joiner. `ready`: when a node of it was there first; `wanted`: nobody let it go."""

    nodes: tuple[str, ...] = ()
    ready: float | None = None
    wanted: bool = True

    def seen(self, joiner: Joiner, ready: Set[tuple[str, str]], now: float) -> JoinerRecord:
        """It lives. `ready`: (node, job) of those that are; of an agent whose job is not known, any."""
        came = any({(node, joiner.job), (node, "")} & ready for node in joiner.nodes)
        return replace(self, nodes=joiner.nodes or self.nodes, ready=now if self.ready is None and came else self.ready)


@dataclass(frozen=True)
class Joiners:
    """The joiners that are remembered, and how many in a row brought nothing: each that ends without a node that was
    ready. One that ended within SHORT_LIFE of it is not followed by another at once either."""

    jobs: Mapping[str, JoinerRecord] = field(default_factory=dict)
    failed: int = 0

    def with_one(self, job: str) -> Joiners:
        """It was submitted, or found."""
        return replace(self, jobs={job: JoinerRecord()} | dict(self.jobs))

    def let_go(self, jobs: Collection[str] = (), nodes: Collection[str] = ()) -> Joiners:
        """These end because we want them to: no failures."""
        known = {job: JoinerRecord() for job in jobs} | dict(self.jobs)

        def goes(job: str) -> bool:
            return job in jobs or not set(known[job].nodes).isdisjoint(nodes)

        return replace(
            self, jobs={job: replace(past, wanted=False) if goes(job) else past for job, past in known.items()}
        )

    def after(self, living: Sequence[Joiner], members: Sequence[Node], now: float) -> Joiners:
        """One look at the jobs later."""
        ready = {(m.name, m.job) for m in members if m.state == "ready"}
        jobs = {j.job: self.jobs.get(j.job, JoinerRecord()).seen(j, ready, now) for j in living}
        came = any(past.ready == now for past in jobs.values())
        ended = [past for job, past in self.jobs.items() if job not in jobs and past.wanted]
        failed = (0 if came else self.failed) + sum(past.ready is None for past in ended)
        if any(past.ready is not None and now - past.ready < SHORT_LIFE for past in ended):
            failed = max(1, failed)
        return Joiners(jobs, failed)
