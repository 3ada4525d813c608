"""The training policy: facts in, one decision out. Pure: no clock, no files, no Ray.

    patient  which nodes to begin with:  wait for more, or go with these
    decide   between two attempts:       Start | Hold | Finish
    during   while one runs:             Continue | Resize | Withdraw | Abort
    ending   behind it:                  why it ended, of all that is said about that

The driver gathers the facts, executes the decision and writes it down with its reason and the
setting behind it. (The node policy, which replaces and grows nodes, stands beside it.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from raylaunch.config.schema import ElasticConfig
from raylaunch.training.hang_detector import Hang
from raylaunch.training.stop_request import AT_COMMIT, NOW

MAX_BACKOFF = 60.0


@dataclass(frozen=True)
class AttemptOutcome:
    """How the last attempt ended.

    `error`: the user's code raised; the same again is the same bug. `fault`: a process, node or
    connection was lost; the run itself is not to blame. `resized`: it saved and ended because we
    asked it to. `fingerprint` is equal for equal errors. `cause`, `rank`, `node`: of a fault, where known.
    """

    kind: Literal["finished", "stopped", "resized", "error", "fault"]
    fingerprint: str = ""
    text: str = ""
    rank: int | None = None
    cause: str = ""
    node: str | None = None
    step: int | None = None


LOSSES_PER_STRIKE = 3


@dataclass(frozen=True)
class FailureCounts:
    """What repeats from attempt to attempt without a commit between."""

    last: AttemptOutcome | None = None
    same_error: int = 0
    idle_attempts: int = 0
    losses: tuple[str, int] = ("", 0)
    """The node that lost a worker last, and how often in a row."""

    def count(self, ending: AttemptOutcome, progress: bool) -> tuple[FailureCounts, str | None]:
        """After one more ending, of an attempt that made a commit or not; and the node that gets a strike."""
        same = self.last is not None and ending.fingerprint == self.last.fingerprint and not progress
        idle = self.idle_attempts + (ending.kind in {"fault", "error"})
        losses = ("", 0) if progress else self.losses
        strike = None
        if ending.node is not None and ending.cause in {"hardware", "worker_lost", "storage"}:
            losses = (ending.node, losses[1] + 1 if losses[0] == ending.node else 1)
            if ending.cause == "hardware" or losses[1] >= LOSSES_PER_STRIKE:
                strike, losses = ending.node, ("", 0)
        return FailureCounts(ending, self.same_error + 1 if same else 1, 0 if progress else idle, losses), strike


def usable(nodes: int, workers_per_node: int, model_parallel_size: int) -> int:
    """The most of these nodes whose workers are a multiple of `model_parallel_size` (tensor and context parallel)."""
    return nodes - nodes % (model_parallel_size // math.gcd(model_parallel_size, workers_per_node))


@dataclass(frozen=True)
class TrainingFacts:
    """What the training loop knows when it has to decide."""

    nodes: int
    """Nodes that an attempt can use: ready, not draining, and alive for Ray."""
    workers_per_node: int
    stop_reason: str | None = None
    last: AttemptOutcome | None = None
    same_error: int = 0
    """How often in a row the last error came, with no commit between."""
    idle_attempts: int = 0
    """Attempts in a row that ended without a commit."""
    held: float = 0.0
    """Seconds that the run has been waiting for nodes."""
    continues: bool = False
    """The stop is no end: another allocation takes the run up again."""
    model_parallel_size: int = 1
    """Workers that share one replica of the model (`distributed`): a world has a multiple of these."""
    rested: bool = False
    """The pause before this attempt has been made."""


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
    """The run is over, in this state; `paused`: for this allocation."""

    state: Literal["finished", "stopped", "paused", "failed"]
    reason: str
    setting: str = ""


Decision = Start | Hold | Finish


def decide(facts: TrainingFacts, elastic: ElasticConfig) -> Decision:
    """The training loop's next move between two attempts."""
    last = facts.last
    if last is not None and last.kind == "finished":
        return Finish("finished", "all steps are done")
    if facts.stop_reason is not None:
        if facts.continues:
            return Finish("paused", f"continues in the next allocation ({facts.stop_reason})")
        return Finish("stopped", facts.stop_reason)
    if last is not None and last.kind == "stopped":
        return Finish("stopped", "the trainer stopped")
    # A hang at the same place again and again is the code's, however it looks.
    own = last is not None and (last.kind == "error" or last.cause == "hang")
    if last is not None and own and facts.same_error >= elastic.max_identical_errors:
        return Finish(
            "failed",
            f"the same {last.cause or 'error'} {facts.same_error} times with no commit between: {last.text}",
            f"elastic.max_identical_errors={elastic.max_identical_errors}",
        )
    # So does a worker that is lost, or storage that a node does not reach, once it has gone on elsewhere.
    lost_limit = LOSSES_PER_STRIKE * (elastic.max_strikes + 1)
    if last is not None and last.cause in {"worker_lost", "storage"} and facts.same_error >= lost_limit:
        return Finish(
            "failed",
            f"{last.fingerprint} {facts.same_error} times with no commit between, on other nodes, too: {last.text}",
            f"elastic.max_strikes={elastic.max_strikes}",
        )
    minimum, setting = elastic.min_nodes or 1, f"elastic.min_nodes={elastic.min_nodes or 1}"
    if minimum * facts.workers_per_node < facts.model_parallel_size:
        minimum = -(-facts.model_parallel_size // facts.workers_per_node)
        setting = f"distributed: the parallelism settings need a multiple of {facts.model_parallel_size} workers"
    nodes = usable(facts.nodes, facts.workers_per_node, facts.model_parallel_size)
    if nodes < minimum:
        if facts.held > elastic.min_nodes_timeout:
            return Finish(
                "failed",
                f"{nodes} of at least {minimum} nodes for {facts.held:.0f} s",
                f"elastic.min_nodes_timeout={elastic.min_nodes_timeout}",
            )
        return Hold(f"{nodes} of at least {minimum} nodes", setting)
    reason = f"{nodes} nodes are alive"
    if last is not None:
        reason = f"{last.kind}: {last.text or last.fingerprint}; {reason}"
    delay = _delay(facts, elastic)
    if delay:
        setting = f"elastic.restart_backoff={elastic.restart_backoff:g}"
    return Start(nodes * facts.workers_per_node, delay, reason, setting)


def _delay(facts: TrainingFacts, elastic: ElasticConfig) -> float:
    """Seconds before the next attempt: more and more, while none makes a commit."""
    if facts.idle_attempts <= 1 or facts.rested:
        return 0.0
    return min(MAX_BACKOFF, elastic.restart_backoff * 2.0 ** min(facts.idle_attempts - 2, 16))


@dataclass(frozen=True)
class TrainingNode:
    """A node as the agents have it. `ready_for`: seconds that it has been ready without a break."""

    state: str
    ready_for: float = 0.0


SETTLE_LIMIT = 20.0
"""Seconds to wait until Ray has a node that its agent calls ready."""
RETURN_LIMIT = 15.0
"""Seconds that a new driver waits for nodes which are on their way: after an election they come one by one."""


@dataclass(frozen=True)
class Gathering:
    """What is known of the nodes before an attempt."""

    nodes: Mapping[str, TrainingNode]
    """As their agents have them, who know first of a death."""
    alive: frozenset[str]
    """Those that Ray holds for alive: its word counts only for nodes that are ready for their agents."""
    draining: frozenset[str] = frozenset()
    """Those that Ray itself drains."""
    waited: float = 0.0
    """Seconds since we began to look."""
    last: AttemptOutcome | None = None
    age: float = 0.0
    """Seconds since this driver began."""
    stopping: bool = False
    """The run was asked to stop."""

    @property
    def ready(self) -> frozenset[str]:
        return frozenset(name for name, node in self.nodes.items() if node.state == "ready")

    @property
    def usable(self) -> list[str]:
        """Ready for their agents, alive for Ray, drained by nobody; by name."""
        return sorted((self.ready & self.alive) - self.draining)


def patient(known: Gathering) -> bool:
    """Whether to wait for more nodes than are `usable` now: for Ray, bounded, and in a new driver for those on their way."""
    if known.stopping or (known.last is not None and known.last.kind in {"finished", "stopped"}):
        return False
    if known.ready - known.alive and known.waited < SETTLE_LIMIT:
        return True
    coming = any(node.state in {"starting", "restarting"} for node in known.nodes.values())
    new = known.last is None or known.last.cause in {"head_lost", "driver_lost"}
    return (coming or not known.ready) and new and known.age < RETURN_LIMIT


@dataclass(frozen=True)
class AttemptSnapshot:
    """What is known while an attempt runs."""

    on: frozenset[str]
    """The nodes that carry its ranks."""
    nodes: Mapping[str, TrainingNode]
    """Every node of the cluster; one that is not in here is unknown, which says nothing."""
    age: float
    """Seconds since the attempt began."""
    begun: bool
    """It has made a step."""
    asked: int = 0
    """What it was asked already: 0, AT_COMMIT or NOW."""
    asked_for: frozenset[str] = frozenset()
    """The nodes for which it was asked to grow."""
    draining: frozenset[str] = frozenset()
    """Nodes that Ray itself drains."""
    excluded: frozenset[str] = frozenset()
    stopping: bool = False
    """The run was asked to stop."""
    hang: Hang | None = None
    workers_per_node: int = 1
    model_parallel_size: int = 1
    """As in `TrainingFacts`."""


@dataclass(frozen=True)
class Continue:
    """Nothing to do."""


@dataclass(frozen=True)
class Resize:
    """Save and end (`when`: AT_COMMIT or NOW), to go on with other nodes: `nodes` come or must be left."""

    when: int
    why: Literal["grow", "drain"]
    nodes: frozenset[str]
    reason: str
    setting: str = ""


@dataclass(frozen=True)
class Withdraw:
    """The nodes to grow onto are gone again: no need to end."""

    reason: str
    setting: str = ""


@dataclass(frozen=True)
class Abort:
    """End this attempt at once: it cannot go on."""

    cause: Literal["node_lost", "raylet_lost", "hang"]
    reason: str
    setting: str = ""
    nodes: tuple[str, ...] = field(default=())


Move = Continue | Resize | Withdraw | Abort


def during(view: AttemptSnapshot, elastic: ElasticConfig) -> Move:
    """The training loop's next move while an attempt runs."""
    gone = {n: view.nodes[n].state for n in sorted(view.on) if n in view.nodes}
    gone = {n: s for n, s in gone.items() if s not in {"ready", "draining"}}
    if gone:
        # An agent that restarts its Ray says so; any other state means that the node itself went.
        cause: Literal["node_lost", "raylet_lost"] = (
            "raylet_lost" if all(s == "restarting" for s in gone.values()) else "node_lost"
        )
        told = ", ".join(f"{name} is {state}" for name, state in gone.items())
        return Abort(cause, told, nodes=tuple(gone))
    if view.hang is not None:
        return Abort("hang", view.hang.reason, view.hang.setting)
    leaving = frozenset(
        n for n in view.on if (n in view.nodes and view.nodes[n].state == "draining") or n in view.draining
    )
    if leaving:
        if view.asked == NOW:
            return Continue()
        return Resize(NOW, "drain", leaving, f"{', '.join(sorted(leaving))} must be left")
    if view.stopping or view.asked == NOW:
        return Continue()
    waiting = _may_join(view, 0.0)
    setting = f"elastic.scale_up_delay={elastic.scale_up_delay:g}"
    if view.asked == AT_COMMIT:
        if view.asked_for & waiting and _gains(view, waiting):
            return Continue()
        return Withdraw(f"{', '.join(sorted(view.asked_for))} cannot be used any more", setting)
    # Not soon after a start, and only onto nodes that stay: a node that comes and goes costs nothing then.
    if not view.begun or view.age < elastic.scale_up_delay:
        return Continue()
    steady = _may_join(view, elastic.scale_up_delay)
    if not _gains(view, steady):
        return Continue()
    reason = f"{', '.join(sorted(steady))} ready for {elastic.scale_up_delay:g} s"
    return Resize(AT_COMMIT, "grow", steady, reason, setting)


def _gains(view: AttemptSnapshot, more: frozenset[str]) -> bool:
    """An attempt could use more nodes than this one does."""
    return usable(len(view.on | more), view.workers_per_node, view.model_parallel_size) > len(view.on)


def _may_join(view: AttemptSnapshot, ready_for: float) -> frozenset[str]:
    """Nodes that the attempt does not use and could."""
    return frozenset(
        name
        for name, node in view.nodes.items()
        if node.state == "ready" and node.ready_for >= ready_for
        and name not in view.on | view.excluded | view.draining
    )  # fmt: skip


LONG_ATTEMPT = 600.0
"""Seconds after which a script's attempt that the machines ended counts as progress: we do not see what it saves."""


def progressed(ending: AttemptOutcome, from_step: int, committed: int, seconds: float, script: bool) -> bool:
    """Whether an attempt of so many seconds has brought the run on. `script`: it tells no steps."""
    unseen = script and ending.kind == "fault" and ending.cause != "hang"
    return committed > from_step or (unseen and seconds > LONG_ATTEMPT)


@dataclass(frozen=True)
class TrainerOutcome:
    """outcome.json, the trainer's own word: how its attempt ended, and at which step (0: it tells none)."""

    outcome: str
    step: int = 0


def ending(
    outcome: TrainerOutcome | None,
    seen: AttemptOutcome | None,
    told: AttemptOutcome | None,
    asked: Resize | None,
    entry: str,
) -> AttemptOutcome:
    """Why an attempt ended: the trainer's own word first, then what we saw ourselves, then what Ray told.

    `asked`: what we asked the trainer for, also when it was withdrawn since (it may have left already); None when
    somebody else asked the run to stop. `entry`: the trainer's name."""
    if outcome is None:
        text = f"{entry} returned without session.finish() (leave a Loop by loop.end(), not by break)"
        return seen or told or AttemptOutcome("error", fingerprint=text, text=text, cause="error")
    text = f"step {outcome.step}" if outcome.step else "its script ended"
    if outcome.outcome == "finished":
        return AttemptOutcome("finished", text=text)
    if asked is not None:
        return AttemptOutcome("resized", text=f"{asked.reason} ({text})")
    return AttemptOutcome("stopped", text=text)
