"""One worker process of the trainer's tests: stays alive and runs the cases it is told to.

The test writes one JSON line per case to stdin (see `test_trainer.Workers`) and reads one line back
when the case is over. Processes are reused because importing torch takes seconds. A case names its
world; a process whose rank lies outside it answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raylaunch.config import Config
from raylaunch.errors import RaylaunchError
from raylaunch.session import Session
from trainers.fsdp import train


def run_case(case: dict[str, Any], rank: int) -> None:
    torch.manual_seed(0)
    run_dir = Path(case["run_dir"])
    config = Config.model_validate(case["config"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{case['rendezvous']}",
        rank=rank,
        world_size=case["world_size"],
        timeout=timedelta(seconds=60),
    )
    session = Session(
        run="test",
        run_dir=run_dir,
        checkpoint_dir=run_dir / "checkpoints",
        attempt=case["attempt"],
        rank=rank,
        world_size=case["world_size"],
        local_rank=rank,
        local_world_size=case["world_size"],
        node="here",
        device="cpu",
        global_batch_size=case["global_batch_size"],
    )
    session.start()
    try:
        if case.get("stop"):
            session._stop.set()
        train(config, session)
    finally:
        session.close()
        dist.destroy_process_group()


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.use_deterministic_algorithms(True)
    for line in sys.stdin:
        case = json.loads(line)
        answer = {"error": ""}
        if rank < case["world_size"]:
            try:
                run_case(case, rank)
            except RaylaunchError as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
