"""The driver: the attempts of one run, one after the other. The only user of Ray Train.

    gather facts → policy.decide → start an attempt (`attempt`, watched by `watch`) | hold | finish

Ray Train's own elastic mode waits a minute on a stale reservation and counts every failure alike;
so each attempt is a TorchTrainer of fixed size, and the size and the next move are ours. It runs on
the head, started by the head's agent, and dies with it. What it knows lies in the run directory.
A driver that finds a newer head's incarnation ends at once (exit code 75) and writes nothing more.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import ray

from raylaunch.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    # Ray starts what it needs for a driver while the imports below go on.
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.WARNING)

import ray.train
from ray.exceptions import RayError

from raylaunch import alerts, attempt, beside, configfile, consolidate, layout, policy, runs, state, threads
from raylaunch.attempt import RayNode
from raylaunch.checkpoint import store
from raylaunch.classify import classify
from raylaunch.config import Config
from raylaunch.errors import StateError
from raylaunch.layout import Cluster
from raylaunch.policy import Ending, Facts, Finish, Hold, Start, Tally
from raylaunch.pulse import Server
from raylaunch.roster import Roster
from raylaunch.runs import Run
from raylaunch.tracking import follow
from raylaunch.watch import Watch
from raylaunch.watchdog import Pace

log = logging.getLogger("raylaunch.driver")
T = TypeVar("T")

SETTLE_LIMIT = 20.0
"""Seconds to wait until Ray has a node that its agent calls ready."""
RETURN_LIMIT = 15.0
"""Seconds that a new driver waits for nodes which are on their way: after an election they come one by one."""
LONG_ATTEMPT = 600.0
"""Seconds after which a script's attempt that the machines ended counts as progress: we do not see what it saves."""
NEWS_LIMIT = 2.0
"""Seconds until a node's death is known that its peers have felt already, on a busy head too. Only an attempt that
ended by a broken connection, with no news of whose, waits for all of it."""


