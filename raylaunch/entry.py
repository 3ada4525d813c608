"""Modules and functions that a config names and raylaunch does not know: imported, with errors for people."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from raylaunch.config import TrainerConfig
from raylaunch.errors import RaylaunchError, RunError


def module(trainer: TrainerConfig) -> ModuleType:
    """Import it; it may lie in `trainer.chdir`. RunError when it cannot be imported."""
    return _import("trainer", trainer.entry.partition(":")[0], trainer.chdir)


def function(trainer: TrainerConfig) -> Callable[..., Any]:
    """The function that a worker calls. RunError when there is none."""
    return named("trainer", trainer.entry, trainer.chdir)


def named(key: str, spec: str, chdir: str | None) -> Callable[..., Any]:
    """The function or class `module:name` (or module.name) that config key `key` names. RunError when there is none."""
    where, _, name = spec.partition(":") if ":" in spec else spec.rpartition(".")
    found = _import(key, where, chdir)
    called: Callable[..., Any] | None = getattr(found, name, None)
    if not callable(called):
        raise RunError(f"{key}: {found.__name__} has no function {name}", f"It is {found.__file__}.")
    return called


def _import(key: str, name: str, chdir: str | None) -> ModuleType:
    if chdir is not None and chdir not in sys.path:
        sys.path.append(chdir)  # last: nothing there hides a package
    try:
        return importlib.import_module(name)
    except RaylaunchError:
        raise
    except Exception as error:  # somebody's module: whatever it raises when it is imported
        raise RunError(
            f"{key}: cannot import {name}: {type(error).__name__}: {error}",
            "Is it installed, or in the directory that you call raylaunch from (trainer.chdir)?",
        ) from error
