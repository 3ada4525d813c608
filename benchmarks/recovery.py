"""Recovery beside its peers: from a node's SIGKILL to the first new step on the nodes that are left.

    python -m benchmarks.recovery [--rounds 3] [--only raylaunch,ray,torchrun,torchrun-tuned]     (as root)

In one run, in turn, on sandboxes of four nodes (a fresh one each time, half a second): (a) raylaunch;
(b) Ray Train's elastic mode as it comes; (c) `torchrun --nnodes=2:4` as it comes; (d) torchrun at its
best tuning. All four run `trainers.fsdp.train` over gloo with the same configuration. In mid-training
node4 gets SIGKILL (never the head, the rendezvous host or the batch host); time runs until the first
step of a smaller world is in metrics.jsonl. Printed: each recovery with its phases, and a table of the
medians, with their ratios to (b). Machines are noisy: quote the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raylaunch.state import event_log, files
from raylaunch.state.records import Head
from raylaunch.tools.sandbox import Sandbox
from raylaunch.tools.sandbox.procs import wait_for

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NODES, CPUS = 4, 1
START_LIMIT = 150.0
"""Seconds until a way trains on all nodes."""
RECOVERY_LIMIT = 150.0
"""Seconds after which a run counts as not recovered."""
EVERY = 20
"""Steps between checkpoints. The kill comes half-way between two."""
KILL_AT = 3 * EVERY + EVERY // 2

CONFIG: dict[str, dict[str, Any]] = {
    "model": {"size": "tiny"},
    "data": {"seq_len": 128},
    "step_scheduler": {
        "max_steps": 1_000_000, "global_batch_size": 12, "local_batch_size": 2,
        "ckpt_every_steps": EVERY, "val_every_steps": 0,
    },
}  # fmt: skip

PHASES = {
    "broken": ("broken",),
    "noticed": ("node_lost", "fault"),
    "stopped": ("attempt_aborted",),
    "started": ("attempt_started",),
    "entered": ("entered",),
    "connected": ("workers_connected",),
    "built": ("model_built",),
    "restored": ("resumed",),
}
"""A phase's end → the kinds of event that say so: a survivor's collective fails; the framework knows; the
old workers are gone; it starts new ones; they have come to the user's code; the process group is there;
so is the model; the checkpoint is in it. Each way has those of its events that can be had."""
FIRST = ("broken", "noticed", "stopped")
"""Of these the earliest event counts, of the others the latest before the first new step."""

# One srun a node: when a node dies, Slurm ends the steps that use it and leaves the others alone.
JOB = """#!/bin/bash
#SBATCH --nodes={nodes} --ntasks-per-node=1 --cpus-per-task={cpus} --no-kill --no-requeue --output={out}/job.out
names=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${{names[0]}}
address=$(getent hosts "$head" | cut -d ' ' -f 1)
on() {{
    srun --nodes=1 --ntasks=1 --cpus-per-task={cpus} --overlap --no-kill --kill-on-bad-exit=0 \\
        --nodelist="$1" --output={out}/"$1-%s.out" "${{@:2}}"
}}
{body}
wait
"""

RAY = """
on "$head" {bin}/ray start --head --node-ip-address="$address" --port=6379 --num-cpus=1 --block &
until (exec 3<> "/dev/tcp/$address/6379") 2> /dev/null; do sleep 0.2; done
for name in "${{names[@]:1}}"; do
    on "$name" {bin}/ray start --address="$address:6379" --num-cpus=1 --block &
done
RAY_ADDRESS="$address:6379" on "$head" {python} -m benchmarks.recovery_ray {run} {nodes}
"""

TORCHRUN = """
{settings}
for name in "${{names[@]}}"; do
    on "$name" {bin}/torchrun --nnodes=2:{nodes} --nproc-per-node=1 --max-restarts=100 --rdzv-id=bench \\
        --rdzv-backend=c10d --rdzv-endpoint="$head:29400" {options} -m benchmarks.recovery_worker {run} &
