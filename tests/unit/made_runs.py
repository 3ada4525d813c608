"""State directories as clusters and runs leave them, made by a small generator: for the report, the history, and by hand.

python tests/unit/made_runs.py STATE_DIR        # three runs to look at
"""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NOW = 1795300000.0
CAUSES = ("node_lost", "worker_lost", "head_lost", "hang", "raylet_lost", "node_lost")


@dataclass
class Made:
    """One run on one cluster, written by `write`."""

    state_dir: Path
    name: str = "llama-8b"
    seconds: float = 10 * 86400.0
    nodes: int = 12
    gpus: int = 8
    faults: int = 14
    step_seconds: float = 14.0
    save_every: int = 250
    state: str = "finished"
    load: bool = True
    seed: int = 0
    began: float = 0.0
    config: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    cluster: list[dict[str, Any]] = field(default_factory=list)

    def event(self, time: float, kind: str, **fields: Any) -> None:
        self.events.append({"time": round(time, 3), "kind": kind, **fields})

    def of_cluster(self, time: float, kind: str, **fields: Any) -> None:
        self.cluster.append({"time": round(time, 3), "kind": kind, **fields})

    def write(self) -> Path:
        self.began = self.began or NOW - self.seconds
        source = random.Random(self.seed)
        run, cluster = self.state_dir / "runs" / self.name, self.state_dir / "clusters" / self.name
        for path in (run, cluster):
            path.mkdir(parents=True)
        names = [f"gpu{17 + i:03d}" for i in range(self.nodes)]
        self._begin(names)
        with (run / "metrics.jsonl").open("w") as out:
            end, step = self._attempts(names, source, out)
        self._end(end, step)
        for path, rows in ((run, self.events), (cluster, self.cluster)):
            rows.sort(key=lambda r: float(r["time"]))
            (path / "events.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        self._records(run, cluster, names, end, step)
        if self.load:
            self._load(cluster / "load.jsonl", names, end, source)
        return run

    def _begin(self, names: list[str]) -> None:
        t = self.began
        self.event(t, "queued", cluster=self.name, continued=False)
        self.of_cluster(t, "submitted", job="4711", incarnation=1, nodes=str(self.nodes))
        self.of_cluster(t + 31, "head_started", node=names[0], incarnation=1)
        for i, name in enumerate(names):
            self.of_cluster(t + 31 + 0.1 * i, "node_joined", node=name)
            self.of_cluster(t + 36 + 0.1 * i, "node_ready", node=name)

    def _attempts(self, names: list[str], source: random.Random, out: Any) -> tuple[float, int]:
        """(its end, its last step)."""
        there, number, committed, incarnation = list(names), 0, 0, 1
        t, end = self.began + 40, self.began + self.seconds
        breaks = sorted(source.uniform(self.began + 600, end - 600) for _ in range(self.faults)) if self.faults else []
        while True:
            number += 1
            workers = len(there) * max(1, self.gpus)
            until = breaks[0] if breaks else end
            self.event(t, "decision", decision="start", attempt=number - 1)
            self.event(t + 0.1, "attempt_started", attempt=number, workers=workers, on=list(there), from_step=committed,
                       run_incarnation=incarnation)  # fmt: skip
            self.event(t + 4, "workers_connected", attempt=number)
            self.event(t + 9, "model_built", attempt=number, parameters=8_030_261_248)
            if committed:
                self.event(t + 21, "resumed", attempt=number, step=committed)
            t, step = t + 24, committed
            pace = self.step_seconds * len(names) / len(there)
            while t + pace < until:
                step += 1
                t += pace
                self._step(out, step, t, number, workers, source, pace)
                if step % self.save_every == 0:
                    self.event(t + 3, "commit", attempt=number, step=step, seconds=2.5)
                    committed = step
                    t += 2.5
            if not breaks:
                self.event(t + 3, "attempt_ended", attempt=number, how="finished", committed=step)
                return t + 3, step
            breaks.pop(0)
            t, committed, incarnation = self._break(t, number, step, committed, there, names, incarnation, source)

    def _break(
        self, t: float, number: int, step: int, committed: int, there: list[str], names: list[str], incarnation: int,
        source: random.Random,
    ) -> tuple[float, int, int]:  # fmt: skip
        """A fault, or growth back to the whole size; (when the next attempt begins, from where, incarnation)."""
        t += 1.0
        if len(there) < len(names):
            missing = next(n for n in names if n not in there)
            there.append(missing)
            there.sort()
            self.of_cluster(t - 60, "node_joined", node=missing)
            self.event(t - 20, "resize_requested", attempt=number, why="grow", when="commit")
            self.event(t, "commit", attempt=number, step=step, seconds=2.5)
            self.event(t + 1, "attempt_ended", attempt=number, how="resized", committed=step)
            return t + 1.5, step, incarnation
        cause = source.choice(CAUSES)
        hit = source.choice(there[1:] or there)
        if cause == "head_lost":
            incarnation += 1
            self.of_cluster(t + 2.1, "election", incarnation=incarnation, node=names[1], why="lost")
            self.of_cluster(t + 2.3, "head_started", incarnation=incarnation, node=names[1])
        if cause == "node_lost" and len(there) > 1:
            there.remove(hit)
            self.of_cluster(t + 0.2, "node_lost", node=hit, reason="the connection was closed")
            self.of_cluster(t + 2.2, "node_strike", node=hit, count=1, reason="the connection was closed")
        self.event(t + 2.5, "fault", attempt=number, cause=cause, node=hit, rank=3, step=step)
        self.event(t + 4.0, "attempt_ended", attempt=number, how="fault", error=cause, committed=committed)
        return t + 4.5, committed, incarnation

    def _step(
        self, out: Any, step: int, t: float, attempt: int, workers: int, source: random.Random, pace: float
    ) -> None:
        loss = 1.9 + 9.1 * math.exp(-step / 900) + 1.4 * math.exp(-step / 16000) + source.gauss(0, 0.035)
        row = {
            "step": step, "loss": loss, "lr": 3e-4, "grad_norm": 0.4, "tokens": step * 4194304,
            "tokens_per_s": round(4194304 / pace * source.uniform(0.97, 1.01), 1), "data_wait": 0.0, "world_size": workers,
            "attempt": attempt, "time": t,
        }  # fmt: skip
        out.write(json.dumps(row) + "\n")
        if step % 2000 == 0:
            out.write(
                json.dumps(
                    {"step": step, "val_loss": loss + 0.05, "world_size": workers, "attempt": attempt, "time": t}
                )
                + "\n"
            )

    def _end(self, end: float, step: int) -> None:
        self.event(end + 0.1, "decision", decision="finish", attempt=1, state=self.state)
        if self.state in {"finished", "failed", "stopped"}:
            self.event(end + 0.2, self.state, reason="all steps are done")
            self.of_cluster(end + 5, "ended", reason="run ended", unclean={}, lost=[])

    def _records(self, run: Path, cluster: Path, names: list[str], end: float, step: int) -> None:
        record = {"name": self.name, "state": self.state, "cluster": self.name, "created": self.began, "id": "x", "attempt": 1,
                  "world_size": 8, "nodes": self.nodes, "reason": "all steps are done", "updated": end}  # fmt: skip
        (run / "run.json").write_text(json.dumps(record))
        config = self.config or CONFIG.format(gpus=self.gpus, nodes=self.nodes, steps=step, save=self.save_every)
        for path in (run, cluster):
            (path / "config.yaml").write_text(config)
        nodes = [
            {"name": n, "role": "worker", "state": "ended", "address": "10.1.0.2", "job": "4711", "resources":
             {"cpus": 104, "memory": 2113929216000, "object_store": 1, "gpus": [str(g) for g in range(self.gpus)]}}
            for n in names
        ]  # fmt: skip
        (cluster / "members.json").write_text(
            json.dumps({"canary": "c", "incarnation": 1, "wanted": 2, "nodes": nodes})
        )
        of = {"name": self.name, "backend": "slurm", "incarnation": 1, "canary": "c", "created": self.began, "min_nodes": 1,
              "max_nodes": self.nodes, "workers_per_node": 8, "jobs": ["4711"], "run": self.name}  # fmt: skip
        (cluster / "cluster.json").write_text(json.dumps(of))
        if self.state in {"finished", "failed", "stopped"}:
            (cluster / "ended.json").write_text("{}")
        git = {"directory": "/home/me/llm", "commit": "9f2c1e07ab34", "branch": "main", "dirty": True, "changed": 2}
        versions = {"python": "3.12.7", "raylaunch": "0.1.0", "torch": "2.13.0", "ray": "2.60.1"}
        (run / "code.json").write_text(
            json.dumps({"hand_overs": [{"time": self.began, "versions": versions, "git": git}]})
        )

    def _load(self, path: Path, names: list[str], end: float, source: random.Random) -> None:
        down = [(e["time"], e["time"] + 40) for e in self.events if e["kind"] == "fault"]
        with path.open("w") as out:
            t = self.began + 45
            while t < end:
                idle = any(low <= t <= high for low, high in down)
                row = {
                    "time": t,
                    "nodes": self.nodes,
                    "cpu": source.uniform(0.12, 0.2),
                    "memory": 0.42 + source.gauss(0, 0.01),
                }
                if self.gpus:
                    gpu = 0.05 if idle else source.uniform(0.9, 0.98)
                    row |= {"gpu": gpu, "gpu_memory": 0.31 if idle else 0.83, "watts": self.nodes * (2100 + 4600 * gpu),
                            "temperature": round(58 + 9 * gpu)}  # fmt: skip
                out.write(json.dumps(row) + "\n")
                t += 30.0


CONFIG = """# Resolved by raylaunch: every value as it is used.
cluster:
  name: main
  backend: slurm
slurm:
  nodes: '{nodes}'
  gpus_per_node: h100:{gpus}
  account: nlp-project
  env:
    WANDB_API_KEY: very-secret-value
    HF_HOME: ${{HF_HOME}}
model:
  size: 8B
data:
  seq_len: 4096
step_scheduler:
  max_steps: {steps}
  global_batch_size: 1024
  ckpt_every_steps: {save}
cost:
  gpu_hour: 2.1
  node_hour: null
  currency: EUR
"""


if __name__ == "__main__":
    where = Path(sys.argv[1])
    Made(where).write()
    Made(where, "small", 5400.0, 4, 0, 3, 0.9, 50, seed=3).write()
    Made(where, "million", 10 * 86400.0, 64, 8, 60, 0.86, 2000, seed=5).write()
