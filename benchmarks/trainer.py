"""The trainer beside its peers, as ratios: the loop, the reading of data, its preparation, the saves.

    python -m benchmarks.trainer [--rounds 5] [loop data prepare saves]

loop     tokens/s of `trainers.fsdp` under raylaunch, under torchrun, and of a minimal hand-written FSDP2 loop; on
         a worker a core, and on one worker with a core to spare
data     tokens/s of the loader against a plain memory-mapped numpy reader
prepare  tokens/s of `data prepare` with 1 and 2 workers against a loop over `tokenizers` in one process
saves    seconds that a step is held up by an asynchronous save, against a synchronous one

Ways take turns within a round, every other round backwards; printed are the medians and the ratios of pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from raylaunch.state import files

BIN = Path(sys.executable).parent
LIMIT = 300.0
WARM = 10
"""Steps that are not counted: caches fill, Ray's start-up ends."""

CONFIG: dict[str, dict[str, Any]] = {
    "model": {"size": "1M"},
    "data": {"seq_len": 256},
    "step_scheduler": {
        "max_steps": 60, "global_batch_size": 16, "local_batch_size": 8, "ckpt_every_steps": 60, "val_every_steps": 0,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["loop", "data", "prepare", "saves"])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raylaunch-bench-") as name:
        for what in given.what or ["loop", "data", "prepare", "saves"]:
            directory = Path(name) / what
            directory.mkdir()
            print(f"{what}:", flush=True)
            globals()[what](directory, given.rounds)


def take_turns(ways: dict[str, Callable[[], float]], rounds: int, unit: str) -> dict[str, list[float]]:
    """Each way once a round; what each gave, printed with the ratios to the first."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(ways[name]())
    base = next(iter(found.values()))
    for name, values in found.items():
        ratios = [b / a for a, b in zip(base, values, strict=True)]
        print(
            f"  {name:34} {statistics.median(values):12,.4g} {unit}   this / first: {statistics.median(ratios):.3f}"
            f" ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )
    return found


# -- the loop ---------------------------------------------------------------------------------------


def loop(directory: Path, rounds: int) -> None:
    """Workers on all of this machine's two cores, and on one of them: daemons have the other one to themselves."""
    tokens = [path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    np.frombuffer(b"".join(tokens), np.uint8).astype(np.uint16).tofile(directory / "tokens.bin")
    for workers in (2, 1):
        print(f"  {workers} workers" if workers > 1 else "  one worker, and a core to spare")
        part = directory / str(workers)
        part.mkdir()
        _loop(part, workers, rounds, directory / "tokens.bin")


def _loop(directory: Path, workers: int, rounds: int, data: Path) -> None:
    env = {**os.environ, "RAYLAUNCH_STATE_DIR": str(directory), "OMP_NUM_THREADS": "1"}
    config = directory / "train.yaml"
    config.write_text(json.dumps(CONFIG))  # JSON is YAML
    up = ["up", "--name", "bench", "--backend", "local", "--nodes", str(workers)]
    subprocess.run([BIN / "raylaunch", *up], env=env, check=True, capture_output=True, timeout=LIMIT)
    count = iter(range(1000))

    def ours() -> float:
        run = f"run-{next(count)}"
        command = [BIN / "raylaunch", "train", config, "--cluster", "bench", "--run", run]
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=LIMIT)
        return speed(files.run_dir(directory, run))

    def torchrun(module: str) -> Callable[[], float]:
        def measure() -> float:
            run = directory / f"{module.rpartition('.')[2]}-{next(count)}"
            run.mkdir()
            (run / "config.json").write_text(json.dumps(CONFIG))
            (run / "tokens.bin").symlink_to(data)
            command = [BIN / "torchrun", "--standalone", "--nproc-per-node", str(workers), "-m", module, str(run)]
            subprocess.run(command, env=env, check=True, capture_output=True, timeout=LIMIT)
            return speed(run)

        return measure

    try:
        ways = {
            "a minimal FSDP2 loop under torchrun": torchrun("benchmarks.bare_fsdp"),
            "trainers.fsdp under torchrun": torchrun("benchmarks.recovery_worker"),
            "trainers.fsdp under raylaunch": ours,
        }
        found = take_turns(ways, rounds, "tokens/s")
        _, plain, under = found.values()
        ratios = [a / b for a, b in zip(under, plain, strict=True)]
        shown = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"  the same loop, under raylaunch / under torchrun: {shown}", flush=True)
    finally:
        subprocess.run([BIN / "raylaunch", "down", "bench"], env=env, check=True, capture_output=True, timeout=LIMIT)


def speed(run: Path) -> float:
    """Tokens a second after the first steps."""
    times = {row["step"]: row["time"] for row in files.read_lines(run / files.METRICS_FILE) if "loss" in row}
    last = CONFIG["step_scheduler"]["max_steps"] - 1  # the last one's line waits for nothing, or for a save
    tokens = CONFIG["step_scheduler"]["global_batch_size"] * CONFIG["data"]["seq_len"]
    return float((last - WARM) * tokens / (times[last] - times[WARM]))


# -- data -------------------------------------------------------------------------------------------


