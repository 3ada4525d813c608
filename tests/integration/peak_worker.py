"""One worker process of the memory model's test: trains the cases it is told to, and says the most tensor bytes there were.

Every allocation and release of torch's CPU allocator is an event of its profiler; summed up they are the bytes of all
tensors at each moment, temporary ones inside of operations included. What is counted are the steps, not the making of the model
and not the save at the end. One JSON line a case comes in, one goes out: of each step the bytes at its beginning and the most.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.profiler import ProfilerActivity, profile, record_function

from raylaunch.config.schema import Config
from raylaunch.trainers import fsdp, parallel
from raylaunch.training.worker.session import Session


class OneThread(dist.ProcessGroupGloo):
    """gloo with one thread instead of two."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._threads = [dist.ProcessGroupGloo.create_default_device()], 1
        options._timeout = timeout
        super().__init__(store, rank, size, options)


def held(exchange: Callable[..., Any]) -> Callable[..., None]:
    """An exchange of FSDP's that this thread lets go of last. The profiler does not see what gloo's thread releases:
    on a busy machine that would be there for ever. Another, small exchange says that gloo's thread has gone on."""

    def call(*args: Any, group: dist.ProcessGroup, async_op: bool = False, **more: Any) -> None:
        work = exchange(*args, group=group, async_op=True, **more)
        work.wait()
        dist.all_reduce(torch.zeros(1), group=group)
        del work

    return call


class Marked(Session):
    """Its phases are events of the profiler."""

    def progress(self, step: int, phase: str = "step") -> None:
        with record_function(f"phase {phase}"):
            pass


def run_case(case: dict[str, Any], rank: int) -> list[tuple[int, int]]:
    directory, world = Path(case["directory"]), case["world"]
    parallel.GATHERED_BYTES = case["gathered_bytes"]
    rendezvous = f"file://{case['rendezvous']}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    config = Config.model_validate(case["config"])
    batch = config.step_scheduler.global_batch_size
    assert batch is not None
    session = Marked(
        run="test", run_dir=directory, checkpoint_dir=directory / "checkpoints", attempt=1, rank=rank, world_size=world,
        local_rank=rank, local_world_size=world, node="here", device="cpu", global_batch_size=batch,
    )  # fmt: skip
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            fsdp.train(config, session)
    finally:
        session.close()
        dist.destroy_process_group()
    return peaks(seen)


def peaks(seen: Any) -> list[tuple[int, int]]:
    """Of each step the bytes at its beginning and the most within it, from the profiler's events in their order."""
    events = [
        (event.start_ns(), event.nbytes() if event.name() == "[memory]" else 0, event.name())
        for event in seen.profiler.kineto_results.events()
        if event.name() == "[memory]" or event.name().startswith("phase ")
    ]
    found: list[tuple[int, int]] = []
    live, inside = 0, False
    for _, size, name in sorted(events, key=lambda event: event[0]):
        live += size
        if name.startswith("phase "):
            inside = name in {"phase step", "phase sync"}
            found += [(live, live)] if name == "phase step" else []
        elif inside:
            begin, most = found[-1]
            found[-1] = begin, max(most, live)
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # a pipe to themselves: the profiler prints
    os.dup2(2, 1)
    torch.set_num_threads(1)
    distributed_c10d.ProcessGroupGloo = OneThread  # type: ignore[misc]
    dist.all_gather_single, dist.reduce_scatter_single = held(dist.all_gather_single), held(dist.reduce_scatter_single)
    rank = int(os.environ["RANK"])
    for line in sys.stdin:
        case = json.loads(line)
        answer: dict[str, Any] = {}
        if rank < case["world"]:
            try:
                answer = {"peaks": run_case(case, rank)}
            except Exception as error:  # noqa: BLE001  the test looks at it
                answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
