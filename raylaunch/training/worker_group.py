"""What the training loop needs of Ray, as it sees it: nodes, and groups of workers on them. `attempt` has the real one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raylaunch.training.policy import AttemptOutcome
from raylaunch.training.worker.main import WorkerSpec


@dataclass(frozen=True)
class RayNode:
    """A node that Ray holds for alive."""

    name: str
    id: str
    gpus: int


@dataclass(frozen=True)
class WorkerGroupSpec:
    """The worker group of one attempt."""

    name: str
    nodes: tuple[RayNode, ...]
    workers_per_node: int
    spec: WorkerSpec
    storage: Path
    """For Ray Train's own files."""
    comm_timeout: int
    backend: str | None = None
    """Of its process group; None: NCCL on GPUs, else gloo."""

    @property
    def world(self) -> int:
        return len(self.nodes) * self.workers_per_node

    @property
    def on(self) -> frozenset[str]:
        return frozenset(node.name for node in self.nodes)


class WorkerGroup(Protocol):
    """Workers that train together."""

    def fit(self) -> AttemptOutcome | None:
        """Run it to its end; how it ended, as far as Ray can tell: None without an error."""

    def abort(self) -> None:
        """End it at once, from another thread; `fit` then returns."""


class RayCluster(Protocol):
    """Ray on this cluster."""

    def alive(self) -> Mapping[str, RayNode]:
        """The nodes that Ray holds for alive, by our names."""

    def draining(self) -> frozenset[str]:
        """Those of them that Ray itself drains."""

    def group(self, order: WorkerGroupSpec) -> WorkerGroup:
        """A group that is ready to `fit`."""


class Newest:
    """Ray's rows of nodes by our names: of a node that came back, the newest id counts."""

    def __init__(self) -> None:
        self._known: dict[str, None] = {}
        """Ids in the order in which they were first seen."""

    def of(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, RayNode]:
        alive = {str(row["NodeID"]): row for row in rows if row["Alive"]}
        self._known |= dict.fromkeys(alive)
        return {
            str(row["NodeName"]): RayNode(str(row["NodeName"]), id_, int(row["Resources"].get("GPU", 0)))
            for id_ in self._known if (row := alive.get(id_)) is not None
        }  # fmt: skip
