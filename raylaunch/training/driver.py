"""The driver of one run: a process on the head, started by its agent, which dies with it.

    python -m raylaunch.training.driver CLUSTER_DIR RUN_DIR     in the environment of a head: RAY_ADDRESS, RAYLAUNCH_INCARNATION

Connects to Ray, turns the training loop (`training_loop`) to the run's end, with the processes beside it. Where a newer
head was elected it ends at once (exit code 75). The only place where `training_loop` meets Ray Train (`attempt`).
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from raylaunch.host.processes import die_with_parent

log = logging.getLogger("raylaunch.driver")


def main(cluster_dir: Path, run_dir: Path) -> int:
    """Drive it; 0 when it is finished, or paused for another allocation."""
    from raylaunch.config import loader
    from raylaunch.host import sidecar, threads
    from raylaunch.state import records, runs
    from raylaunch.state.records import Cluster
    from raylaunch.state.runs import Run
    from raylaunch.training import attempt
    from raylaunch.training.training_loop import NewerHead, TrainingLoop

    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    cluster, run = Cluster.read(cluster_dir), Run.read(run_dir)
    assert cluster is not None and run is not None
    incarnation = int(os.environ.get("RAYLAUNCH_INCARNATION") or cluster.incarnation)
    config = loader.load_resolved(run_dir / records.CONFIG_FILE)
    driver = TrainingLoop(cluster_dir, run_dir, cluster, config, run, attempt.ConnectedRay(), incarnation)
    threads.on_death(driver.thread_died)
    helpers = [
        sidecar.start(module, run_dir)
        for module, wanted in ((sidecar.TRACKERS, config.trackers), (sidecar.ALERTS, config.alerts.sinks)) if wanted
    ]  # fmt: skip
    try:
        ended = driver.drive()
    except NewerHead as error:
        log.error("this driver exits and writes nothing: %s", error)
        os._exit(runs.DRIVER_FENCED)
    sidecar.end(*helpers)
    return 0 if ended in {"finished", "paused"} else 1


def connect() -> None:
    """Ray starts what it needs for a driver while `main` imports the rest."""
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.WARNING)


if __name__ == "__main__":
    die_with_parent()
    connect()
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
