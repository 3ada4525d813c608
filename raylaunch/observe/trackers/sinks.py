"""Weights & Biases, MLflow and TensorBoard behind one small interface; each is imported only if it is configured.

A sink is opened with its stored state (`memory`), so that all processes that forward the metrics of a run write to the
same run in the tracker.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from raylaunch.config.schema import Config

_TOLD = ("trainer", "model", "data", "optimizer", "step_scheduler", "distributed", "checkpoint")
"""Sections sent to trackers. Not `slurm`: its environment may contain secrets."""


class Sink(Protocol):
    """`memory` is stored for the next time the sink is opened."""

    memory: dict[str, Any]

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Metrics of a step, at this time (Unix). A step may be repeated after a fault."""

    def flush(self) -> None:
        """After this, written data survive this process."""

    def close(self) -> None:
        """Close the sink; it may be opened again."""


def open_sink(name: str, config: Config, run_dir: Path, memory: dict[str, Any]) -> Sink:
    """Open one of `Config.trackers`; raises the exceptions of its package."""
    match name:
        case "wandb":
            return _Wandb(config, run_dir, memory)
        case "mlflow":
            return _Mlflow(config, run_dir, memory)
        case _:
            return _TensorBoard(run_dir, memory)


def _told(config: Config) -> dict[str, Any]:
    return config.model_dump(include=set(_TOLD))


class _Wandb:
    """One run, resumed by its id. wandb reads the key from WANDB_API_KEY or ~/.netrc."""

    def __init__(self, config: Config, run_dir: Path, memory: dict[str, Any]) -> None:
        import wandb

        self.memory = {"id": memory.get("id") or secrets.token_hex(4)}
        own = config.wandb
        self._run = wandb.init(
            project=own.project, entity=own.entity, name=own.name or run_dir.name, group=own.group, tags=own.tags,
            mode=own.mode, id=self.memory["id"], resume="allow", dir=run_dir, config=_told(config),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
        )  # fmt: skip
        # A repeated step must not be rejected: wandb's own counter only increases.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, "time": seconds, **values})

    def flush(self) -> None:
        """wandb's service process has the data."""

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """One run of an experiment, by its id."""

    def __init__(self, config: Config, run_dir: Path, memory: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        own = config.mlflow
        assert own.experiment is not None
        self._client = MlflowClient(own.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
        self._run = str(memory.get("id", ""))
        if not self._run:
            found = self._client.get_experiment_by_name(own.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(own.experiment)
            self._run = str(self._client.create_run(experiment, run_name=run_dir.name).info.run_id)
            for section, values in _told(config).items():
                for key, value in values.items():
                    self._client.log_param(self._run, f"{section}.{key}", str(value)[:500])
        self.memory = {"id": self._run}

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        rows = [Metric(key, value, int(seconds * 1000), step) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=rows)

    def flush(self) -> None:
        """The server has the data."""

    def close(self) -> None:
        """The run stays open in MLflow: it may continue."""


class _TensorBoard:
    """Event files in the run directory; steps repeated after a fault replace the old ones.

    Written without the package's SummaryWriter, whose flush does not wait for its writer thread."""

    def __init__(self, run_dir: Path, memory: dict[str, Any]) -> None:
        self._directory, self.memory = run_dir / "tensorboard", {"step": int(memory.get("step", 0))}
        self._writer: Any = None

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # which Ray Train brings
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        if self._writer is None or step < self.memory["step"]:
            self.close()
            self._directory.mkdir(exist_ok=True)
            name = f".{os.getpid()}.{step}"  # two writers may start in the same second
            self._writer = EventsWriter(str(self._directory / "events"), name)
            begins = SessionLog(status=SessionLog.START)  # discards events of this step and later ones
            self._writer.write_event(Event(step=step, wall_time=seconds, session_log=begins))
        rows = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._writer.write_event(Event(step=step, wall_time=seconds, summary=Summary(value=rows)))
        self.memory["step"] = step

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
