"""A finding: the check, its status and text, and the next step if there is a problem."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Status = Literal["ok", "warning", "problem", "unknown"]
GROUPS = {
    "slurm": "Slurm",
    "queue": "Partitions",
    "user": "Your account",
    "storage": "State directory",
    "node": "This machine",
    "network": "Network",
    "software": "Software",
    "gpu": "GPUs",
    "nodes": "Nodes",
    "bandwidth": "Bandwidth between nodes",
}
"""First word of a check → heading, in the order of the report."""


@dataclass(frozen=True)
class Finding:
    """`check` is a dotted name that starts with one of GROUPS; `hint`: the next step; `node`: None for all nodes or for
    this machine."""

    check: str
    status: Status
    text: str
    hint: str = ""
    node: str | None = None

    @property
    def group(self) -> str:
        return self.check.partition(".")[0]


def ok(check: str, text: str, node: str | None = None) -> Finding:
    return Finding(check, "ok", text, "", node)


def warning(check: str, text: str, hint: str, node: str | None = None) -> Finding:
    return Finding(check, "warning", text, hint, node)


def problem(check: str, text: str, hint: str, node: str | None = None) -> Finding:
    return Finding(check, "problem", text, hint, node)


def unknown(check: str, text: str, hint: str = "", node: str | None = None) -> Finding:
    return Finding(check, "unknown", text, hint, node)


def on(node: str, findings: Iterable[Finding]) -> list[Finding]:
    """The findings of a machine, assigned to a node."""
    return [replace(one, node=node, check=one.check.replace("node.", "nodes.", 1)) for one in findings]


def failed(findings: Iterable[Finding]) -> bool:
    """Whether any finding is a problem; sets the exit code."""
    return any(one.status == "problem" for one in findings)


def few(words: Iterable[str], most: int = 8) -> str:
    """a, b, c and 12 more."""
    listed = list(words)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
