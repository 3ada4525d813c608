"""`trainer:` what a worker runs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raylaunch.config.schema.base import Line, Section

SCRIPT_ENTRY = "raylaunch.trainers.script:run"


class TrainerConfig(Section):
    """`trainer:` what each worker runs: a function (`trainer: module:function` for short) or a script."""

    shorthand: ClassVar[str | None] = "function"

    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$", examples=["trainers.fsdp:train"])] = "trainers.fsdp:train"
    """The function `(config, session)` that each worker calls, as `module:function`. `trainers.x` is your own module if
    you have one, else raylaunch's. Example: `my_package.training:train`."""
    script: Line | None = None
    """A script to run in place of a function, started as `torchrun` would start it: one process per worker, with the
    same environment variables. A relative path is relative to `trainer.chdir`. Example: `train.py`."""
    args: list[str] = Field(default_factory=list)
    """Arguments of the script. Example: `[--lr, "0.1"]`."""
    chdir: Line | None = None
    """Working directory of the script. For a function: the first directory to import its module from. Default: the
    directory in which you call `raylaunch`. Example: `/shared/me/project`."""
    stop_signal: Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"] = "SIGTERM"
    """Signal that asks the script to save and exit. Example: `SIGUSR1`."""
    stop_timeout: Annotated[float, Field(ge=0)] = 30.0
    """Seconds between `trainer.stop_signal` and SIGKILL. Example: `120`."""
    grow: bool = False
    """Restart the script to use nodes that have joined. If false, new nodes are used from the next restart on. Example:
    `true`."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.script is not None and self.function != type(self).model_fields["function"].default:
            raise ValueError(f"function ({self.function}) and script ({self.script}): give one of them")
        return self

    @property
    def entry(self) -> str:
        """The function that a worker calls."""
        return self.function if self.script is None else SCRIPT_ENTRY