done
"""
TUNED = "--rdzv-conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2,read_timeout=5"


@dataclass
class Recovery:
    """What one kill cost. `seconds` None: no step within RECOVERY_LIMIT."""

    seconds: float | None
    lost: int = 0
    """Steps that were done and had to be done again."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds from the kill to the end of each phase."""


Start = Callable[[Sandbox, Path, Mapping[str, str]], Path]
"""Begin a training; returns its run directory."""


def raylaunch(sandbox: Sandbox, out: Path, env: Mapping[str, str]) -> Path:
    config = out / "bench.yaml"
    config.write_text(json.dumps(configuration(out)))  # JSON is YAML

    def call(*words: str) -> None:
        line = [str(BIN / "raylaunch"), *words]
        done = subprocess.run(line, env=dict(env), capture_output=True, text=True, timeout=START_LIMIT, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")

    call("up", "--nodes", str(NODES), "--cpus-per-task", str(CPUS), "--timeout", str(START_LIMIT))
    call("train", str(config), "--detach")
    head = Head.read(files.cluster_dir(sandbox.layout.state, "main"))
    assert head is not None and head.node != sandbox.nodes[-1], head
    return files.run_dir(sandbox.layout.state, "bench")


def by_hand(body: str, **values: str) -> Start:
    """A batch job that runs `body`."""

    def start(sandbox: Sandbox, out: Path, env: Mapping[str, str]) -> Path:
        run = files.make_dir(out / "run")
        (run / "config.json").write_text(json.dumps(configuration(out)))
        numbers = {"nodes": NODES, "cpus": CPUS, "out": out}
        filled = body.format(bin=BIN, python=sys.executable, run=run, **numbers, **values)
        script = JOB.format(body=filled, **numbers)
        subprocess.run(["sbatch"], input=script, text=True, env=dict(env), check=True, capture_output=True)
        return run

    return start


WAYS: dict[str, tuple[str, Start]] = {
    "raylaunch": ("raylaunch", raylaunch),
    "ray": ("Ray Train elastic, as it comes", by_hand(RAY)),
    "torchrun": ("torchrun, as it comes", by_hand(TORCHRUN, settings="", options="")),
    "torchrun-tuned": (
        "torchrun, best tuning",
        by_hand(TORCHRUN, settings="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", options=TUNED),
    ),
}


def configuration(out: Path) -> dict[str, Any]:
    """CONFIG, with a text to learn that is always the same."""
    text = out / "text.txt"
    source = random.Random(0)
    words = ["".join(source.choice("abcdefghij") for _ in range(source.randint(2, 8))) for _ in range(200)]
    text.write_text(" ".join(source.choice(words) for _ in range(50_000)))
    return {**CONFIG, "data": {**CONFIG["data"], "text": [str(text)]}}


def measure(start: Start, logs: Path | None) -> Recovery:
    """One training, one kill, on a sandbox of its own."""
    with sandbox_of_ours() as sandbox:
        out = files.make_dir(sandbox.layout.state / "bench")
        try:
            return kill_in_training(sandbox, start(sandbox, out, environment(sandbox)))
        finally:
            if logs is not None:
                shutil.copytree(sandbox.layout.state, logs, ignore=shutil.ignore_patterns("token"), symlinks=True)


def environment(sandbox: Sandbox) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "RAY", "OMP_"))}
    path = f"{BIN}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return {**kept, **sandbox.env(), "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(CPUS)}


@contextlib.contextmanager
def sandbox_of_ours() -> Iterator[Sandbox]:
    """Down whatever happens; with it go its nodes' processes and their private /tmp."""
    sandbox = Sandbox.up(f"recovery{os.getpid()}", nodes=NODES, cpus=CPUS)
    try:
        yield sandbox
    finally:
        sandbox.down()


