"""The kinds of events of a cluster's nodes and jobs."""

from __future__ import annotations

from dataclasses import dataclass

from raylaunch.checkpoint.events import Event

# -- nodes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeJoined(Event):
    """A node's agent connected to the head."""

    node: str
    address: str | None


@dataclass(frozen=True)
class NodeStarting(Event):
    """A node starts Ray."""

    node: str


@dataclass(frozen=True)
class NodeReady(Event):
    """Ray runs on a node: training can use it."""

    node: str


@dataclass(frozen=True)
class NodeRestarting(Event):
    """Ray on a node died, or has to connect to a new head. The agent starts it again."""

    node: str
    error: str | None = None


@dataclass(frozen=True)
class NodeEnded(Event):
    """A node left the cluster as planned, not because of a fault."""

    node: str


@dataclass(frozen=True)
class NodeFailed(Event):
    """A node cannot be used."""

    node: str
    error: str | None


@dataclass(frozen=True)
class NodeLost(Event):
    """The head lost the connection to a node, and the node did not return."""

    node: str
    reason: str


@dataclass(frozen=True)
class NodeDraining(Event):
    """Training leaves a node at its next step; then its agent ends."""

    node: str
    reason: str


@dataclass(frozen=True)
class NodeStrike(Event):
    """A strike against a node: it was lost, could not start, or ended an attempt."""

    node: str
    count: int
    """Strikes of the node since the cluster was submitted."""
    reason: str


@dataclass(frozen=True)
class NodeExcluded(Event):
    """A node has `elastic.max_strikes` strikes: training and new jobs avoid it."""

    node: str


@dataclass(frozen=True)
class OomKill(Event):
    """The kernel killed a process of a node for memory (the OOM killer)."""

    node: str
    pid: int | None = None
    """The process that was killed."""
    task: str | None = None
    """Its name. Both are known where the kernel's log can be read."""
    count: int | None = None
    """How many, where only the cgroup's counter can be read."""


@dataclass(frozen=True)
class GpuTrouble(Event):
    """A GPU reported an Xid error, an uncorrected ECC error, or throttling."""

    node: str
    what: str
    """The driver's text."""


# -- the node loop: jobs that keep the number of nodes ---------------------------------------------------


@dataclass(frozen=True)
class NodeDecision(Event):
    """The node loop decided something new. The same decision in a row is written once."""

    decision: str
    """`hold` (nothing to do), `join` (submit a joiner), `amend` (change the excluded nodes of a pending joiner), `release`
    (cancel pending joiners, or let surplus nodes leave), `drain` (stop training on a node), `resume` (submit a successor
    of a lost base job) or `give_up`."""
    reason: str
    setting: str
    n: int | None = None
    """For `join`: number of nodes to request."""
    exclude: tuple[str, ...] | None = None
    """For `join` and `amend`: nodes that the job must avoid."""
    job: str | None = None
    jobs: tuple[str, ...] | None = None
    """For `release`: jobs that are cancelled."""
    nodes: tuple[str, ...] | None = None
    """For `release`: nodes that leave."""
    node: str | None = None


@dataclass(frozen=True)
class JoinerSubmitted(Event):
    """A joiner was submitted: a small job that brings nodes to the cluster."""

    job: str
    nodes: int
    exclude: list[str]
    """Nodes that the job must avoid."""


@dataclass(frozen=True)
class JoinerAdopted(Event):
    """A job of this cluster was found in Slurm, but not in cluster.json: its submitter was killed."""

    job: str


@dataclass(frozen=True)
class JoinerRefused(Event):
    """A joiner could not be submitted. It is tried again later."""

    error: str
    hint: str


@dataclass(frozen=True)
class SlurmUnreachable(Event):
    """Slurm did not respond to a command that submits or cancels a job."""

    error: str


@dataclass(frozen=True)
class LockHeld(Event):
    """Another process holds the lock of the cluster's jobs, so that nothing was submitted."""

    lock: str
    hint: str


# -- the next allocation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseJobLost(Event):
    """The base job is gone."""

    job: str
    why: str


@dataclass(frozen=True)
class Requeued(Event):
    """The base job is requeued."""

    job: str
    why: str


@dataclass(frozen=True)
class RequeueRefused(Event):
    """Slurm refused to requeue the base job. A successor is submitted."""

    job: str
    error: str


@dataclass(frozen=True)
class Successor(Event):
    """A new base job (a successor) was submitted. The cluster continues in it."""

    job: str
    why: str | None = None


@dataclass(frozen=True)
class SuccessorRefused(Event):
    """A successor could not be submitted. The cluster ends."""

    error: str


@dataclass(frozen=True)
class MaxRequeuesReached(Event):
    """The run is not over, but the cluster has used all its `elastic.max_requeues`."""

    count: int
    """Allocations that continued this cluster."""
    setting: str
