"""The training policy: facts in, one decision out. Pure: no clock, no files, no Ray.

The driver gathers the facts, executes the decision and writes it down with its reason and the
setting behind it. (The node policy, which replaces and grows nodes, will stand beside it.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raylaunch.config import ElasticConfig

MAX_BACKOFF = 60.0


@dataclass(frozen=True)
class Ending:
    """How the last attempt ended.

    `error`: the user's code raised; the same again is the same bug. `fault`: a process, node or
    connection was lost; the run itself is not to blame. `fingerprint` is equal for equal errors.
    """

    kind: Literal["finished", "stopped", "error", "fault"]
    fingerprint: str = ""
    text: str = ""
    rank: int | None = None


@dataclass(frozen=True)
class Facts:
    """What the training loop knows when it has to decide."""

    nodes: int
    """Nodes that the agents and Ray both hold for alive."""
    workers_per_node: int
    stop_reason: str | None = None
    last: Ending | None = None
    same_error: int = 0
    """How often in a row the last error came, with no commit between."""
    idle_attempts: int = 0
    """Attempts in a row that ended without a commit."""
    held: float = 0.0
    """Seconds that the run has been waiting for nodes."""


@dataclass(frozen=True)
class Start:
    """Begin an attempt with this many workers, after `delay` seconds."""

    workers: int
    delay: float
    reason: str
    setting: str = ""


@dataclass(frozen=True)
class Hold:
    """Wait for nodes."""

    reason: str
    setting: str = ""


@dataclass(frozen=True)
class Finish:
    """The run is over, in this state."""

    state: Literal["finished", "stopped", "failed"]
    reason: str
    setting: str = ""


Decision = Start | Hold | Finish


def decide(facts: Facts, elastic: ElasticConfig) -> Decision:
    """The training loop's next move."""
    last = facts.last
    if last is not None and last.kind == "finished":
        return Finish("finished", "all steps are done")
    if facts.stop_reason is not None:
        return Finish("stopped", facts.stop_reason)
    if last is not None and last.kind == "stopped":
        return Finish("stopped", "the trainer stopped")
    if last is not None and last.kind == "error" and facts.same_error >= elastic.max_same_error:
        return Finish(
            "failed",
            f"the same error {facts.same_error} times with no commit between: {last.text}",
            f"elastic.max_same_error={elastic.max_same_error}",
        )
    minimum = elastic.min_nodes or 1
    if facts.nodes < minimum:
        if facts.held > elastic.hold_timeout:
            return Finish(
                "failed",
                f"{facts.nodes} of at least {minimum} nodes for {facts.held:.0f} s",
                f"elastic.hold_timeout={elastic.hold_timeout}",
            )
        return Hold(f"{facts.nodes} of at least {minimum} nodes", f"elastic.min_nodes={minimum}")
    delay = min(MAX_BACKOFF, elastic.backoff * 2 ** (facts.idle_attempts - 2)) if facts.idle_attempts > 1 else 0.0
    reason = f"{facts.nodes} nodes are alive"
    if last is not None:
        reason = f"{last.kind}: {last.text or last.fingerprint}; {reason}"
    return Start(facts.nodes * facts.workers_per_node, delay, reason, f"elastic.backoff={elastic.backoff:g}")
