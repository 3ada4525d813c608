"""Formatting of numbers and names for users, shared by several packages. Imports nothing of raylaunch."""

from __future__ import annotations

import os
import pwd


def plural(count: int, word: str) -> str:
    """ "1 step", "2 steps"; with commas."""
    if count == 1:
        return f"{count:,} {word}"
    if word.endswith("y"):
        return f"{count:,} {word[:-1]}ies"
    return f"{count:,} {word}" + ("es" if word.endswith(("s", "h")) else "s")


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} {units[0]}" if count >= 10 or units[0] == "B" else f"{count:.1f} {units[0]}"


def user() -> str:
    """The user's name by the system, not by the environment; the number where it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
