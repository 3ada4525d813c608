"""The training loop: the attempts of one run, one after the other.

    gather facts → policy.decide → start an attempt (a `worker_group`, watched by `attempt_monitor`) | hold | finish

Ray Train's own elastic mode waits a minute on a stale reservation and counts every failure alike;
so each attempt is a worker group of fixed size, and the size and the next move are ours. It runs in
the driver and dies with it. What it knows lies in the run directory. Where it finds a newer head's
incarnation it ends at once (`NewerHead`) and writes nothing more. No Ray in here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from raylaunch.checkpoint import store
from raylaunch.checkpoint.events import Event
from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import StateError
from raylaunch.state import event_log, files, records, requests, runs
from raylaunch.state.cluster_events import ThreadDied
from raylaunch.state.records import Cluster
from raylaunch.state.requests import Ask, DrainedAsk, StrikeAsk
from raylaunch.state.run_events import (
    AttemptEnded,
    AttemptFault,
    AttemptStarted,
    GlobalBatchSize,
    RunDecision,
    RunFailed,
    RunFinished,
    RunPaused,
    RunStopped,
)
from raylaunch.state.runs import Run
from raylaunch.training import consolidate, policy
from raylaunch.training.attempt_monitor import AttemptMonitor, Watched
from raylaunch.training.cluster_view import ClusterView
from raylaunch.training.hang_detector import ProgressTracker
from raylaunch.training.heartbeat_server import HeartbeatServer
from raylaunch.training.policy import (
    AttemptOutcome,
    FailureCounts,
    Finish,
    Gathering,
    Hold,
    Start,
    TrainerOutcome,
    TrainingFacts,
)
from raylaunch.training.worker.main import WorkerSpec
from raylaunch.training.worker_group import RayCluster, RayNode, WorkerGroupSpec

ENDS: dict[str, type[RunFinished | RunFailed | RunStopped | RunPaused]] = {
    end.kind: end for end in (RunFinished, RunFailed, RunStopped, RunPaused)
}
log = logging.getLogger("raylaunch.driver")
T = TypeVar("T")

NEWS_LIMIT = 2.0
"""Seconds until a node's death is known that its peers have felt already, on a busy head too. Only an attempt that
ended by a broken connection, with no news of whose, waits for all of it."""


class NewerHead(Exception):
    """Another head was elected: its driver has the run."""


@dataclass
class TrainingLoop:
    """One run on one cluster, from here to its end."""

    cluster_dir: Path
    run_dir: Path
    cluster: Cluster
    config: Config
    run: Run
    ray: RayCluster
    incarnation: int = 1
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    tally: FailureCounts = field(default_factory=FailureCounts)
    held_since: float | None = None
    longest_save: float = 0.0
    checkpoints: Path = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoints = runs.checkpoint_dir(self.run_dir, self.config)
        self.run_incarnation = self.run.incarnation_offset + self.incarnation
        """The incarnation as the run's checkpoints and events know it."""
        self.roster = ClusterView(self.cluster_dir, self.incarnation, self.clock)
        script = self.config.trainer.script is not None
        self.model_parallel_size = 1 if script else self.config.distributed.model_parallel
        self.left: set[str] = set()
        """Draining nodes that the head knows to be free of us."""
        self.began = self.clock()

    def drive(self) -> str:
        """Run attempts until the policy says that it is over; the run's last state."""
        if self.run.state in runs.FINAL:  # the driver before this one was lost behind the run's end
            return self.run.state
        self._retry_on_storage_error(self._take_over)
        rested = False
        while True:
            settled = self._retry_on_storage_error(self.settled_nodes)
            facts = self._retry_on_storage_error(partial(self.facts, len(settled), rested))
            decision = policy.decide(facts, self.config.elastic)
            match decision:
                case Finish():
                    return self._finish(decision)
                case Hold():
                    self._hold(decision)
                    rested = False
                case Start():
                    self.held_since = None
                    if not rested:
                        self._decided("start", decision, workers=decision.workers, delay=decision.delay)
                    if decision.delay:
                        self._pause(decision.delay)  # nodes may come or go meanwhile: decide again
                    else:
                        self.attempt(settled[: decision.workers // self.cluster.workers_per_node])
                    rested = decision.delay > 0

    def _finish(self, decision: Finish) -> str:
        self._decided("finish", decision, state=decision.state)
        self._save(state="queued" if decision.state == "paused" else decision.state, reason=decision.reason)
        self._event(ENDS[decision.state](decision.reason))
        if decision.state == "finished":
            self._consolidate()
        return decision.state

    def _hold(self, decision: Hold) -> None:
        if self.held_since is None:
            self.held_since = self.clock()
            self._decided("hold", decision)
            self._save(state="holding", reason=decision.reason)
        self.sleep(0.5)

    def facts(self, nodes: int, rested: bool) -> TrainingFacts:
        """What the policy needs to know now."""
        return TrainingFacts(
            nodes=nodes,
            workers_per_node=self.cluster.workers_per_node,
            model_parallel_size=self.model_parallel_size,
            stop_reason=runs.stop_reason(self.run_dir),
            last=self.tally.last,
            same_error=self.tally.same_error,
            idle_attempts=self.tally.idle_attempts,
            held=self.clock() - self.held_since if self.held_since is not None else 0.0,
            continues=runs.stop_continues(self.run_dir),
            rested=rested,
        )

    def settled_nodes(self) -> list[RayNode]:
        """The nodes to train on, by name, when there is nothing more to wait for."""
        began = self.clock()
        while True:
            self._check_fence()
            table = self.roster.nodes()
            self._tell_drained(table, on=frozenset())
            alive = self.ray.alive()
            known = Gathering(
                table, frozenset(alive), self.ray.draining(), self.clock() - began, self.tally.last,
                self.clock() - self.began, runs.stop_reason(self.run_dir) is not None,
            )  # fmt: skip
            if not policy.patient(known):
                return [alive[name] for name in known.usable]
            self.sleep(0.1)

    def attempt(self, chosen: list[RayNode]) -> None:
        """One worker group of one size, from its start to its end, which goes into `last`."""
        workers = len(chosen) * self.cluster.workers_per_node
        number = self._claim()
        self._fence(number)
        before = self._retry_on_storage_error(lambda: store.latest(self.checkpoints))
        from_step = before.step if before else 0
        self._pin_global_batch(workers)
        self._save(state="running", attempt=number, world_size=workers, nodes=len(chosen), reason="")
        names = [node.name for node in chosen]
        self._event(AttemptStarted(workers, len(chosen), names, from_step, self.run_incarnation))
        began = self.clock()
        ending, step = self._fit(number, chosen, from_step)
        after = self._retry_on_storage_error(lambda: store.latest(self.checkpoints))
        committed = after.step if after else 0
        script = self.config.trainer.script is not None
        progress = policy.progressed(ending, from_step, committed, self.clock() - began, script)
        self.tally, strike = self.tally.count(ending, progress)
        self._event(
            AttemptEnded(
                ending.kind, ending.text, ending.cause, ending.rank, ending.node, max(step, committed), committed
            )
        )
        if strike is not None:
            self._ask(StrikeAsk(node=strike, reason=ending.text))

    def _fit(self, number: int, chosen: list[RayNode], from_step: int) -> tuple[AttemptOutcome, int]:
        """Run it; how it ended, and the last step that is known."""
        address, ports = self.roster.pulse_place()
        pace = ProgressTracker(from_step, self.longest_save)
        with (
            closing(HeartbeatServer(address, ports, len(chosen) * self.cluster.workers_per_node)) as pulse,
            closing(self._watch(number, self._order(number, chosen, pulse), pulse, pace)) as watch,
        ):
            watch.start()
            found = watch.group.fit()
            ending = self._settle(number, watch, found)
        self.longest_save = pace.longest_save
        last = self._retry_on_storage_error(lambda: runs.last_metrics(self.run_dir))
        return ending, max(pace.step, int(last["step"]) if last.get("attempt") == number else 0)

    def _order(self, number: int, chosen: list[RayNode], pulse: HeartbeatServer) -> WorkerGroupSpec:
        size = self.config.step_scheduler.global_batch_size or 0
        place = pulse.place(stuck=max(30.0, self.config.elastic.hang_timeout / 2))
        return WorkerGroupSpec(
            f"{self.run.name}-{number:04d}", tuple(chosen), self.cluster.workers_per_node,
            WorkerSpec(self.run_dir, number, self.run_incarnation, size, place), self.run_dir / "ray",
            self.config.distributed.comm_timeout, "gloo" if self.config.trainer.script is not None else None,
        )  # fmt: skip

    def _watch(
        self, number: int, order: WorkerGroupSpec, pulse: HeartbeatServer, pace: ProgressTracker
    ) -> AttemptMonitor:
        """The group, and who looks after it."""
        unseen = self.config.trainer.script is not None and self.config.trainer.grow
        attempt = Watched(
            self.run_dir, number, order.on, order.world, self.config.elastic, self.model_parallel_size, unseen
        )
        return AttemptMonitor(
            attempt, self.roster, self.ray, self.ray.group(order), pulse, pace, self._event, self.clock, self.sleep
        )

    def _settle(self, number: int, watch: AttemptMonitor, found: AttemptOutcome | None) -> AttemptOutcome:
        """Behind `fit`: why it ended, and what is left of it is ended, too."""
        # The survivors' broken connections come first, the news of whose they were a moment later.
        patience = NEWS_LIMIT if found is not None and found.cause in {"communication", "ray"} else 0.0
        self._retry_on_storage_error(lambda: watch.end(patience))
        ending = self._retry_on_storage_error(lambda: self._ending(number, watch, found))
        if ending.kind not in {"fault", "error"}:
            return ending
        if watch.verdict is None and ending.kind == "fault":
            ending = replace(ending, node=watch.pulse.node(ending.rank), step=watch.pace.step)
            self._event(AttemptFault(ending.cause, ending.node, ending.rank, ending.step, ending.text))
        self._retry_on_storage_error(watch.stop_workers)
        return ending

    def _ending(self, number: int, watch: AttemptMonitor, found: AttemptOutcome | None) -> AttemptOutcome:
        word = files.read_json(files.attempt_dir(self.run_dir, number) / records.OUTCOME_FILE)
        outcome = TrainerOutcome(word["outcome"], int(word["step"] or 0)) if word is not None else None
        asked = watch.last_asked if runs.stop_reason(self.run_dir) is None else None
        return policy.ending(outcome, watch.verdict, found, asked, self.config.trainer.entry)

    def _consolidate(self) -> None:
        """Behind the run's end: nothing that happens here changes it."""
        if self.config.checkpoint.save_consolidated:
            consolidate.consolidate(
                self.run_dir, self.config, self._event, lambda: self._retry_on_storage_error(self._over)
            )

    def _over(self) -> str | None:
        """Why this driver has no more time."""
        return runs.stop_reason(self.run_dir)

    def _take_over(self) -> None:
        """Where the last driver of this run went down with an attempt, write down how that ended."""
        if self.run.state not in {"running", "holding"} or not self.run.attempt:
            return
        rows = [row for row in event_log.read_all(self.run_dir) if row.get("attempt") == self.run.attempt]
        kinds = [row["kind"] for row in rows]
        if "attempt_started" not in kinds or "attempt_ended" in kinds:
            return
        started = rows[kinds.index("attempt_started")]
        cause = "head_lost" if started.get("run_incarnation", 0) < self.run_incarnation else "driver_lost"
        last, commit = runs.last_metrics(self.run_dir), store.latest(self.checkpoints)
        committed = commit.step if commit else 0
        step = max(committed, int(last["step"]) if last.get("attempt") == self.run.attempt else 0)
        text = "the head was lost" if cause == "head_lost" else "the driver was lost"
        self.tally = FailureCounts(AttemptOutcome("fault", cause, text, None, cause, None, step))
        self._event(AttemptFault(cause, None, None, step, text))
        self._event(AttemptEnded("fault", text, cause, None, None, step, committed))

    def _claim(self) -> int:
        """An attempt number that nobody has: making its directory claims it."""
        number = self.run.attempt
        while True:
            number += 1
            if self._retry_on_storage_error(partial(files.claim_dir, files.attempt_dir(self.run_dir, number))):
                return number

    def _fence(self, number: int) -> None:
        """From here on no older attempt commits a checkpoint; and if a newer one is there, we are the old one."""

        def fence() -> None:
            files.make_dir(self.checkpoints)
            store.fence(self.checkpoints, self.run_incarnation, number)

        try:
            self._retry_on_storage_error(fence)
        except store.Fenced as error:
            raise NewerHead(str(error)) from error

    def _retry_on_storage_error(self, work: Callable[[], T]) -> T:
        """Storage that is full or gone, or cannot be read, is waited for: it is not the end of a run."""
        pause = 1.0
        while True:
            try:
                self._check_fence()
                return work()
            except store.Fenced:
                raise
            except (StateError, OSError) as error:
                log.error("waiting for the storage error=%r", str(error))
            self.sleep(pause)
            pause = min(30.0, 2 * pause)

    def _check_fence(self) -> None:
        """End at once when a newer head was elected: its driver writes now."""
        if self.roster.fenced():
            raise NewerHead("a newer head was elected")

    def _tell_drained(self, table: dict[str, policy.TrainingNode], on: frozenset[str]) -> None:
        """Tell the head which draining nodes no attempt uses (any more), once each."""
        draining = {name for name, node in table.items() if node.state == "draining"}
        for name in sorted(draining - on - self.left):
            self._ask(DrainedAsk(node=name))
        self.left = draining - on

    def _ask(self, what: Ask) -> None:
        self._retry_on_storage_error(lambda: requests.ask(self.cluster_dir, what))

    def _pin_global_batch(self, workers: int) -> None:
        """The global batch is a constant of the run: fix it at the first attempt, in the resolved config."""
        steps = self.config.step_scheduler
        if steps.global_batch_size is None and self.config.trainer.script is None:
            size = steps.local_batch_size * (steps.grad_acc_steps or 1) * workers // self.model_parallel_size
            config = runs.with_global_batch(self.config, size)
            self._retry_on_storage_error(
                lambda: files.write_text(self.run_dir / records.CONFIG_FILE, loader.dump(config))
            )
            self.config = config
            self._event(GlobalBatchSize(size, workers))

    def _pause(self, seconds: float) -> None:
        """Wait, unless the run is asked to stop."""
        until = self.clock() + seconds
        while self.clock() < until and self._retry_on_storage_error(lambda: runs.stop_reason(self.run_dir)) is None:
            self.sleep(0.2)

    def _decided(self, what: str, decision: policy.Decision, **fields: Any) -> None:
        self._event(RunDecision(what, decision.reason, decision.setting, **fields))

    def _event(self, event: Event) -> None:
        log.info("%s %s", event.kind, " ".join(f"{k}={v!r}" for k, v in event.values().items()))
        try:
            event_log.append(self.run_dir, event, attempt=self.run.attempt)
        except StateError as error:  # the line stands in our log
            log.error("the event could not be written error=%r", str(error))

    def thread_died(self, thread: str, error: str) -> None:
        """One of this driver's own: the run goes on, but somebody has to know."""
        self._event(ThreadDied(thread, error))

    def _save(self, **changes: Any) -> None:
        self.run = self._retry_on_storage_error(lambda: self.run.save(self.run_dir, **changes))
