"""Modules and functions that a config names and raylaunch does not know: imported, with errors for people.

The user's directory (`trainer.chdir`) comes first, as a script's directory does in Python. `trainers.x` is the user's
module if they have one; else it is ours, imported as `raylaunch.trainers.x` and under no other name: a second copy
would have other classes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import raylaunch
from raylaunch.config import former_names
from raylaunch.config.schema import TrainerConfig
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
        raise RunError(f"{key}: {found.__name__} has no function {name}", f"The module is {found.__file__}.")
    return called


def _import(key: str, name: str, chdir: str | None) -> ModuleType:
    if chdir is not None:
        sys.path[:] = [chdir, *(path for path in sys.path if path != chdir)]
    try:
        return importlib.import_module(_full_name(name))
    except RaylaunchError:
        raise
    except Exception as error:  # somebody's module: whatever it raises when it is imported
        raise RunError(
            f"{key}: cannot import {name}: {type(error).__name__}: {error}",
            "Install it, or call raylaunch in the directory that contains it (trainer.chdir).",
        ) from error


def _full_name(name: str) -> str:
    """`raylaunch.trainers.x` for a `trainers.x` that only we have. In a checkout on sys.path, ours is found as both."""
    if not name.startswith("trainers."):
        return name
    found, ours = _origin(name, sys.path), _origin(name, raylaunch.__path__)
    if ours is None and found is None:
        return former_names.NAMES.get(f"raylaunch.{name}", name)
    if ours is None or (found is not None and not found.samefile(ours)):
        return name
    return f"raylaunch.{name}"


def _origin(name: str, path: Sequence[str]) -> Path | None:
    """The file that `import` would find on `path`. Nothing is imported, not even parents."""
    spec = None
    for part in name.split("."):
        spec = PathFinder.find_spec(part, path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec is not None and spec.origin is not None else None
