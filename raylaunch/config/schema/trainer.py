"""`trainer:` what a worker runs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raylaunch.config.schema.base import Line, Section

SCRIPT_ENTRY = "raylaunch.trainers.script:run"


class TrainerConfig(Section):
    """`trainer:` what each worker runs: a function, whose name may be written alone, or a script."""

    shorthand: ClassVar[str | None] = "function"

    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$", examples=["trainers.fsdp:train"])] = "trainers.fsdp:train"
    """A function `(config, session)`. `trainers.x` is your module if you have one, else raylaunch's own."""
    script: Line | None = None
    """In place of a function: a script as `torchrun` would start it, one process a worker, with its variables.
    A relative path is one in chdir."""
    args: list[str] = Field(default_factory=list)
    """The script's arguments."""
    chdir: Line | None = None
    """A script's working directory; a function's module is looked for there first. Default: that of the command line."""
    stop_signal: Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"] = "SIGTERM"
    """What the script gets when the run is to stop, for it to save."""
    stop_timeout: Annotated[float, Field(ge=0)] = 30.0
    """Seconds from stop_signal to SIGKILL."""
    grow: bool = False
    """Stop a script and start it again when nodes come; else it grows when it starts again for another reason."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.script is not None and self.function != type(self).model_fields["function"].default:
            raise ValueError(f"function ({self.function}) and script ({self.script}): give one of them")
        return self

    @property
    def entry(self) -> str:
        """The function that a worker calls."""
        return self.function if self.script is None else SCRIPT_ENTRY
