"""Bring-up beside its peers: from submission to N Ray nodes ready to run the user's program.

    python -m benchmarks.bringup [--nodes 4] [--rounds 3]      (as root; makes a sandbox of its own)

In one run, in turn: (a) `raylaunch up`; (b) a script in the manner of Ray's documentation for Slurm:
head, 30 s of sleep, then worker after worker with 5 s between; (c) `ray symmetric-run`. For (b) and
(c) "ready" is when their entry point is run, which here only notes the time. Printed: the medians,
the ratios, and the phases of (a). Machines are noisy: quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from raylaunch.state import event_log, files
from raylaunch.tools.sandbox import Sandbox

BIN = Path(sys.executable).parent
LIMIT = 300.0

DOCUMENTATION = """#!/bin/bash
#SBATCH --nodes={nodes} --ntasks-per-node=1 --cpus-per-task=4 --output={out}/docs-%j.out
names=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${{names[0]}}
ip=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address)
srun --nodes=1 --ntasks=1 -c 4 -w "$head" {bin}/ray start --head --node-ip-address="$ip" --port=6379 --num-cpus 4 --block &
sleep 30
for ((i = 1; i < SLURM_JOB_NUM_NODES; i++)); do
    srun --nodes=1 --ntasks=1 -c 4 -w "${{names[$i]}}" {bin}/ray start --address "$ip:6379" --num-cpus 4 --block &
    sleep 5
done
date +%s.%N > {out}/ready
"""

SYMMETRIC = """#!/bin/bash
#SBATCH --nodes={nodes} --ntasks-per-node=1 --cpus-per-task=4 --output={out}/symmetric-%j.out
export PATH={bin}:$PATH  # it calls `ray` itself
names=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
ip=$(srun --nodes=1 --ntasks=1 -w "${{names[0]}}" hostname --ip-address)
srun --nodes={nodes} --ntasks={nodes} -c 4 {bin}/ray symmetric-run --address "$ip:6379" --min-nodes {nodes} --num-cpus 4 -- \
    bash -c 'date +%s.%N > {out}/ready; sleep 3600'
"""


def ours(nodes: int, env: Mapping[str, str], out: Path) -> float:
    """Seconds that `raylaunch up` takes; the phases go into `phases`."""
    began = time.time()
    subprocess.run(
        [BIN / "raylaunch", "up", "--nodes", str(nodes), "--cpus-per-task", "4", "--timeout", str(LIMIT)],
        env=dict(env), check=True, capture_output=True, timeout=LIMIT,
    )  # fmt: skip
    seconds = time.time() - began
    cluster = files.cluster_dir(Path(env["RAYLAUNCH_STATE_DIR"]), "main")
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for event in event_log.read_all(cluster):
        if event["time"] >= began:
            first.setdefault(event["kind"], event["time"] - began)
            last[event["kind"]] = event["time"] - began
    print(
        f"    phases: submitted {first['submitted']:.2f}  head's agent {first['head']:.2f}  all agents joined "
        f"{last['node_joined']:.2f}  first Ray node {first['node_ready']:.2f}  last Ray node {last['node_ready']:.2f}"
    )
    subprocess.run([BIN / "raylaunch", "down"], env=dict(env), check=True, capture_output=True, timeout=LIMIT)
    return seconds


def theirs(script: str) -> Callable[[int, Mapping[str, str], Path], float]:
    """Seconds from sbatch until the script's entry point has run."""

    def measure(nodes: int, env: Mapping[str, str], out: Path) -> float:
        ready = out / "ready"
        ready.unlink(missing_ok=True)
        began = time.time()
        job = subprocess.run(
            ["sbatch", "--parsable"], input=script.format(nodes=nodes, out=out, bin=BIN),
            env=dict(env), check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        try:
            while not ready.exists() or not ready.read_text().strip():
                if time.time() - began > LIMIT:
                    raise TimeoutError(f"job {job} was not ready within {LIMIT:g} s; see {out}")
                time.sleep(0.05)
            return float(ready.read_text()) - began
        finally:
            subprocess.run(["scancel", job], env=dict(env), check=True)
            while subprocess.run(
                ["squeue", "-h", "-j", job], env=dict(env), capture_output=True, text=True
            ).stdout.strip():
                time.sleep(0.1)

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    ways = {
        "raylaunch up": ours,
        "documentation's script": theirs(DOCUMENTATION),
        "ray symmetric-run": theirs(SYMMETRIC),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    sandbox = Sandbox.up(f"bench{os.getpid()}", nodes=given.nodes, cpus=4)
    try:
        env = {**os.environ, **sandbox.env()}
        out = Path(env["RAYLAUNCH_STATE_DIR"]) / "bench"
        out.mkdir(parents=True)
        for number in range(given.rounds):
            for name, measure in ways.items():
                seconds = measure(given.nodes, env, out)
                times[name].append(seconds)
                print(f"round {number + 1}  {name:24} {seconds:7.2f} s", flush=True)
    finally:
        sandbox.down()
    medians = {name: statistics.median(values) for name, values in times.items()}
    mine = medians["raylaunch up"]
    for name, median in medians.items():
        print(f"{name:24} median {median:7.2f} s   raylaunch / this = {mine / median:.2f}")
    print(json.dumps({"nodes": given.nodes, "rounds": given.rounds, "seconds": times}))


if __name__ == "__main__":
    main()
