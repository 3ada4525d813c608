"""Recovery's stock Ray Train: `python -m benchmarks.recovery_ray DIR NODES`, on the head of a Ray cluster.

Ray Train's own elastic mode as it comes: num_workers=(MIN, NODES), failures without limit, every other
setting left alone. Each checkpoint is reported to Ray Train, where it lies already (NO_UPLOAD).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

from benchmarks import recovery_worker
from raylaunch.checkpoint import store
from raylaunch.state import event_log
from raylaunch.training.worker.session import Session

NAME = "elastic"
MIN_WORKERS = 2


class ReportingSession(Session):
    """Tells Ray Train of each checkpoint, when the step after it begins: all workers must call together."""

    saved: int | None = None

    def progress(self, step: int, phase: str = "step") -> None:
        if phase == "save":
            self.saved = step
        elif phase == "step" and self.saved is not None:
            path, self.saved = store.final(self.checkpoint_dir, self.saved), None
            ray.train.report(
                {"step": step}, checkpoint=Checkpoint(str(path)), checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD
            )


class Profile(WorkerGroupCallback):
    """Notes in the run's events what the controller does; changes nothing."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if worker_group_status.errors:
            event_log.write(self.run_dir, "fault", ranks=sorted(worker_group_status.errors))

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        event_log.write(self.run_dir, "attempt_aborted")

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        event_log.write(self.run_dir, "attempt_started", workers=worker_group_context.num_workers)


def loop(spec: dict[str, Any]) -> None:
    """The `train_loop_per_worker`."""
    run_dir = Path(spec["run_dir"])
    recovery_worker.entered(run_dir)
    recovery_worker.work(run_dir, run_dir / "ray" / NAME, ReportingSession)


def main() -> None:
    run_dir, nodes = Path(sys.argv[1]), int(sys.argv[2])
    ray.init(address=os.environ["RAY_ADDRESS"])
    while sum(n["Alive"] for n in ray.nodes()) < nodes:  # type: ignore[no-untyped-call]  # the batch job's time limit bounds it
        time.sleep(0.1)
    TorchTrainer(
        loop,
        train_loop_config={"run_dir": str(run_dir)},
        scaling_config=ScalingConfig(num_workers=(MIN_WORKERS, nodes)),
        run_config=RunConfig(  # type: ignore[arg-type]  # the V1 class of that name
            name=NAME,
            storage_path=str(run_dir / "ray"),
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[Profile(run_dir)],  # type: ignore[list-item]
        ),
    ).fit()


if __name__ == "__main__":
    main()