def data(directory: Path, rounds: int) -> None:
    """Micro-batches of 8 samples from 100 million tokens, in the trainer's order and in numpy's."""
    from raylaunch.data import dataset, sample_order
    from raylaunch.trainers.batches import Loader, Plan
    from raylaunch.trainers.datasets import Data, Source, sample_count

    batch, steps, count = 8, 1000, 100_000_000
    numbers = np.random.default_rng(0).integers(0, 256, count, dtype=np.uint16)
    numbers.tofile(directory / "tokens.bin")
    writer = dataset.ShardWriter(directory, "shard-00000", np.uint16, (dataset.TOKENS,))
    writer.add(numbers)
    shard = writer.close("bench", 0)
    row = dataset.row(directory, [shard])

    def compare(length: int) -> None:
        samples = sample_count(row.count, length)
        everything = Data((Source(row, None, samples, 0),), (), sample_order.quotas([1.0]), 256, False, {})

        def ours(ahead: bool) -> Callable[[], float]:
            def measure() -> float:
                loader = Loader(everything, Plan(length, 0, batch, batch, 0, 1), pin=False)
                read = loader.training if ahead else loader._training
                read(0)
                began = time.perf_counter()
                for step in range(1, steps + 1):
                    read(step)
                seconds = time.perf_counter() - began
                loader.close()
                return steps * batch * length / seconds

            return measure

        def numpy() -> float:
            tokens = np.memmap(directory / "tokens.bin", dtype=np.uint16, mode="r")
            shuffled = np.random.default_rng(0).permutation(samples)
            began = time.perf_counter()
            for step in range(steps):
                picked = shuffled[step * batch % samples :][:batch]
                rows = np.stack([tokens[i * length : i * length + length + 1] for i in picked]).astype(np.int64)
                rows[:, :-1].copy(), rows[:, 1:].copy()
            return steps * batch * length / (time.perf_counter() - began)

        print(f"  samples of {length} tokens")
        ways = {"numpy, memory-mapped": numpy, "the loader": ours(False), "the same, one step ahead": ours(True)}
        take_turns(ways, rounds, "tokens/s")

    for length in (2048, 8192):
        compare(length)


def prepare(directory: Path, rounds: int) -> None:
    """60 MB of JSON lines, with a byte-pair tokenizer that was trained on them."""
    import tokenizers

    from raylaunch.data.prepare import PrepareRequest
    from raylaunch.data.prepare import prepare as run

    texts = [path.read_text(errors="replace") for path in sorted(Path(os.__file__).parent.rglob("*.py"))]
    texts = [text for text in texts if text][:4000]
    inputs, size = directory / "in.jsonl", 0
    with inputs.open("w") as out:
        while size < 60 << 20:
            for text in texts:
                size += out.write(json.dumps({"text": text}) + "\n")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts[:300], vocab_size=8000, special_tokens=["<|endoftext|>"])
    made.save(str(directory / "tokenizer.json"))

    def ours(workers: int) -> Callable[[], float]:
        def measure() -> float:
            out = directory / "out"
            shutil.rmtree(out, ignore_errors=True)
            began = time.perf_counter()
            request = PrepareRequest([str(inputs)], out, str(directory / "tokenizer.json"), piece_bytes=4 << 20)
            manifest = run(request, workers, lambda _: None)
            return manifest.tokens / (time.perf_counter() - began)

        return measure

    def plain() -> float:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokens, began = 0, time.perf_counter()
        with inputs.open() as lines, (directory / "plain.bin").open("wb") as out:
            for line in lines:
                ids = np.array(tokenizer.encode(json.loads(line)["text"]).ids, np.uint16)
                out.write(ids.tobytes())
                tokens += len(ids) + 1
        return tokens / (time.perf_counter() - began)

    ways = {"tokenizers, one process": plain, "data prepare --workers 1": ours(1), "data prepare --workers 2": ours(2)}
    take_turns(ways, rounds, "tokens/s")


# -- saves ------------------------------------------------------------------------------------------


def saves(directory: Path, rounds: int) -> None:
    """A 10M model (about 120 MB with its optimizer), a save every 10 steps: what a step waits for it, on two workers;
    and what the steps beside a save lose, on one worker with a core to spare."""
    count = iter(range(1000))

    def train(workers: int, every: int, beside: str | None) -> list[dict[str, Any]]:
        run = directory / f"run-{next(count)}"
        run.mkdir()
        config = {
            "model": {"size": "10M"},
            "data": {"seq_len": 64},
            "step_scheduler": {**CONFIG["step_scheduler"], "max_steps": 41, "global_batch_size": 2 * workers,
                               "local_batch_size": 2, "ckpt_every_steps": every},
            "checkpoint": {"async_save": beside is not None, "async_checkpointer_type": beside or "thread"},
        }  # fmt: skip
        (run / "config.json").write_text(json.dumps(config))
        command = [BIN / "torchrun", "--standalone", "--nproc-per-node", str(workers), "-m"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command += ["benchmarks.recovery_worker", str(run)]
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=LIMIT)
        rows = files.read_lines(run / files.METRICS_FILE)
        shutil.rmtree(run)
        return [row for row in rows if "loss" in row]

    def stall(beside: str | None) -> Callable[[], float]:
        return lambda: statistics.median(row["save_stall"] for row in train(2, 10, beside) if "save_stall" in row)

    def pace(every: int, beside: str) -> Callable[[], float]:
        """Tokens/s of the steps after the second save has begun (a process begins with the first); what it stalls is
        not in it."""
        return lambda: statistics.mean(
            row["tokens_per_s"] for row in train(1, every, beside) if 21 <= row["step"] <= 40
        )

    take_turns(
        {"synchronous": stall(None), "in a thread": stall("thread"), "in a process": stall("process")}, rounds, "s"
    )
    paces = {
        "steps without saves": pace(1000, "thread"),
        "steps beside a save in a thread": pace(10, "thread"),
        "steps beside a save in a process": pace(10, "process"),
    }
    take_turns(paces, rounds, "tokens/s")


if __name__ == "__main__":
    main()
