"""The workers of the trainer's tests: this process imports torch once, and forks one process per rank for each case.

`attempts.Workers` writes one JSON line per case to stdin and reads one line back when the case is over: the error of
each rank. A case's processes are fresh, so that nothing of torch's caches, random numbers or patches outlives it.
Faults that a case may ask for are in the `arrange_…` functions.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from raylaunch.checkpoint import checksums, store
from raylaunch.config.schema import Config
from raylaunch.trainers import fsdp
from raylaunch.trainers.batches import Loader
from raylaunch.trainers.decoder import FeedForward
from raylaunch.training.worker.session import AT_COMMIT, NOW, Session


def arrange_faults(case: dict[str, Any], session: Session) -> None:
    """What the case asks for."""
    arrange_stops(case, session)
    arrange_saves(case, session)
    arrange_numbers(case, session)
    if "patience" in case:
        fsdp.PATIENCE_AT_END = fsdp.PATIENCE_AT_STOP = case["patience"]
    if case.get("blind_rank") == session.rank:  # sees an old state of the shared file system at its first look
        looks, check = itertools.count(), checksums.check

        def see(commit: store.Commit, names: Iterable[str]) -> store.InvalidCheckpoint | None:
            if next(looks) == 0:
                return store.InvalidCheckpoint(commit.path, commit.step, "__0_0.distcp", "missing")
            return check(commit, names)

        checksums.check = see  # type: ignore[assignment]


def arrange_stops(case: dict[str, Any], session: Session) -> None:
    """`stop_at` / `resize_at`: a stop at once / at the next commit is asked for during that step of the attempt,
    and `resize_until` withdrawn; `record_progress`: what the session hears of it goes to progress-RANK.jsonl."""
    asked = itertools.count(1)

    def stop_requested() -> int:
        step = next(asked)
        if step >= case.get("stop_at", math.inf):
            return NOW
        return AT_COMMIT if case.get("resize_at", math.inf) <= step < case.get("resize_until", math.inf) else 0

    session.stop_requested = stop_requested  # type: ignore[method-assign]
    if case.get("record_progress"):

        def progress(step: int, phase: str = "step") -> None:
            with (session.run_dir / f"progress-{session.rank}.jsonl").open("a") as out:
                out.write(json.dumps([step, phase]) + "\n")

        session.progress = progress  # type: ignore[method-assign]


def arrange_saves(case: dict[str, Any], session: Session) -> None:
    """`kill_in_save` / `full_in_saves`: rank 1 dies, or finds the disk full, while it writes its part of that
    save (or those) of the attempt; `held_save`: the save whose writes wait until the training has done another step;
    `commit_fails`: commits that rank 0's storage refuses; `fence_in_commit`: the commit just before which somebody newer takes over.

    Of a process that saves beside the worker: `kill_saver_at`: the step in which rank 1's is killed; `fence_at`: the one
    in which somebody newer takes over."""
    saves, commits = itertools.count(1), itertools.count(1)
    write_data, commit = FileSystemWriter.write_data, store.commit

    def faulty_write(*args: Any, **kwargs: Any) -> Any:
        save = next(saves)
        began = session.step
        while save == case.get("held_save") and session.step <= began:
            time.sleep(0.01)
        if session.rank == 1 and save == case.get("kill_in_save"):
            os.kill(os.getpid(), signal.SIGKILL)
        if session.rank == 1 and save in case.get("full_in_saves", ()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_data(*args, **kwargs)

    def faulty_commit(path: Path, **kwargs: Any) -> store.Commit:
        number = next(commits)
        if number in case.get("commit_fails", ()):
            raise store.explanation(path, "commit", OSError(errno.EROFS, os.strerror(errno.EROFS)))
        if number == case.get("fence_in_commit"):
            store.fence(path.parent, session.run_incarnation + 1, 1)
        return commit(path, **kwargs)

    progress = session.progress

    def eventful(step: int, phase: str = "step") -> None:
        if phase == "step" and session.rank == 1 and step == case.get("kill_saver_at"):
            living = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
            savers = [p for p in living if "raylaunch.checkpoint.save_process" in p.cmdline()]
            max(savers, key=psutil.Process.create_time).kill()
        if phase == "step" and session.rank == 0 and step == case.get("fence_at"):
            store.fence(session.checkpoint_dir, session.run_incarnation + 1, 1)
        progress(step, phase)

    if {"kill_saver_at", "fence_at"} & case.keys():
        session.progress = eventful  # type: ignore[method-assign]
    FileSystemWriter.write_data = faulty_write  # type: ignore[method-assign]
    store.commit = faulty_commit  # type: ignore[assignment]


def arrange_numbers(case: dict[str, Any], session: Session) -> None:
    """`nan_at`: steps (from 1) in which rank 1's loss, or with `bad_gradient` only its gradient, is no number;
    `dropout`: the model draws random numbers."""
    at = 0
    training, summed_loss, feed_forward = Loader.training, fsdp.summed_loss, FeedForward.forward

    def noted(loader: Loader, step: int) -> Any:
        nonlocal at
        at = step + 1
        return training(loader, step)

    def spoiled(logits: Any, batch: Any) -> torch.Tensor:
        loss = summed_loss(logits, batch)
        if session.rank == 1 and at in case["nan_at"] and torch.is_grad_enabled():
            if case.get("bad_gradient"):
                loss.register_hook(lambda gradient: gradient * math.inf)
            else:
                loss = loss * math.nan
        return loss

    if case.get("nan_at"):
        Loader.training, fsdp.summed_loss = noted, spoiled  # type: ignore[method-assign]
    if case.get("dropout"):

        def dropping(module: FeedForward, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(feed_forward(module, x), p=0.2)

        FeedForward.forward = dropping  # type: ignore[method-assign]


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
        run_incarnation=case.get("incarnation", 1),
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=case.get("local_world_size", world_size),
        node="here",
        device="cpu",
        global_batch_size=case["global_batch_size"],
    )
    arrange_faults(case, session)
    if "compile_cache" in case:  # torch's own, of this "node"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = case["compile_cache"]
    session.start()
    try:
        fsdp.train(Config.model_validate(case["config"]), session)
        if "compile_cache" in case and rank == 0:
            session.event("compiled_for_test", misses=counters["inductor"]["fxgraph_cache_miss"])
    finally:
        session.close()
        dist.destroy_process_group()


def error_of(case: dict[str, Any], rank: int) -> str:
    try:
        run_case(case, rank)
    except Exception as raised:  # noqa: BLE001  the test looks at it
        return f"{type(raised).__name__}: {raised}"
    return ""


def fork(case: dict[str, Any], rank: int) -> tuple[int, int]:
    """A worker for that rank: its pid, and a file descriptor with its answer."""
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        return pid, reader
    try:
        os.write(writer, json.dumps({"error": error_of(case, rank)}).encode())
    finally:
        os._exit(0)


def answer(pid: int, reader: int, deadline: float) -> str:
    """The error that the worker ends with, "died" without a word of it."""
    with os.fdopen(reader) as words:
        if not select.select([words], [], [], max(0.0, deadline - time.monotonic()))[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "no answer"
        said = words.read()
    os.waitpid(pid, 0)
    error: str = json.loads(said)["error"] if said else "died"
    return error


def main() -> None:
    # Answers have a pipe to themselves: gloo prints to stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.use_deterministic_algorithms(True)
    pyarrow.array([0]).to_numpy()  # imports pandas: here rather than in each worker
    for line in sys.stdin:
        case = json.loads(line)
        workers = [fork(case, rank) for rank in range(case["world_size"])]
        deadline = time.monotonic() + case["limit"]
        answers.write(json.dumps([answer(*worker, deadline) for worker in workers]) + "\n")


if __name__ == "__main__":
    main()
