"""The nodes of a run and their history, from the events of its cluster. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylaunch.observe.history import safe_read
from raylaunch.observe.history.timeline import History, Row


@dataclass
class NodeFact:
    """One node during the run."""

    name: str
    state: str = ""
    """From its last event."""
    seconds: float | None = None
    """Time held; None: unknown."""
    lost: int = 0
    strikes: int = 0
    excluded: bool = False
    drained: int = 0
    faults: int = 0
    """Faults of the run's attempts on this node."""
    reason: str = ""
    """Of its last strike, loss or drain."""
    attempts: int = 0
    cpus: int | None = None
    memory: int | None = None
    """Bytes."""
    gpus: int | None = None
    job: str = ""

    @property
    def trouble(self) -> tuple[int, int, int, int]:
        """For sorting: higher is worse."""
        return self.strikes + self.excluded, self.lost, self.faults, self.drained


def of_events(
    events: Sequence[Row], seconds: Mapping[str, float], history: History, table: Mapping[str, dict[str, Any]],
    gpus: Mapping[str, int],
) -> list[NodeFact]:  # fmt: skip
    """The worst first, then by name. `events`: of the clusters, during the run; `table`: the rows of members.json."""
    found: dict[str, NodeFact] = {}

    def of(name: object) -> NodeFact:
        return found.setdefault(str(name), NodeFact(str(name)))

    for row in sorted(events, key=lambda r: float(r["time"])):
        kind, node = str(row["kind"]), row.get("node")
        if not isinstance(node, str) or not node:
            continue
        if kind.startswith("node_"):
            if kind == "node_decision":
                continue
            one = of(node)
            one.state = kind.removeprefix("node_")
            one.lost += kind == "node_lost"
            one.drained += kind == "node_draining"
            one.reason = str(row.get("reason") or row.get("error") or one.reason)
        elif kind == "node_strike":
            one = of(node)
            one.strikes += 1
            one.reason = str(row.get("reason") or one.reason)
        elif kind == "node_excluded":
            of(node).excluded = True
    for attempt in history.attempts:
        for node in attempt.nodes:
            of(node).attempts += 1
        for fault in attempt.faults[:1]:
            if fault.get("node"):
                of(fault["node"]).faults += 1
    for name, one in found.items():
        row = table.get(name, {})
        one.seconds = seconds.get(name)
        one.cpus, one.memory = safe_read.resource(row, "cpus"), safe_read.resource(row, "memory")
        one.gpus, one.job = gpus.get(name), str(row.get("job") or "")
        one.state = one.state or str(row.get("state") or "")
    return sorted(found.values(), key=lambda n: (tuple(-t for t in n.trouble), n.name))
