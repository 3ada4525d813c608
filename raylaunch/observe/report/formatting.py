"""Numbers and names formatted for people. Pure."""

from __future__ import annotations

import math
from datetime import datetime

PARTS: dict[str, tuple[str, str, str]] = {
    "productive": ("productive", "good", "steps that were not repeated"),
    "checkpoint": ("saving", "save", "steps waiting for a checkpoint"),
    "queue": ("queue", "wait", "waiting for other runs or for nodes"),
    "holding": ("too few nodes", "wait", "waiting for the minimum number of nodes"),
    "bring_up": ("head", "start", "a head started"),
    "connect": ("connect", "start", "workers started and connected"),
    "build": ("build", "start", "data and model were created"),
    "restore": ("restore", "start", "a checkpoint was loaded"),
    "first_step": ("first step", "start", "extra time of the first step of an attempt"),
    "redone": ("lost steps", "lost", "steps repeated, interrupted by a fault, or not saved at the end"),
    "detect": ("detect", "lost", "until a fault was detected"),
    "stop": ("stop", "lost", "the old workers stopped"),
    "decide": ("decide", "lost", "the next number of workers was chosen"),
}
"""Part of the ledger → its name, its group (a colour), its description."""


def duration(seconds: float) -> str:
    """`0.42 s`, `43 s`, `2 min 5 s`, `3 h 20 min`, `9 d 23 h`, `10 d`."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds >= 0.001 else "0 s"
    whole, minutes, hours = round(seconds), round(seconds / 60), round(seconds / 3600)
    if whole < 60:
        return f"{whole} s"
    big, small, units = (
        (*divmod(whole, 60), ("min", "s")) if whole < 3600
        else (*divmod(minutes, 60), ("h", "min")) if minutes < 24 * 60
        else (*divmod(hours, 24), ("d", "h"))
    )  # fmt: skip
    return f"{big} {units[0]}" + (f" {small} {units[1]}" if small else "")


def amount(value: float, unit: str = "") -> str:
    """Three figures and a prefix: 1234567 → 1.23 M."""
    behind = f" {unit}" if unit else ""
    if not math.isfinite(value):
        return f"?{behind}"
    size = abs(value)
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= 0.9995 * limit:
            return f"{value / (1e3 if prefix == 'k' else limit):.3g} {prefix}{unit}"
    if size >= 100 or value == int(value):
        return f"{value:,.0f}{behind}"
    return f"{value:.3g}{behind}"


def hours(seconds: float) -> str:
    """Node-hours and GPU-hours, with the significant digits."""
    value = seconds / 3600
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def percent(share: float) -> str:
    """More digits close to 0 and to 100."""
    value = 100 * share
    if 0 < value < 0.01:
        return "< 0.01 %"
    digits = 0 if 10 <= value < 90 or value in (0, 100) else 1 if 1 <= value < 99 else 2
    return f"{value:.{digits}f} %"


def money(value: float, currency: str) -> str:
    return f"{value:,.2f} {currency}" if value < 1000 else f"{value:,.0f} {currency}"


def energy(joules: float) -> str:
    kwh = joules / 3.6e6
    return f"{amount(kwh)} kWh" if kwh < 10_000 else f"{amount(kwh / 1000)} MWh"


def when(moment: float, seconds: bool = False) -> str:
    """In the time zone of this machine, with its name."""
    try:
        return (
            f"{datetime.fromtimestamp(moment).astimezone():{'%Y-%m-%d %H:%M:%S' if seconds else '%Y-%m-%d %H:%M'} %Z}"
        )
    except (OverflowError, ValueError, OSError):
        return "?"


def day(moment: float) -> str:
    return when(moment)[:10]


def clip(text: str, most: int) -> str:
    """The text as one line of at most `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
