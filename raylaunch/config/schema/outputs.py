"""Who is told: `logging:`, `wandb:`, `mlflow:`, `alerts:` and `cost:`."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, SecretStr, model_validator

from raylaunch.config.schema.base import Address, Line, NotNegative, Positive, Section


class LoggingConfig(Section):
    """`logging:` metrics, profiles and memory snapshots."""

    log_every_steps: Positive = 1
    """Steps between two lines of `metrics.jsonl`. The last step is always logged. Example: `10`."""
    profile_steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """First and last step to trace with the PyTorch profiler. The trace is written to `profile` in the run directory.
    Example: `[100, 105]`."""
    memory_snapshots: bool = False
    """On a CUDA out-of-memory error, save a memory snapshot to `memory` in the run directory. Slows training slightly.
    Example: `true`."""
    tensorboard: bool = False
    """Write TensorBoard event files to the run directory. Example: `true`."""

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps ({self.profile_steps}): the first step is after the last")
        return self


class WandbConfig(Section):
    """`wandb:` Weights & Biases. Needs `raylaunch[wandb]`, and WANDB_API_KEY or ~/.netrc."""

    project: Line | None = None
    """Weights & Biases project. Setting it turns W&B on. Example: `llama`."""
    entity: Line | None = None
    """User or team that owns the project. Example: `my-team`."""
    name: Line | None = None
    """Name of the W&B run. Default: the run's name. Example: `baseline`."""
    group: Line | None = None
    """Group of the W&B run. Example: `ablations`."""
    tags: list[Line] = Field(default_factory=list)
    """Tags of the W&B run. Example: `[fsdp, 1b]`."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes to the run directory, for `wandb sync`. Example: `offline`."""


class MlflowConfig(Section):
    """`mlflow:` MLflow. Needs `raylaunch[mlflow]`."""

    experiment: Line | None = None
    """MLflow experiment. Setting it turns MLflow on. Example: `llama`."""
    tracking_uri: Line | None = None
    """Address of the MLflow server. Default: `MLFLOW_TRACKING_URI`. Example: `http://mlflow:5000`."""


AlertKind = Literal[
    "started", "node_lost", "recovered", "held", "stalled", "loss_spike", "nan", "checkpoint_failed", "checkpoint_late",
    "gpu", "walltime", "finished", "stopped", "failed",
]  # fmt: skip


class AlertsConfig(Section):
    """`alerts:` notifications about a run, sent to Slack, a webhook, a command or by mail ([Alerts](alerts.md))."""

    slack: Address | None = None
    """Incoming webhook of Slack, Mattermost or Rocket.Chat: its URL, `env:NAME` or `file:PATH`. The URL is a secret.
    Example: `env:SLACK_HOOK`."""
    webhook: Address | None = None
    """URL that receives each alert as JSON in a POST request; also `env:NAME` or `file:PATH`. The URL is a secret.
    Example: `file:~/.config/raylaunch/hook`."""
    command: list[Line] = Field(default_factory=list)
    """Command (a list of words, run without a shell on the head's node) that receives each alert as JSON on standard
    input. Example: `[/shared/bin/notify]`."""
    mail: Annotated[str, Field(pattern=r"^[^\s@-][^\s@]*(@[^\s@]+)?$", examples=["me@example.org"])] | None = None
    """Mail address. Slurm mails job state changes (`slurm.mail_type`). Every alert is also sent from the head's node,
    if it can send mail. Example: `me@example.org`."""
    kinds: Annotated[list[AlertKind], Field(min_length=1)] = [*get_args(AlertKind)]
    """Kinds of alerts to send. Default: all. Example: `[failed, finished]`."""
    min_interval: Annotated[float, Field(ge=0)] = 300.0
    """Minimum number of seconds between two alerts of the same kind about the same node or run. Further ones are merged
    into the next. Example: `600`."""
    max_per_hour: Positive = 20
    """Maximum number of alerts per hour. Further ones are merged and sent later. Critical alerts and the end of the run
    are always sent. Example: `10`."""
    stall_factor: Annotated[float, Field(ge=2)] = 10.0
    """Send `stalled` when no metrics were written for this many times the median interval, and for at least
    `alerts.stall_min_seconds`. Example: `20`."""
    stall_min_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Minimum number of seconds without metrics before `stalled` is sent (600 while a checkpoint or a validation may be
    running). Example: `300`."""
    below_min_after: Annotated[float, Field(ge=0)] = 60.0
    """Seconds below the minimum number of nodes before `held` is sent. Example: `300`."""
    loss_spike: Annotated[float, Field(gt=0)] = 6.0
    """Send `loss_spike` when the mean of three losses exceeds the median of the losses before (up to 97) by this many
    times their usual spread. Example: `10`."""
    checkpoint_late: Annotated[float, Field(ge=1)] = 2.0
    """Send `checkpoint_late` when no checkpoint was saved for this many times `step_scheduler.ckpt_every_steps`.
    Example: `3`."""
    walltime_left: NotNegative = 1800
    """Send `walltime` this many seconds before the allocation ends, if the run is unlikely to finish in time. 0: never.
    Example: `3600`."""

    @property
    def sinks(self) -> list[str]:
        """Where alerts go."""
        on = {"slack": self.slack, "webhook": self.webhook, "command": self.command, "mail": self.mail}
        return [name for name, value in on.items() if value]

    @property
    def addresses(self) -> dict[str, SecretStr]:
        """The secrets, by key."""
        return {name: value for name, value in (("slack", self.slack), ("webhook", self.webhook)) if value is not None}


class CostConfig(Section):
    """`cost:` prices, used by `raylaunch report`."""

    gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of one allocated GPU per hour. Example: `2.5`."""
    node_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of one allocated node per hour. Prices add up. Example: `1.0`."""
    currency: Line = "USD"
    """Currency of the prices. Example: `EUR`."""
