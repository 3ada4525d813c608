"""Everything that raylaunch raises on purpose.

Each error says what happened and the next step. The command line prints both and exits
with `exit_code`: 2 for usage (the input is wrong), 1 for failure (the world is).
"""

from __future__ import annotations


class RaylaunchError(Exception):
    """Base of all: `message` is what happened, `hint` the next step to take."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(RaylaunchError):
    """The command line or a name on it is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or a --set is wrong; the message carries file and line."""


class SlurmError(RaylaunchError):
    """A Slurm command failed; the message carries the command and its stderr."""


class SlurmUnavailable(SlurmError):
    """Slurm's commands are missing, or its controller does not answer in time."""


class StateError(RaylaunchError):
    """The state directory is unusable: full, read-only, not shared, or not ours."""


class BringUpError(RaylaunchError):
    """The cluster did not come up; the message names the node and its own error."""


class RunError(RaylaunchError):
    """A run cannot start or go on."""


class DataError(RaylaunchError):
    """Input cannot be read or a prepared dataset cannot be used; the message names file and place."""


class SandboxError(RaylaunchError):
    """The sandbox cannot be made or used."""


def first_line(error: BaseException) -> str:
    """What somebody else's exception says, for a message of ours: its first line, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
