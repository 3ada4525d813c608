"""What users write: the schema, reading it with line numbers, secrets, their own code, and configs of other tools."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raylaunch.config.schema import Config as Config


def __getattr__(name: str) -> Any:
    """`raylaunch.config` was the schema, and trainers import its sections from here. (Imported when it is used: pydantic
    takes its time.)"""
    if not name[0].isupper():  # the import system asks for our modules in this way, too
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("raylaunch.config.schema"), name)
