"""One worker process of the trainer's tests: stays alive and runs the cases it is told to.

`test_trainer.Workers` writes one JSON line per case to stdin and reads one line back when the case
is over; processes are reused because importing torch takes seconds. A process whose rank lies outside
the case's world answers at once. Faults that a case may ask for are in `arrange_faults`.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from raylaunch.config import Config
from raylaunch.session import Session
from trainers.fsdp import train

_write_data = FileSystemWriter.write_data


def arrange_faults(case: dict[str, Any], session: Session) -> None:
    """`stop_at`: a stop is asked for during that step of the attempt; `kill_in_save` / `full_in_save`:
    rank 1 dies, or finds the disk full, while it writes its part of that save of the attempt; `slow_save`:
    seconds that every write takes longer."""
    if stop_at := case.get("stop_at"):
        asked = itertools.count(1)
        session.stop_requested = lambda: next(asked) >= stop_at  # type: ignore[method-assign]
    saves = itertools.count(1)

    def write_data(*args: Any, **kwargs: Any) -> Any:
        save = next(saves)
        time.sleep(case.get("slow_save", 0.0))
        if session.rank == 1 and save == case.get("kill_in_save"):
            os.kill(os.getpid(), signal.SIGKILL)
        if session.rank == 1 and save == case.get("full_in_save"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return _write_data(*args, **kwargs)

    FileSystemWriter.write_data = write_data  # type: ignore[method-assign]


def run_case(case: dict[str, Any], rank: int) -> None:
    run_dir, world_size = Path(case["run_dir"]), case["world_size"]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{case['rendezvous']}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=30),
    )
    session = Session(
        run="test",
        run_dir=run_dir,
        checkpoint_dir=run_dir / "checkpoints",
        attempt=case["attempt"],
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        node="here",
        device="cpu",
        global_batch_size=case["global_batch_size"],
    )
    arrange_faults(case, session)
    session.start()
    try:
        train(Config.model_validate(case["config"]), session)
    finally:
        session.close()
        dist.destroy_process_group()


def main() -> None:
    # Answers have a pipe to themselves: gloo prints to stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.use_deterministic_algorithms(True)
    rank = int(os.environ["RANK"])
    for line in sys.stdin:
        case = json.loads(line)
        error = ""
        if rank < case["world_size"]:
            try:
                run_case(case, rank)
            except Exception as raised:  # noqa: BLE001  the test looks at it
                error = f"{type(raised).__name__}: {raised}"
        answers.write(json.dumps({"error": error}) + "\n")


if __name__ == "__main__":
    main()
