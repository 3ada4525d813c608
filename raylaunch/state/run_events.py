"""The kinds of events in a run's events.jsonl, except those of its checkpoints (`checkpoint/events`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raylaunch.checkpoint.events import Event

# -- a run and its attempts, by the driver ---------------------------------------------------------------


@dataclass(frozen=True)
class RunQueued(Event, kind="queued"):
    """The run was submitted to a cluster."""

    cluster: str
    continued: bool
    """True: a run of this name existed, and resumes."""


@dataclass(frozen=True)
class GlobalBatchSize(Event):
    """The first attempt fixed the global batch size for the whole run."""

    samples: int
    workers: int


@dataclass(frozen=True)
class RunDecision(Event, kind="decision"):
    """The training loop decided to start an attempt, to change its size, to hold, or to finish."""

    decision: str
    """`start`, `resize`, `withdraw` (cancel a requested resize), `hold` (wait for nodes) or `finish`."""
    reason: str
    setting: str
    workers: int | None = None
    """For `start`."""
    delay: float | None = None
    """For `start`: seconds to wait first."""
    state: str | None = None
    """For `finish`: `finished`, `failed`, `stopped` or `paused`."""


@dataclass(frozen=True)
class AttemptStarted(Event):
    """An attempt started: one group of workers of one size."""

    workers: int
    nodes: int
    on: list[str]
    """Names of the nodes, in order of their ranks."""
    from_step: int
    """The step of the checkpoint that it loads; 0: from the beginning."""
    run_incarnation: int
    """Orders the drivers of this run, over all heads and clusters that it had."""


@dataclass(frozen=True)
class WorkersConnected(Event):
    """All workers of the attempt have joined the process group."""

    workers: int


@dataclass(frozen=True)
class ResizeRequested(Event):
    """The driver asked the workers to save and to end the attempt, so that the next one has another size."""

    why: str
    when: str
    """`commit`: after the next regular save. `now`: save at this step."""
    nodes: list[str]
    """Names of the nodes that cause it."""


@dataclass(frozen=True)
class AttemptFault(Event, kind="fault"):
    """Something ended the attempt: a node or worker was lost, a rank hangs, or the trainer raised."""

    cause: str
    node: str | None
    rank: int | None
    step: int | None
    reason: str


@dataclass(frozen=True)
class RankHung(Event, kind="hang"):
    """A rank made no progress for longer than its limit. Its stack was written to a file."""

    rank: int
    ranks: list[int]
    """All ranks that hang (at most 64)."""
    node: str | None
    step: int
    phase: str
    seconds: float
    """Without progress."""
    stack: str
    """The file with the stack, or with the rank's log."""
    line: str
    """Where the rank stands."""
    reason: str
    setting: str


@dataclass(frozen=True)
class AttemptAborted(Event):
    """The remaining workers of an attempt have ended."""

    seconds: float
    left: list[int] | None = None
    """Ranks that did not end in time."""


@dataclass(frozen=True)
class AttemptEnded(Event):
    """An attempt has ended, for whatever reason."""

    how: str
    """`finished`, `stopped`, `resized`, `fault` or `error`."""
    error: str
    cause: str
    rank: int | None
    node: str | None
    step: int
    """The last step that is known."""
    committed: int
    """The last step that was committed."""


@dataclass(frozen=True)
class WatchFailed(Event):
    """The driver could not check an attempt. It tries again; until that works, it does not detect faults of the attempt."""

    error: str


@dataclass(frozen=True)
class RunFinished(Event, kind="finished"):
    """The run has finished all its steps."""

    reason: str


@dataclass(frozen=True)
class RunFailed(Event, kind="failed"):
    """The run has failed."""

    reason: str


@dataclass(frozen=True)
class RunStopped(Event, kind="stopped"):
    """The run was stopped, after it saved a checkpoint."""

    reason: str


@dataclass(frozen=True)
class RunPaused(Event, kind="paused"):
    """The run saved a checkpoint, and continues in another allocation."""

    reason: str


# -- the weights of a finished run -----------------------------------------------------------------------


@dataclass(frozen=True)
class Exporting(Event):
    """The export of the weights started (`checkpoint.save_consolidated`)."""

    to: str


@dataclass(frozen=True)
class Exported(Event):
    """The weights are exported."""

    to: str


@dataclass(frozen=True)
class ExportFailed(Event):
    """The weights could not be exported."""

    reason: str
    log: str
    hint: str


# -- the workers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelBuilt(Event):
    """The model is built, sharded and on its devices."""

    parameters: int
    """Of the whole model."""
    seconds: dict[str, float]
    """Seconds by phase: `data`, `model`."""


@dataclass(frozen=True)
class FirstStep(Event):
    """The first step of the attempt is done."""

    step: int


@dataclass(frozen=True)
class Nonfinite(Event):
    """The loss or the gradient norm is NaN or infinite."""

    step: int
    what: str
    """`loss` or `gradient`."""
    action: str
    """As in `optimizer.on_nonfinite`."""
    loss: str
    """As text: JSON has no NaN."""
    grad_norm: str
    """As text."""


@dataclass(frozen=True)
class Profiled(Event):
    """A profile was written."""

    first: int
    """The first step in it."""
    last: int
    """The last step in it."""
    into: str


# -- beside the driver -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlertSent(Event, kind="alert"):
    """An alert was delivered, or was given up, at every destination."""

    alert: str
    """Its kind, as in `alerts.kinds`."""
    at: float
    """Unix time of the event that caused it."""
    text: str
    id: str
    """Its number in this run."""
    count: int
    """Number of merged alerts of this kind, this one included."""
    sinks: dict[str, dict[str, Any]]
    """Destination → `outcome`, number of `tries`, and the `seconds` that they took."""


@dataclass(frozen=True)
class TrackingFailed(Event):
    """A tracker refused metrics. They are sent again later."""

    tracker: str
    error: str


@dataclass(frozen=True)
class FaultInjected(Event):
    """`chaos` injects a fault into this run."""

    fault: str
    """Its kind, as in `raylaunch chaos --help`."""
    node: str | None
    rank: int | None
    seq: int
    """Number of the fault in this run."""
