"""The exceptions that raylaunch raises.

Each one states what happened and the next step. The command line prints both and exits with `exit_code`: 2 for wrong
usage, 1 for a failure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class RaylaunchError(Exception):
    """Base class. `message`: what happened; `hint`: the next step."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(RaylaunchError):
    """A command-line argument is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or a --set value is invalid; the message has file and line."""


class SlurmError(RaylaunchError):
    """A Slurm command failed; the message has the command and its stderr."""


class SlurmUnavailable(SlurmError):
    """Slurm's commands are not installed, or slurmctld does not respond in time."""


class StateError(RaylaunchError):
    """A file in the state directory cannot be read or written: full, read-only, not shared, or damaged."""


class BringUpError(RaylaunchError):
    """The cluster did not start; the message has the node and its error."""


class RunError(RaylaunchError):
    """A run cannot start or continue."""


class DataError(RaylaunchError):
    """Input data or a prepared dataset cannot be read; the message has the file and the position."""


class SandboxError(RaylaunchError):
    """The sandbox cannot be created or used."""


def first_problem(error: ValidationError) -> str:
    """Of a value that does not fit its model (pydantic): where, and what."""
    found = error.errors()[0]
    return f"{'.'.join(map(str, found['loc'])) or 'the file'}: {found['msg']}"


def first_line(error: BaseException) -> str:
    """What somebody else's exception says, for a message of ours: its first line, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
