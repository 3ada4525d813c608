"""duties.json: what a head must know that another one has been before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylaunch.state import files, records
from raylaunch.state.records import Cluster, Record


@dataclass(frozen=True)
class Draining(Record):
    """A node that the run is to leave: why, and the process of its agent. Another agent there is another matter."""

    reason: str
    agent: int | None = None
    left: bool = False
    """The run does not use it any more."""


@dataclass
class HeadState(Record):
    """Written by the head whenever it changes, read by the next one."""

    canary: str
    queue: list[str] = field(default_factory=list)
    """Runs that wait for their turn."""
    running: str = ""
    wanted: int = 0
    """Nodes that the cluster should have; 0: as many as its base job got."""
    scaled: bool = False
    """A person chose `wanted`: idle nodes are not taken beyond it."""
    strikes: dict[str, int] = field(default_factory=dict)
    """Node → how often it was lost or broken."""
    excluded: list[str] = field(default_factory=list)
    """Nodes that have struck out."""
    continued: int = 0
    """How often the cluster went on in another allocation."""
    allocation: str = ""
    """The allocation that this was written in."""
    draining: dict[str, Draining] = field(default_factory=dict)
    """Nodes that the run is to leave; then their agents end."""
    taken: list[str] = field(default_factory=list)
    """Requests that are done and may lie there yet (see `requests`)."""

    @classmethod
    def read(cls, directory: Path, cluster: Cluster) -> HeadState:
        """Of this life of the cluster; a fresh one at its beginning."""
        value: dict[str, Any] | None = files.read_json(directory / records.DUTIES_FILE)
        if value is None or value.get("canary") != cluster.canary:
            return cls(cluster.canary, queue=[cluster.run] if cluster.run else [])
        draining = {node: Draining.parse(one) for node, one in value.get("draining", {}).items()}
        return cls.parse(value | {"draining": draining})