def kill_in_training(sandbox: Sandbox, run: Path) -> Recovery:
    """Wait until it trains on all nodes, kill the last one, wait for a step of fewer."""
    steps = files.LineReader(run / files.METRICS_FILE)
    seen: list[dict[str, Any]] = []

    def first(wanted: Callable[[dict[str, Any]], bool]) -> bool:
        seen.extend(row for row in steps.read() if "loss" in row)
        return any(wanted(row) for row in seen)

    def trains(row: dict[str, Any]) -> bool:
        return bool(row["world_size"] == NODES and row["step"] >= KILL_AT)

    wait_for(f"step {KILL_AT} on {NODES} nodes", lambda: first(trains), START_LIMIT, lambda: str(seen[-1:]))
    began = time.time()
    sandbox.kill(sandbox.nodes[-1])

    def goes_on(row: dict[str, Any]) -> bool:
        return bool(row["time"] > began and row["world_size"] < NODES)

    deadline = time.monotonic() + RECOVERY_LIMIT
    while not (recovered := first(goes_on)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if not recovered:
        return Recovery(None, phases=profile(sandbox, run, began, time.time()))
    row = next(row for row in seen if goes_on(row))
    done = max(row["step"] for row in seen if row["world_size"] == NODES)
    phases = {**profile(sandbox, run, began, row["time"]), "step": row["time"] - began}
    return Recovery(row["time"] - began, done - row["step"] + 1, phases)


def profile(sandbox: Sandbox, run: Path, began: float, ended: float) -> dict[str, float]:
    """Seconds from `began` to the end of each phase that left an event before `ended`."""
    cluster = files.cluster_dir(sandbox.layout.state, "main")  # there for raylaunch alone
    events = [e for d in (run, cluster) for e in event_log.read_all(d)]
    phases = {}
    for name, kinds in PHASES.items():
        times = [e["time"] - began for e in events if e["kind"] in kinds and began <= e["time"] <= ended]
        if times:
            phases[name] = min(times) if name in FIRST else max(times)
    return phases


def told(recovery: Recovery) -> str:
    phases = "  ".join(f"{name} {seconds:.2f}" for name, seconds in recovery.phases.items())
    if recovery.seconds is None:
        return f"no recovery within {RECOVERY_LIMIT:g} s   ({phases})"
    return f"{recovery.seconds:7.2f} s   ({phases}; {recovery.lost} steps lost)"


def summary(results: Mapping[str, list[Recovery]]) -> list[str]:
    """A Markdown table of medians, a row a way; the ratio is to stock Ray Train."""
    names = (*PHASES, "step")
    lines = [f"| way | recovered | seconds | ratio | {' | '.join(names)} |", "| --- " * (4 + len(names)) + "|"]
    medians = {way: middle([r.seconds for r in rs if r.seconds is not None]) for way, rs in results.items()}
    stock = medians.get("ray")
    for way, recoveries in results.items():
        good = [r for r in recoveries if r.seconds is not None]
        median = medians[way]
        cells = [WAYS[way][0], f"{len(good)} of {len(recoveries)}", "" if median is None else f"{median:.1f}"]
        cells.append("" if median is None or stock is None else f"{median / stock:.2f}")
        ends = (middle([r.phases[name] for r in good if name in r.phases]) for name in names)
        cells += ["" if end is None else f"{end:.1f}" for end in ends]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def middle(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(WAYS), help="which ways, separated by commas")
    parser.add_argument("--logs", type=Path, help="copy each state directory here, with all logs")
    given = parser.parse_args()
    ways = given.only.split(",")
    if unknown := set(ways) - WAYS.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: the ways are {', '.join(WAYS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the sandbox goes down
    results: dict[str, list[Recovery]] = {way: [] for way in ways}
    try:
        for number in range(given.rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                logs = given.logs / f"{number + 1}-{way}" if given.logs else None
                results[way].append(measure(WAYS[way][1], logs))
                print(f"round {number + 1}  {WAYS[way][0]:32} {told(results[way][-1])}", flush=True)
    finally:  # what was measured before something broke is worth its minutes
        print("\n".join(summary(results)))
        print(json.dumps({way: [asdict(r) for r in recoveries] for way, recoveries in results.items()}))


if __name__ == "__main__":
    main()
