"""What the trainer's tests share: worker processes that serve all cases, and a run with its attempts.

A case is a Run in a fresh directory: its attempts share checkpoints and data, as the driver's do. What is
compared is what users see: the lines of metrics.jsonl, events.jsonl, and the committed checkpoints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raylaunch.checkpoint import store
from raylaunch.data import prepare
from raylaunch.data.prepare import PrepareRequest
from raylaunch.state import event_log, files
from raylaunch.training.worker.session import Session

ROOT = Path(__file__).resolve().parents[2]
CASE_SECONDS = 240.0  # of a machine that is busy with other things
NO_ANSWER = "no answer"
GLOBAL_BATCH_SIZE = 8


class Workers:
    """The process that forks a fresh worker for each rank of each case; see `trainer_worker`."""

    def __init__(self, log: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a pool of processes for each rank is slower here
        command = [sys.executable, str(Path(__file__).with_name("trainer_worker.py"))]
        pipe = subprocess.PIPE
        with log.open("ab") as err:
            self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=err)
        self._log = log

    def run(self, case: dict[str, Any]) -> list[str]:
        """The error of each rank ("" for none, "died" when the process did)."""
        compiles = case["config"].get("distributed", {}).get("compile", False)
        case["limit"] = 4 * CASE_SECONDS if compiles else CASE_SECONDS
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(case).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the workers' parent is gone; see {self._log}"
        errors: list[str] = json.loads(line)
        assert NO_ANSWER not in errors, f"no answer in {case['limit']:g} s; see {self._log}"
        return errors

    def close(self) -> None:
        with self._process:  # closes its pipes
            self._process.kill()


class Run:
    """A run directory and the attempts in it."""

    def __init__(self, directory: Path, text: Path, workers: Workers) -> None:
        self.directory, self._workers = directory, workers
        self.attempts = 0
        self.config: dict[str, dict[str, Any]] = {
            "model": {"size": "tiny"},
            "data": {"text": [str(text)], "seq_len": 32, "val_fraction": 0.1},
            "step_scheduler": {
                "max_steps": 10,
                "local_batch_size": 2,
                "ckpt_every_steps": 3,
                "val_every_steps": 5,
                "warmup_steps": 2,
            },
            "optimizer": {"lr": 3e-3},
            "checkpoint": {"keep_last_n_checkpoints": 9},
        }

    def attempt(self, world_size: int, **case: Any) -> list[str]:
        self.attempts += 1
        files.make_dir(files.attempt_dir(self.directory, self.attempts))
        return self._workers.run(
            {
                "run_dir": str(self.directory),
                "rendezvous": str(self.directory / f"rendezvous-{self.attempts}"),
                "attempt": self.attempts,
                "world_size": world_size,
                "config": self.config,
                "global_batch_size": GLOBAL_BATCH_SIZE,
                **case,
            }
        )

    def train(self, world_size: int, **case: Any) -> Run:
        """An attempt that must end well."""
        assert self.attempt(world_size, **case) == [""] * world_size
        return self

    def session(self, rank: int = 0, world_size: int = 1) -> Session:
        """As a worker of an attempt has it."""
        return Session(
            run="test", run_dir=self.directory, checkpoint_dir=self.checkpoints, attempt=1, rank=rank,
            world_size=world_size, local_rank=rank, local_world_size=world_size, node="here", device="cpu",
            global_batch_size=GLOBAL_BATCH_SIZE,
        )  # fmt: skip

    def metrics(self, key: str) -> dict[int, float]:
        lines = files.read_lines(self.directory / files.METRICS_FILE)
        return {line["step"]: line[key] for line in lines if key in line}

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in event_log.read_all(self.directory) if e["kind"] == kind]

    def outcome(self) -> Any:
        return files.read_json(files.attempt_dir(self.directory, self.attempts) / "outcome.json")

    def commits(self) -> list[int]:
        return [commit.step for commit in store.committed(self.checkpoints)]

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"


def assert_same_curve(one: Run, other: Run, first: int = 1, rel: float = 1e-4) -> None:
    for key in ("loss", "grad_norm", "lr", "tokens", "val_loss"):
        expected = {step: value for step, value in other.metrics(key).items() if step >= first}
        found = {step: value for step, value in one.metrics(key).items() if step >= first}
        assert found == (expected if rel == 0 else pytest.approx(expected, rel=rel)), key
        assert expected


def prepared(text: Path, out: Path, **more: Any) -> str:
    prepare.prepare(PrepareRequest([str(text)], out, **more), 1, lambda _: None)
    return str(out)
