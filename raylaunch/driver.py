"""The driver: the attempts of one run, one after the other. The only user of Ray Train.

    gather facts → policy.decide → start an attempt (TorchTrainer, fixed size) | hold | finish

Ray Train's own elastic mode waits a minute on a stale reservation and counts every failure alike;
so each attempt is a TorchTrainer of fixed size, and the size and the next move are ours. It runs on
the head, started by the head's agent, and dies with it. What it knows lies in the run directory.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from raylaunch.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    # Ray starts what it needs for a driver while the imports below go on.
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.WARNING)

import ray.train
from ray.exceptions import RayActorError, RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

from raylaunch import configfile, layout, policy, runs, state, worker
from raylaunch.checkpoint import store
from raylaunch.config import Config
from raylaunch.layout import Cluster
from raylaunch.policy import Ending, Facts, Finish, Hold, Start
from raylaunch.raynode import WORKER_RESOURCE
from raylaunch.runs import Run

log = logging.getLogger("raylaunch.driver")

SETTLE_LIMIT = 20.0
"""Seconds to wait until agents and Ray agree on which nodes are alive."""
SETTLE_QUIET = 0.6
"""Seconds that they must agree for: the news of a dead node takes about that long."""

# What a survivor says when somebody else died: never the run's own fault.
_COMMUNICATION = re.compile(
    r"(Connection (closed|reset|refused)|closed by peer|Broken pipe|\bgloo\b|\bNCCL\b|TCPStore|Socket Timeout|"
    r"DistBackendError|DistNetworkError|ECONNRESET)",
    re.IGNORECASE,
)


# Broken hardware is no error of the code, however much it looks like one.
_HARDWARE = re.compile(r"(\bECC\b|unspecified launch failure|busy or unavailable|\bXid\b|CUDA error: hardware)")


@dataclass
class Driver:
    """One run on one cluster, from here to its end."""

    cluster_dir: Path
    run_dir: Path
    cluster: Cluster
    config: Config
    run: Run
    last: Ending | None = None
    same_error: int = 0
    idle_attempts: int = 0
    held_since: float | None = None
    checkpoints: Path = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoints = runs.checkpoint_dir(self.run_dir, self.config)

    def drive(self) -> str:
        """Run attempts until the policy says that it is over; the run's last state."""
        while True:
            facts = self.facts()
            decision = policy.decide(facts, self.config.elastic)
            match decision:
                case Finish():
                    self._decided("finish", decision, state=decision.state)
                    self._save(state=decision.state, reason=decision.reason)
                    self._event(decision.state, reason=decision.reason)
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
                    nodes = facts.nodes
                    if decision.delay:
                        self._pause(decision.delay)
                        nodes = len(self.settled_nodes())  # some may have come or gone meanwhile
                    if runs.stop_reason(self.run_dir) is None and nodes >= (self.config.elastic.min_nodes or 1):
                        self.attempt(nodes * self.cluster.workers_per_node, nodes)

    def facts(self) -> Facts:
        """What the policy needs to know now."""
        return Facts(
            nodes=len(self.settled_nodes()),
            workers_per_node=self.cluster.workers_per_node,
            stop_reason=runs.stop_reason(self.run_dir),
            last=self.last,
            same_error=self.same_error,
            idle_attempts=self.idle_attempts,
            held=time.monotonic() - self.held_since if self.held_since is not None else 0.0,
        )

    def settled_nodes(self) -> set[str]:
        """Nodes that the agents and Ray both hold for alive, once the two agree for a moment.

        The agents know first (their connections break at once); Ray would still place a worker on
        a node that it has not missed yet.
        """
        deadline = time.monotonic() + SETTLE_LIMIT
        agreed: set[str] = set()
        since = time.monotonic()
        quiet = SETTLE_QUIET if self.last is not None and self.last.kind in {"error", "fault"} else 0.0
        while True:
            table = state.read_json(self.cluster_dir / layout.MEMBERS_FILE) or {"nodes": []}
            ours = {str(n["name"]) for n in table["nodes"] if n["state"] == "ready"}
            rays = {str(n["NodeName"]) for n in alive_nodes()}
            both = ours & rays
            if both != agreed:
                agreed, since = both, time.monotonic()
            now = time.monotonic()
            if (ours == rays and both and now - since >= quiet) or now > deadline:
                return agreed
            time.sleep(0.1)

    def attempt(self, workers: int, nodes: int) -> None:
        """One worker group of one size, from its start to its end, which goes into `last`."""
        number = self.run.attempt + 1
        before = store.latest(self.checkpoints)
        self._pin_global_batch(workers)
        state.make_dir(state.attempt_dir(self.run_dir, number))
        self._save(state="running", attempt=number, world_size=workers, nodes=nodes, reason="")
        self._event("attempt_started", workers=workers, nodes=nodes, from_step=before.step if before else 0)
        ending = self._fit(number, workers)
        after = store.latest(self.checkpoints)
        progress = (after.step if after else 0) > (before.step if before else 0)
        same = self.last is not None and ending.fingerprint == self.last.fingerprint
        self.same_error = self.same_error + 1 if same and not progress else 1
        self.idle_attempts = 0 if progress else self.idle_attempts + 1
        self.last = ending
        self._event(
            "attempt_ended", how=ending.kind, error=ending.text, rank=ending.rank, committed=after.step if after else 0
        )

    def _fit(self, number: int, workers: int) -> Ending:
        gpus = any(node["Resources"].get("GPU", 0) for node in alive_nodes())
        trainer = TorchTrainer(
            worker.main,
            train_loop_config={
                "run_dir": str(self.run_dir),
                "attempt": number,
                "global_batch_size": self.config.step_scheduler.global_batch_size,
            },
            torch_config=TorchConfig(timeout_s=self.config.distributed.comm_timeout),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus,
                resources_per_worker={WORKER_RESOURCE: 1, **({"GPU": 1} if gpus else {})},
            ),
            run_config=RunConfig(  # type: ignore[arg-type]  # the V1 class of that name
                name=f"{self.run.name}-{number:04d}",
                storage_path=str(self.run_dir / "ray"),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, RayError) as error:
            log.exception("attempt failed attempt=%d", number)
            return classify(error)
        outcome = state.read_json(state.attempt_dir(self.run_dir, number) / "outcome.json")
        if outcome is None:
            text = f"{self.config.trainer} returned without session.finish()"
            return Ending("error", fingerprint=text, text=text)
        return Ending("finished" if outcome["outcome"] == "finished" else "stopped", text=f"step {outcome['step']}")

    def _pin_global_batch(self, workers: int) -> None:
        """The global batch is a constant of the run: fix it at the first attempt, in the resolved config."""
        steps = self.config.step_scheduler
        if steps.global_batch_size is None:
            size = steps.local_batch_size * (steps.grad_acc_steps or 1) * workers
            self.config = runs.with_global_batch(self.config, size)
            state.write_text(self.run_dir / layout.CONFIG_FILE, configfile.dump(self.config))
            self._event("global_batch_size", samples=size, workers=workers)

    def _pause(self, seconds: float) -> None:
        """Wait, unless the run is asked to stop."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and runs.stop_reason(self.run_dir) is None:
            time.sleep(0.2)

    def _decided(self, what: str, decision: policy.Decision, **fields: Any) -> None:
        self._event("decision", decision=what, reason=decision.reason, setting=decision.setting, **fields)

    def _event(self, kind: str, **fields: Any) -> None:
        log.info("%s %s", kind, " ".join(f"{k}={v!r}" for k, v in fields.items()))
        state.append_event(self.run_dir, kind, attempt=self.run.attempt, **fields)

    def _save(self, **changes: Any) -> None:
        self.run = self.run.save(self.run_dir, **changes)


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes that Ray holds for alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def classify(error: Exception) -> Ending:
    """Whether an attempt ended by a fault of the machines or by an error of the code.

    A lost actor or node anywhere makes it a fault: what the others then say is only the cascade.
    Otherwise the first error (lowest rank) that is not about a connection is the cause.
    """
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return Ending("fault", fingerprint=type(error).__name__, text=_last_line(error))
    for rank, failure in sorted(failures.items()):
        inner = getattr(failure, "health_check_failure", failure)
        if isinstance(inner, RayActorError):
            return Ending(
                "fault", fingerprint=f"lost rank {rank}", text=f"lost rank {rank}: {_last_line(inner)}", rank=rank
            )
    for rank, failure in sorted(failures.items()):
        text = _last_line(failure)
        if _HARDWARE.search(str(failure)):
            return Ending("fault", fingerprint=f"hardware of rank {rank}", text=f"rank {rank}: {text}", rank=rank)
        if not _COMMUNICATION.search(str(failure)):
            print_ = re.sub(r"0x[0-9a-f]+|\d+", "#", f"{type(failure).__name__}: {text}")
            return Ending("error", fingerprint=print_, text=f"rank {rank}: {type(failure).__name__}: {text}", rank=rank)
    rank, failure = min(failures.items())
    return Ending("fault", fingerprint="communication", text=f"rank {rank}: {_last_line(failure)}", rank=rank)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:500] if lines else type(error).__name__


def main() -> int:
    """Entry point of `python -m raylaunch.driver CLUSTER_DIR RUN_DIR`."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    cluster_dir, run_dir = Path(sys.argv[1]), Path(sys.argv[2])
    cluster, run = Cluster.read(cluster_dir), Run.read(run_dir)
    assert cluster is not None and run is not None
    driver = Driver(cluster_dir, run_dir, cluster, configfile.load_resolved(run_dir / layout.CONFIG_FILE), run)
    return 0 if driver.drive() == "finished" else 1


if __name__ == "__main__":
    sys.exit(main())
