"""The training worker of recovery's peers: raylaunch's own trainer, without raylaunch around it.

Run by torchrun as `python -m benchmarks.recovery_worker DIR`, and by `recovery_ray` as a function. The
session is made by hand, so that model, data, optimizer and checkpoints are the same lines of code in
every way that is measured; what is left to the framework is who runs them, when and with whom.
DIR is a run directory with `config.json` in it; events and metrics go there, as in a run of raylaunch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from raylaunch.state import event_log, files

if TYPE_CHECKING:
    from raylaunch.training.worker.session import Session

CONFIG_FILE = "config.json"


def entered(run_dir: Path) -> None:
    """Note that this process has come to the user's code."""
    event_log.write(run_dir, "entered", node=os.uname().nodename)


def work(run_dir: Path, checkpoints: Path, make: type[Session]) -> None:
    """Train in the process group that is there already, from the newest checkpoint until killed."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    number = [len(list((run_dir / "attempts").glob("*"))) + 1 if rank == 0 else 0]
    dist.broadcast_object_list(number, src=0)
    if rank == 0:
        files.make_dir(files.attempt_dir(run_dir, number[0]))
    event_log.write(run_dir, "workers_connected", rank=rank, workers=world, node=os.uname().nodename)

    # Here, as raylaunch does it: the trainer's imports count against what comes after the group.
    from raylaunch.config.schema import Config
    from raylaunch.trainers.fsdp import train

    config = Config.model_validate(json.loads((run_dir / CONFIG_FILE).read_text()))
    samples = config.step_scheduler.global_batch_size
    assert samples is not None
    session = make(
        run=run_dir.name, run_dir=run_dir, checkpoint_dir=checkpoints, attempt=number[0], rank=rank,
        world_size=world, local_rank=0, local_world_size=1, node=os.uname().nodename, device="cpu",
        global_batch_size=samples, cpus=int(os.environ.get("OMP_NUM_THREADS", "1")),
    )  # fmt: skip
    session.start()
    try:
        train(config, session)
    except Exception as error:
        event_log.write(run_dir, "broken", rank=rank, error=f"{type(error).__name__}: {error}"[:300])
        raise
    finally:
        session.close()


def main() -> None:
    """Under torchrun, which has set rank, world size and the store's address in the environment."""
    run_dir = Path(sys.argv[1])
    entered(run_dir)
    import torch.distributed as dist

    from raylaunch.training.worker.session import Session

    dist.init_process_group("gloo")
    work(run_dir, run_dir / "checkpoints", Session)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
