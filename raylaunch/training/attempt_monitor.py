"""The thread that looks after one attempt: nodes, pulses, time; it asks the policy and does what it says.

Five times a second: the table of nodes, where the workers are, whether we are still the driver that
counts. A fault ends the attempt at once, whatever Ray still waits for; growth and drain ask the
trainer to save and end.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from raylaunch.config.schema import ElasticConfig
from raylaunch.state import files, runs
from raylaunch.state.run_events import AttemptAborted, AttemptFault, RankHung, ResizeRequested, RunDecision, WatchFailed
from raylaunch.training import hang_detector, policy
from raylaunch.training.cluster_view import ClusterView
from raylaunch.training.heartbeat_server import HeartbeatServer
from raylaunch.training.policy import Abort, AttemptOutcome, AttemptSnapshot, Continue, Resize, Withdraw
from raylaunch.training.stack_dump import where_it_stands
from raylaunch.training.stop_request import AT_COMMIT
from raylaunch.training.worker_group import RayCluster, WorkerGroup

log = logging.getLogger("raylaunch.watch")

EVERY, RAY_EVERY = 0.2, 2.0
DUMP_LIMIT = 3.0
GONE_LIMIT = 10.0
RETURN_LIMIT = 60.0
"""Seconds from the abort of an attempt to its end in Ray Train, or this driver is of no use any more."""


@dataclass(frozen=True)
class Watched:
    """The attempt that is looked after."""

    run_dir: Path
    number: int
    on: frozenset[str]
    """The nodes of its workers."""
    world: int
    elastic: ElasticConfig
    model_parallel_size: int = 1
    """Workers that the plan does not tear apart."""
    unseen: bool = False
    """The trainer tells no steps; it has begun when all its workers have."""


@dataclass
class AttemptMonitor:
    """Looks after one attempt from `start` to `end`."""

    attempt: Watched
    roster: ClusterView
    ray: RayCluster
    group: WorkerGroup
    pulse: HeartbeatServer
    pace: hang_detector.ProgressTracker
    event: Callable[..., None]
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    verdict: AttemptOutcome | None = field(default=None, init=False)
    """Why it was aborted, None if it was not."""
    asked: Resize | None = field(default=None, init=False)
    last_asked: Resize | None = field(default=None, init=False)
    """Also when it was withdrawn since."""

    def __post_init__(self) -> None:
        self._began = self.clock()
        self._draining: frozenset[str] = frozenset()
        self._asked_ray_at = -math.inf
        self._failure = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self, patience: float = 0.0) -> None:
        """The attempt is over: one more look, or several in `patience` seconds, for a node that went with it."""
        self.close()
        deadline = self.clock() + patience
        while self.verdict is None:
            move = policy.during(self._view(hang=False), self.attempt.elastic)
            if isinstance(move, Abort):
                self._judge(move, None)
            elif self.clock() >= deadline:
                break
            else:
                self.sleep(0.05)

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def stop_workers(self) -> None:
        """End what is left of the group, and wait (bounded) until it is gone from the nodes that live."""
        began = self.clock()
        self.group.abort()
        alive = {name for name, node in self.roster.nodes().items() if node.state in {"ready", "draining"}}
        left = self.pulse.wait_gone(self.attempt.on & alive, GONE_LIMIT)
        self.event(AttemptAborted(round(self.clock() - began, 3), left or None))

    def _work(self) -> None:
        while not self._end.wait(EVERY):
            try:
                if self.tick():
                    return self._retry_on_storage_error()
                self._failure = ""
            except Exception as error:  # noqa: BLE001  a bad file, a GCS that does not answer: the next look may see again
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Once for each trouble that lasts, not five times a second: an attempt that nobody watches must be known."""
        log.exception("the attempt monitor failed")
        if repr(error) != self._failure:
            self.event(WatchFailed(repr(error)))
        self._failure = repr(error)

    def _retry_on_storage_error(self) -> None:
        """Ray Train was told to end the attempt. Where it does not, a new driver has to take over."""
        if not self._end.wait(RETURN_LIMIT):
            log.critical("Ray Train does not end an attempt that was aborted: this driver ends, for another")
            os.kill(os.getpid(), signal.SIGKILL)

    def tick(self) -> bool:
        """One look; whether the attempt was aborted."""
        if self.roster.fenced():
            log.error("a newer head was elected: this driver exits and writes nothing")
            os._exit(runs.DRIVER_FENCED)
        view = self._view()
        match move := policy.during(view, self.attempt.elastic):
            case Continue():
                return False
            case Withdraw():
                self.asked = None
                self.pulse.stop(0, move.reason)
                self.event(RunDecision("withdraw", move.reason, move.setting))
                return False
            case Resize():
                self.asked = self.last_asked = move
                self.event(RunDecision("resize", move.reason, move.setting))
                when = "commit" if move.when == AT_COMMIT else "now"
                self.event(ResizeRequested(move.why, when, sorted(move.nodes)))
                self.pulse.stop(move.when, f"{move.why}: {move.reason}")
                return False
            case Abort():
                self._judge(move, view.hang)
                self.group.abort()
                return True

    def _view(self, hang: bool = True) -> AttemptSnapshot:
        attempt, now = self.attempt, self.clock()
        if now - self._asked_ray_at > RAY_EVERY:
            self._asked_ray_at, self._draining = now, self.ray.draining()
        beats = self.pulse.beats()
        self.pace.observe(now, beats)
        age = now - self._began
        found = hang_detector.judge(beats, attempt.world, age, self.pace, attempt.elastic) if hang else None
        return AttemptSnapshot(
            on=attempt.on,
            nodes=self.roster.nodes(),
            age=age,
            begun=self.pace.begun or (attempt.unseen and len(beats) == attempt.world),
            workers_per_node=attempt.world // len(attempt.on),
            model_parallel_size=attempt.model_parallel_size,
            asked=self.asked.when if self.asked else 0,
            asked_for=self.asked.nodes if self.asked else frozenset(),
            draining=self._draining,
            excluded=self.roster.excluded(),
            stopping=runs.stop_reason(attempt.run_dir) is not None,
            hang=found,
        )

    def _judge(self, move: Abort, hang: hang_detector.Hang | None) -> None:
        """Write down what happened, and make it the attempt's ending."""
        step = self.pace.step
        if hang is not None:
            self.verdict = self._hung(hang)
        else:
            node = ", ".join(move.nodes)
            self.verdict = AttemptOutcome("fault", f"{move.cause} {node}", move.reason, None, move.cause, node, step)
        found = self.verdict
        self.event(AttemptFault(found.cause, found.node, found.rank, step, found.text))

    def _hung(self, hang: hang_detector.Hang) -> AttemptOutcome:
        """Let all workers write their stacks, and find the line at which the missing one stands."""
        self.pulse.dump()
        rank = hang.ranks[0]
        deadline = self.clock() + DUMP_LIMIT
        while not set(hang.ranks[:8]) <= self.pulse.dumped().keys() and self.clock() < deadline:
            self.sleep(0.05)
        folder = files.attempt_dir(self.attempt.run_dir, self.attempt.number)
        stack = self.pulse.dumped().get(rank)
        line = where_it_stands(Path(stack)) if stack else "no answer: frozen, or in code that does not return"
        node = self.pulse.node(rank)
        self.event(
            RankHung(
                rank, list(hang.ranks[:64]), node, hang.step, hang.phase, seconds=round(hang.seconds, 1),
                stack=stack or str(folder / f"rank-{rank}.log"), line=line, reason=hang.reason, setting=hang.setting,
            )
        )  # fmt: skip
        text = f"rank {rank} on {node} hangs at step {hang.step}: {line}" if hang.phase != "start" else hang.reason
        return AttemptOutcome("fault", f"hang of rank {rank}: {line}", text, rank, "hang", node, hang.step)
