"""One finding: what was looked at, how it is, and the next step where it is not well."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Status = Literal["ok", "warning", "problem", "unknown"]
GROUPS = {
    "slurm": "Slurm",
    "queue": "Partitions",
    "user": "You",
    "storage": "State directory",
    "node": "This machine",
    "network": "Network",
    "software": "Software",
    "gpu": "GPUs",
    "nodes": "Nodes",
    "bandwidth": "Bandwidth between nodes",
}
"""The first word of a check → its heading, in the order of the report."""


@dataclass(frozen=True)
class Finding:
    """`check` is dotted, its first word one of GROUPS; `hint` is the next step; `node`: None for all, or for here."""

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
    """The findings of a machine as that node's."""
    return [replace(one, node=node, check=one.check.replace("node.", "nodes.", 1)) for one in findings]


def failed(findings: Iterable[Finding]) -> bool:
    """Whether there is a problem among them: what the exit code says."""
    return any(one.status == "problem" for one in findings)


def few(words: Iterable[str], most: int = 8) -> str:
    """a, b, c and 12 more."""
    listed = list(words)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
