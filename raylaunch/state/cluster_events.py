"""The kinds of events in a cluster's events.jsonl, except those of its nodes and jobs (`node_events`)."""

from __future__ import annotations

from dataclasses import dataclass

from raylaunch.checkpoint.events import Event

# -- a cluster, from submission to its end ---------------------------------------------------------------


@dataclass(frozen=True)
class ClusterSubmitted(Event, kind="submitted"):
    """`up` or `submit` submitted the base job. Earlier lines are from earlier clusters of the same name."""

    job: str
    incarnation: int
    nodes: str | int
    """As in `slurm.nodes`."""


@dataclass(frozen=True)
class Election(Event):
    """The nodes elected a new head, because the one before it was lost or left."""

    incarnation: int
    node: str
    why: str


@dataclass(frozen=True)
class HeadStarted(Event):
    """A head started: the first one, or one that was elected."""

    node: str
    address: str
    incarnation: int


@dataclass(frozen=True)
class CouldNotLead(Event):
    """A node that should have become the head could not start as one. Another node leads."""

    node: str
    error: str


@dataclass(frozen=True)
class HeadFenced(Event, kind="fenced"):
    """A head found that a newer head had replaced it, and stopped."""

    node: str
    incarnation: int


@dataclass(frozen=True)
class FileRestored(Event, kind="restored"):
    """The head rewrote a file that a late write of an older head had replaced."""

    file: str


@dataclass(frozen=True)
class TerminationNotice(Event):
    """Slurm announced the end of the allocation. The run saves and stops."""

    why: str
    """`preempted` or `walltime`, or Slurm's reason."""
    seconds_left: float | None
    """Until the end of the allocation."""


@dataclass(frozen=True)
class ClusterEnding(Event, kind="ending"):
    """The end of the cluster, or of this allocation, began."""

    reason: str
    goes_on: bool
    """True: the cluster continues in another allocation."""


@dataclass(frozen=True)
class SaveTimedOut(Event):
    """The run did not stop within the limit. It will resume from its last commit."""

    run: str
    seconds: float
    """The limit."""


@dataclass(frozen=True)
class ClusterEnded(Event, kind="ended"):
    """The cluster has ended: the head's last event."""

    reason: str
    unclean: dict[str, int]
    """Node → number of processes that are left there; -1 if the node did not report its end."""
    lost: list[str]
    """Nodes that were lost before the end."""


@dataclass(frozen=True)
class ClusterDown(Event):
    """`down` has ended the cluster."""

    clean: bool
    """Whether no job and no process is left."""
    notes: list[str]
    """What is left, in words."""


# -- its requests and runs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClusterScaled(Event, kind="scaled"):
    """`scale` changed the number of nodes that the head keeps."""

    nodes: int


@dataclass(frozen=True)
class RequestSetAside(Event, kind="request_refused"):
    """A file in `requests/` was not a valid request. It was renamed to NAME.bad."""

    request: str
    error: str


@dataclass(frozen=True)
class RunStarted(Event):
    """The head started a run's driver."""

    run: str


@dataclass(frozen=True)
class RunEnded(Event):
    """A run has ended, or continues in another allocation."""

    run: str
    state: str
    status: int | None = None
    """Its driver's exit status, negative for a signal; None if the driver could not be started."""
    error: str | None = None


@dataclass(frozen=True)
class DriverLost(Event):
    """A run's driver died. The head starts another one."""

    run: str
    status: int


@dataclass(frozen=True)
class DriverCutShort(Event):
    """The head ended a driver that still exported weights, because another run was queued."""

    run: str
    reason: str


# -- trouble ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WaitingForStorage(Event):
    """Shared storage has failed for half a minute. The head waits for it."""

    error: str


@dataclass(frozen=True)
class InternalError(Event):
    """An unexpected error in the head or the exporter. Please report it; the cluster continues."""

    work: str
    """What failed."""
    error: str


@dataclass(frozen=True)
class ThreadDied(Event):
    """A background thread of a raylaunch process died. Its traceback is in the log of that process."""

    thread: str
    error: str
    node: str | None = None
    rank: int | None = None
