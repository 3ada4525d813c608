"""The whole file, and what follows from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from raylaunch.config.schema.base import Section
from raylaunch.config.schema.cluster import ClusterConfig, ElasticConfig, SlurmConfig
from raylaunch.config.schema.data import DataConfig
from raylaunch.config.schema.model import ModelConfig
from raylaunch.config.schema.outputs import AlertsConfig, CostConfig, LoggingConfig, MlflowConfig, WandbConfig
from raylaunch.config.schema.trainer import TrainerConfig
from raylaunch.config.schema.training import CheckpointConfig, DistributedConfig, OptimizerConfig, StepSchedulerConfig


class Config(Section):
    """The whole file."""

    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    elastic: ElasticConfig = Field(default_factory=ElasticConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    step_scheduler: StepSchedulerConfig = Field(default_factory=StepSchedulerConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    mlflow: MlflowConfig = Field(default_factory=MlflowConfig)
    alerts: AlertsConfig = Field(default_factory=AlertsConfig)
    cost: CostConfig = Field(default_factory=CostConfig)

    @property
    def trackers(self) -> list[str]:
        """The trackers that are turned on."""
        on = {
            "wandb": self.wandb.project is not None,
            "mlflow": self.mlflow.experiment is not None,
            "tensorboard": self.logging.tensorboard,
        }
        return [name for name, is_on in on.items() if is_on]

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        steps = self.step_scheduler
        if steps.warmup_steps > steps.max_steps:
            raise ValueError(
                f"step_scheduler.warmup_steps ({steps.warmup_steps}) exceeds max_steps ({steps.max_steps})"
            )
        return self

    @model_validator(mode="after")
    def _plan_fits(self) -> Self:
        plan, model, length = self.distributed, self.model, self.data.seq_len
        if plan.model_parallel > 1 and (model.hf is not None or model.target is not None):
            raise ValueError(
                "model.hf and model._target_ support data parallelism only: distributed.tp_size, cp_size, pp_size and "
                "ep_size must be 1"
            )
        if plan.compile and plan.tp_size > 1:
            raise ValueError(
                "distributed.compile and tp_size > 1: torch.compile makes other gradients of it (torch 2.13); leave one out"
            )
        for key in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
            if getattr(model, key) % plan.tp_size:
                raise ValueError(
                    f"distributed.tp_size ({plan.tp_size}) does not divide model.{key} ({getattr(model, key)})"
                )
        if model.n_experts % plan.ep_size or (plan.ep_size > 1 and not model.n_experts):
            raise ValueError(
                f"distributed.ep_size ({plan.ep_size}) does not divide model.n_experts ({model.n_experts})"
            )
        if plan.ep_size > 1 and plan.activation_checkpointing == "selective":
            raise ValueError(
                "distributed.activation_checkpointing: selective and ep_size > 1 do not go together (torch 2.13 fails on "
                "FSDP's units inside of a block); choose full or none"
            )
        if plan.pp_size > model.n_layers:
            raise ValueError(f"distributed.pp_size ({plan.pp_size}) exceeds model.n_layers ({model.n_layers})")
        if model.n_experts and plan.tp_size > 1:
            raise ValueError("model.n_experts and distributed.tp_size: experts are split by ep_size, not by tp_size")
        parts = plan.tp_size * plan.cp_size * (2 if plan.cp_size > 1 else 1)
        if plan.model_parallel > 1 and length % parts:
            words = "2 * distributed.cp_size * tp_size" if plan.cp_size > 1 else "distributed.tp_size"
            raise ValueError(f"data.seq_len ({length}) is not a multiple of {words} = {parts}")
        return self

    @model_validator(mode="after")
    def _nodes_fit(self) -> Self:
        most = self.elastic.max_nodes
        if most is not None and most < self.slurm.max_nodes:
            raise ValueError(f"elastic.max_nodes ({most}) is below slurm.nodes ({self.slurm.nodes})")
        return self

    @property
    def max_nodes(self) -> int:
        """The most nodes that the cluster may ever have."""
        return self.elastic.max_nodes or self.slurm.max_nodes


_CONTINUITY = (
    "trainer.function", "trainer.script", "model", "data.text", "data.prepared", "data.mixture", "data.seq_len", "data.val_fraction", "data.seed",
    "optimizer.name", "optimizer.ema", "step_scheduler.global_batch_size",
)  # fmt: skip


def continuation_differences(old: Config, new: Config) -> list[str]:
    """What in `new` a run begun with `old` cannot continue with, as `key: old → new` lines.

    Steps, learning rate, cadence and everything about the cluster may change; what gives the
    parameters their shape or the samples their order may not.
    """
    before, after = old.model_dump(), new.model_dump()
    lines = []
    for key in _CONTINUITY:
        was, now = before, after
        for part in key.split("."):
            was, now = was[part], now[part]
        if key == "step_scheduler.global_batch_size" and now is None:
            continue  # not written again: the run's own stays in force
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            lines += [f"{key}.{k}: {was[k]} → {now[k]}" for k in was if was[k] != now[k] and k != "size"]
        else:
            lines.append(f"{key}: {was} → {now}")
    return lines


def default_run_name(path: Path) -> str:
    """The file's stem; for a plain `train.yaml` or `config.yaml` the name of its folder."""
    stem = path.stem if path.stem not in {"train", "config", "cfg"} else path.resolve().parent.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "run"