@dataclass
class Driver:
    """One run on one cluster, from here to its end."""

    cluster_dir: Path
    run_dir: Path
    cluster: Cluster
    config: Config
    run: Run
    incarnation: int = 1
    tally: Tally = field(default_factory=Tally)
    held_since: float | None = None
    longest_save: float = 0.0
    checkpoints: Path = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoints = runs.checkpoint_dir(self.run_dir, self.config)
        self.term = self.run.base + self.incarnation
        """The incarnation as the run's checkpoints and events know it."""
        self.roster = Roster(self.cluster_dir, self.incarnation)
        self.nodes = attempt.Nodes()
        script = self.config.trainer.script is not None
        self.together = 1 if script else self.config.distributed.model_parallel
        self.left: set[str] = set()
        """Draining nodes that the head knows to be free of us."""
        self.return_until = time.monotonic() + RETURN_LIMIT

    def drive(self) -> str:
        """Run attempts until the policy says that it is over; the run's last state."""
        if self.run.state in runs.FINAL:  # the driver before this one was lost behind the run's end
            if self.run.state == "finished" and not consolidate.target(self.run_dir).exists():
                self._consolidate()
            return self.run.state
        self._insist(self._take_over)
        while True:
            chosen = self._insist(self.usable_nodes)
            facts = self._insist(lambda: self.facts(len(chosen)))  # noqa: B023
            decision = policy.decide(facts, self.config.elastic)
            match decision:
                case Finish():
                    self._decided("finish", decision, state=decision.state)
                    state_ = "queued" if decision.state == "paused" else decision.state
                    self._save(state=state_, reason=decision.reason)
                    self._event(decision.state, reason=decision.reason)
                    if decision.state == "finished":
                        self._consolidate()
                    return decision.state
                case Hold():
                    if self.held_since is None:
                        self.held_since = time.monotonic()
                        self._decided("hold", decision)
                        self._save(state="holding", reason=decision.reason)
                    time.sleep(0.5)
                case Start():
                    self.held_since = None
                    self._decided("start", decision, workers=decision.workers, delay=decision.delay)
                    if decision.delay:
                        self._pause(decision.delay)
                        chosen = self._insist(self.usable_nodes)  # some may have come or gone meanwhile
                    enough = len(chosen) >= (self.config.elastic.min_nodes or 1)
                    if enough and self._insist(lambda: runs.stop_reason(self.run_dir)) is None:
                        self.attempt(chosen)

    def facts(self, nodes: int) -> Facts:
        """What the policy needs to know now."""
        return Facts(
            nodes=nodes,
            workers_per_node=self.cluster.workers_per_node,
            together=self.together,
            stop_reason=runs.stop_reason(self.run_dir),
            last=self.tally.last,
            same_error=self.tally.same_error,
            idle_attempts=self.tally.idle_attempts,
            held=time.monotonic() - self.held_since if self.held_since is not None else 0.0,
            continues=runs.stop_continues(self.run_dir),
        )

    def usable_nodes(self) -> list[RayNode]:
        """Of the settled ones, as many as the plan can share."""
        settled = self.settled_nodes()
        return settled[: policy.usable(len(settled), self.cluster.workers_per_node, self.together)]

    def settled_nodes(self) -> list[RayNode]:
        """The nodes to train on: ready for their agents, alive for Ray, drained by nobody; by name.

        The agents know first of a death: Ray's word counts only for nodes that they hold for ready,
        and only for those it is waited for, bounded. A new driver also waits for nodes on their way.
        """
        began = time.monotonic()
        while True:
            self._check_fence()
            table = self.roster.look()
            self._tell_drained(table, on=frozenset())
            alive, leaving = self.nodes.alive(), self.nodes.draining()
            ready = {name for name, node in table.items() if node.state == "ready"}
            coming = {name for name, node in table.items() if node.state in {"starting", "restarting"}}
            now = time.monotonic()
            missing = ready - alive.keys()
            patient = (missing and now - began < SETTLE_LIMIT) or (
                (coming or not ready) and self.last_was_elsewhere() and now < self.return_until
            )
            if not patient or runs.stop_reason(self.run_dir) is not None:
                return [alive[name] for name in sorted((ready & alive.keys()) - leaving)]
            time.sleep(0.1)

    def last_was_elsewhere(self) -> bool:
        """This driver has not run an attempt yet."""
        last = self.tally.last
        return last is None or last.cause in {"head_lost", "driver_lost"}

    def attempt(self, chosen: list[RayNode]) -> None:
        """One worker group of one size, from its start to its end, which goes into `last`."""
        workers = len(chosen) * self.cluster.workers_per_node
        number = self._claim()
        self._fence(number)
        before = self._insist(lambda: store.latest(self.checkpoints))
        from_step = before.step if before else 0
        self._pin_global_batch(workers)
        self._save(state="running", attempt=number, world_size=workers, nodes=len(chosen), reason="")
        names = [node.name for node in chosen]
        self._event(
            "attempt_started", workers=workers, nodes=len(chosen), on=names, from_step=from_step,
            incarnation=self.term,
        )  # fmt: skip
        began = time.monotonic()
        ending, step = self._fit(number, chosen, from_step)
        after = self._insist(lambda: store.latest(self.checkpoints))
        committed = after.step if after else 0
        unseen = self.config.trainer.script is not None and ending.kind == "fault" and ending.cause != "hang"
        progress = committed > from_step or (unseen and time.monotonic() - began > LONG_ATTEMPT)
        self.tally, strike = self.tally.count(ending, progress)
        self._event(
            "attempt_ended", how=ending.kind, error=ending.text, cause=ending.cause, rank=ending.rank,
            node=ending.node, step=max(step, committed), committed=committed,
        )  # fmt: skip
        if strike is not None:
            self._request("strike", node=strike, reason=ending.text)

    def _fit(self, number: int, chosen: list[RayNode], from_step: int) -> tuple[Ending, int]:
        """Run it; how it ended, and the last step that is known."""
        attempt.give_back()
        address, ports = self.roster.pulse_place()
        world = len(chosen) * self.cluster.workers_per_node
        pulse, pace = Server(address, ports, world), Pace(from_step, self.longest_save)
        spec = {
            "run_dir": str(self.run_dir),
            "attempt": number,
            "incarnation": self.term,
            "global_batch_size": self.config.step_scheduler.global_batch_size or 0,
            "pulse": {**pulse.spec(), "stuck": max(30.0, self.config.elastic.hang_timeout / 2)},
        }
        group = attempt.group(
            f"{self.run.name}-{number:04d}", chosen, self.cluster.workers_per_node, spec, self.run_dir / "ray",
            self.config.distributed.comm_timeout, "gloo" if self.config.trainer.script is not None else None,
        )  # fmt: skip
        watch = Watch(
            self.run_dir, number, frozenset(node.name for node in chosen), world, self.config.elastic,
            self.roster, pulse, pace, self.nodes.draining, group.abort, self._event, self.together,
            unseen=self.config.trainer.script is not None and self.config.trainer.grow,
        )  # fmt: skip
        found: Ending | None = None
        try:
            group.fit()
        except (ray.train.TrainingFailedError, RayError) as error:
            log.exception("attempt failed attempt=%d", number)
            found = classify(error)
        try:
            # The survivors' broken connections come first, the news of whose they were a moment later.
            patience = NEWS_LIMIT if found is not None and found.cause in {"communication", "ray"} else 0.0
            self._insist(lambda: watch.end(patience))
            ending = self._insist(lambda: self._ending(number, found, watch))
            if ending.kind in {"fault", "error"}:
                if watch.verdict is None and ending.kind == "fault":
                    ending = replace(ending, node=pulse.node(ending.rank), step=pace.step)
                    self._event(
                        "fault", cause=ending.cause, node=ending.node, rank=ending.rank, step=pace.step,
                        reason=ending.text,
                    )  # fmt: skip
                self._insist(watch.stop_workers)
        finally:
            pulse.close()
        self.longest_save = pace.longest_save
        last = self._insist(lambda: runs.last_metrics(self.run_dir))
        return ending, max(pace.step, int(last["step"]) if last.get("attempt") == number else 0)

    def _ending(self, number: int, found: Ending | None, watch: Watch) -> Ending:
        """Why the attempt ended: the trainer's own word first, then what we saw, then what Ray says."""
        outcome = state.read_json(state.attempt_dir(self.run_dir, number) / "outcome.json")
        if outcome is not None:
            text = f"step {outcome['step']}" if outcome["step"] else "its script ended"
            if outcome["outcome"] == "finished":
                return Ending("finished", text=text)
            asked = watch.last_asked  # it may have been withdrawn when the trainer had left already
            ours = asked is not None and runs.stop_reason(self.run_dir) is None
            return (
                Ending("resized", text=f"{asked.reason} ({text})") if ours and asked else Ending("stopped", text=text)
            )
        if watch.verdict is not None or found is not None:
            return watch.verdict or found  # type: ignore[return-value]
        text = (
            f"{self.config.trainer.entry} returned without session.finish() (leave a Loop by loop.end(), not by break)"
        )
        return Ending("error", fingerprint=text, text=text, cause="error")

    def _consolidate(self) -> None:
        """Behind the run's end: nothing that happens here changes it."""
        if self.config.checkpoint.save_consolidated:
            consolidate.consolidate(self.run_dir, self.config, self._event, lambda: self._insist(self._over))

    def _over(self) -> str | None:
        """Why this driver has no more time."""
        return runs.stop_reason(self.run_dir)

    def _take_over(self) -> None:
        """Where the last driver of this run went down with an attempt, write down how that ended."""
        if self.run.state not in {"running", "holding"} or not self.run.attempt:
            return
        events = [e for e in state.read_lines(self.run_dir / state.EVENTS_FILE) if e.get("attempt") == self.run.attempt]
        kinds = [e["kind"] for e in events]
        if "attempt_started" not in kinds or "attempt_ended" in kinds:
            return
        started = events[kinds.index("attempt_started")]
        cause = "head_lost" if started.get("incarnation", 0) < self.term else "driver_lost"
        last, commit = runs.last_metrics(self.run_dir), store.latest(self.checkpoints)
        committed = commit.step if commit else 0
        step = max(committed, int(last["step"]) if last.get("attempt") == self.run.attempt else 0)
        text = "the head was lost" if cause == "head_lost" else "the driver was lost"
        self.tally = Tally(Ending("fault", cause, text, None, cause, None, step))
        self._event("fault", cause=cause, node=None, rank=None, step=step, reason=text)
        self._event("attempt_ended", how="fault", error=text, cause=cause, rank=None, node=None, step=step,
                    committed=committed)  # fmt: skip

    def _claim(self) -> int:
        """An attempt number that nobody has: making its directory claims it."""
        number = self.run.attempt
        while True:
            number += 1
            if self._insist(lambda: state.claim_dir(state.attempt_dir(self.run_dir, number))):  # noqa: B023
                return number

    def _fence(self, number: int) -> None:
        """From here on no older attempt commits a checkpoint; and if a newer one is there, we are the old one."""

        def fence() -> None:
            state.make_dir(self.checkpoints)
            store.fence(self.checkpoints, self.term, number)

        try:
            self._insist(fence)
        except store.Fenced as error:
            log.error("fenced error=%r", str(error))
            os._exit(runs.DRIVER_FENCED)

    def _insist(self, work: Callable[[], T]) -> T:
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
            time.sleep(pause)
            pause = min(30.0, 2 * pause)

    def _check_fence(self) -> None:
        """End at once when a newer head was elected: its driver writes now."""
        if self.roster.fenced():
            log.error("a newer head was elected: this driver ends, writing nothing more")
            os._exit(runs.DRIVER_FENCED)

    def _tell_drained(self, table: dict[str, policy.Node], on: frozenset[str]) -> None:
        """Tell the head which draining nodes no attempt uses (any more), once each."""
        draining = {name for name, node in table.items() if node.state == "draining"}
        for name in sorted(draining - on - self.left):
            self._request("drained", node=name)
        self.left = draining - on

    def _request(self, kind: str, **values: Any) -> None:
        self._insist(lambda: layout.request(self.cluster_dir, kind, **values))

    def _pin_global_batch(self, workers: int) -> None:
        """The global batch is a constant of the run: fix it at the first attempt, in the resolved config."""
        steps = self.config.step_scheduler
        if steps.global_batch_size is None and self.config.trainer.script is None:
            size = steps.local_batch_size * (steps.grad_acc_steps or 1) * workers // self.together
            config = runs.with_global_batch(self.config, size)
            self._insist(lambda: state.write_text(self.run_dir / layout.CONFIG_FILE, configfile.dump(config)))
            self.config = config
            self._event("global_batch_size", samples=size, workers=workers)

    def _pause(self, seconds: float) -> None:
        """Wait, unless the run is asked to stop."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._insist(lambda: runs.stop_reason(self.run_dir)) is None:
            time.sleep(0.2)

    def _decided(self, what: str, decision: policy.Decision, **fields: Any) -> None:
        self._event("decision", decision=what, reason=decision.reason, setting=decision.setting, **fields)

    def _event(self, kind: str, **fields: Any) -> None:
        log.info("%s %s", kind, " ".join(f"{k}={v!r}" for k, v in fields.items()))
        try:
            state.append_event(self.run_dir, kind, attempt=self.run.attempt, **fields)
        except StateError as error:  # the line stands in our log
            log.error("the event could not be written error=%r", str(error))

    def thread_died(self, thread: str, error: str) -> None:
        """One of this driver's own: the run goes on, but somebody has to know."""
        self._event("thread_died", thread=thread, error=error)

    def _save(self, **changes: Any) -> None:
        self.run = self._insist(lambda: self.run.save(self.run_dir, **changes))


def main() -> int:
    """Entry point of `python -m raylaunch.driver CLUSTER_DIR RUN_DIR`."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    cluster_dir, run_dir = Path(sys.argv[1]), Path(sys.argv[2])
    cluster, run = Cluster.read(cluster_dir), Run.read(run_dir)
    assert cluster is not None and run is not None
    incarnation = int(os.environ.get("RAYLAUNCH_INCARNATION") or cluster.incarnation)
    config = configfile.load_resolved(run_dir / layout.CONFIG_FILE)
    driver = Driver(cluster_dir, run_dir, cluster, config, run, incarnation)
    threads.tell_deaths(driver.thread_died)
    helpers = [process for process in (follow.start(config, run_dir), alerts.start(config, run_dir)) if process]
    ended = driver.drive()
    beside.end(*helpers)
    return 0 if ended in {"finished", "paused"} else 1


if __name__ == "__main__":
    sys.exit(main())
