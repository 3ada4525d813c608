"""Who is told: `logging:`, `wandb:`, `mlflow:`, `alerts:` and `cost:`."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, SecretStr, model_validator

from raylaunch.config.schema.base import Address, Line, NotNegative, Positive, Section


class LoggingConfig(Section):
    """`logging:`."""

    log_every_steps: Positive = 1
    """Steps between two lines of metrics.jsonl; the last step always has one."""
    profile_steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """The first and the last step to trace with torch's profiler, into `profile` in the run directory."""
    memory_snapshots: bool = False
    """What lay in a GPU's memory when it ran out, into `memory` in the run directory; costs some speed."""
    tensorboard: bool = False
    """Event files for it, in the run directory."""

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps ({self.profile_steps}) is upside down")
        return self


class WandbConfig(Section):
    """`wandb:` Weights & Biases; on when it has a project. Needs raylaunch[wandb], and WANDB_API_KEY or ~/.netrc."""

    project: Line | None = None
    entity: Line | None = None
    name: Line | None = None
    """Default: the run's name."""
    group: Line | None = None
    tags: list[Line] = Field(default_factory=list)
    mode: Literal["online", "offline"] = "online"
    """offline: into the run directory, for `wandb sync`."""


class MlflowConfig(Section):
    """`mlflow:` on when it has an experiment. Needs raylaunch[mlflow]."""

    experiment: Line | None = None
    tracking_uri: Line | None = None
    """Default: MLFLOW_TRACKING_URI."""


AlertKind = Literal[
    "started", "node_lost", "recovered", "held", "stalled", "loss_spike", "nan", "checkpoint_failed", "checkpoint_late",
    "gpu", "walltime", "finished", "stopped", "failed",
]  # fmt: skip


class AlertsConfig(Section):
    """`alerts:` be told what happens to a run, by one or more of slack, webhook, command and mail (docs/alerts.md)."""

    slack: Address | None = None
    """An incoming webhook of Slack's, or of what understands them (Mattermost, Rocket.Chat): its address, `env:NAME` or
    `file:PATH`. It is a secret."""
    webhook: Address | None = None
    """Gets each alert as JSON, by POST. A secret, too."""
    command: list[Line] = Field(default_factory=list)
    """A command, word by word and without a shell, that gets each alert as JSON on its stdin, on the head's node."""
    mail: Annotated[str, Field(pattern=r"^[^\s@-][^\s@]*(@[^\s@]+)?$", examples=["me@example.org"])] | None = None
    """An address. Slurm mails the states of the job (slurm.mail_type), the head's node the rest if it has a mailer."""
    kinds: Annotated[list[AlertKind], Field(min_length=1)] = [*get_args(AlertKind)]
    """Those that are wanted. Default: all."""
    min_interval: Annotated[float, Field(ge=0)] = 300.0
    """Seconds between two alerts of one kind about one thing; what comes sooner is folded into the next."""
    max_per_hour: Positive = 20
    """Of all kinds; further ones come together, later. What is critical and the end of the run come in any case."""
    stall_factor: Annotated[float, Field(ge=2)] = 10.0
    """A stall: no line of metrics for this many times the median time between two, and for stall_min_seconds."""
    stall_min_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that are no stall yet; 600 are none while a checkpoint or a validation may be under way."""
    below_min_after: Annotated[float, Field(ge=0)] = 60.0
    """Seconds below the minimum of nodes until that is told."""
    loss_spike: Annotated[float, Field(gt=0)] = 6.0
    """A spike: the mean of three losses is this many times their usual spread above the median of the hundred before."""
    checkpoint_late: Annotated[float, Field(ge=1)] = 2.0
    """Late: no commit for this many times step_scheduler.ckpt_every_steps."""
    walltime_left: NotNegative = 1800
    """Seconds before the end of the allocation; told if the run will hardly be done by then. 0: never."""

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
    """`cost:` prices, for `raylaunch report`; each is optional, and what is given adds up."""

    gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """Of one GPU that is held for an hour."""
    node_hour: Annotated[float, Field(ge=0)] | None = None
    """Of one node that is held for an hour."""
    currency: Line = "USD"
