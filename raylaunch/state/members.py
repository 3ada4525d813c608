"""members.json: the nodes of a cluster, as its head writes them, and what agents report about theirs.

Written by the head alone, whenever a row changes. `NodeInfo` also travels from each agent to the head
(see `control_channel`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from raylaunch.errors import StateError, first_problem
from raylaunch.state import files, records
from raylaunch.state.records import Cluster

OVER = frozenset({"ended", "failed"})
"""The states that an agent reports last."""


class NodeInfo(BaseModel):
    """What an agent reports about its node. Fields of another version are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    state: str
    """starting, ready, restarting, ended or failed."""
    address: str = ""
    hostname: str = ""
    pid: int | None = None
    """The agent's."""
    control_port: int = 0
    index: int | None = None
    """The node's place in its job."""
    joiner: bool = False
    job: str = ""
    ports: tuple[int, int] | None = None
    """The first and the last port of its block."""
    temp_dir: str = ""
    resources: dict[str, Any] = {}
    """See `host/resources`."""
    error: str | None = None
    warning: str | None = None
    left: int | None = None
    """Of an agent that ended: processes and directories that it could not remove."""

    def changed(self, news: NodeInfo) -> NodeInfo:
        """With what a later report has. (Agents of an earlier version report only what has changed.)"""
        return self.model_copy(update={name: getattr(news, name) for name in news.model_fields_set})


class MemberRow(NodeInfo):
    """One node in members.json. `state` may also be draining or lost."""

    name: str
    role: str = "worker"
    """head or worker."""
    since: float = 0.0
    """When it came into this state (Unix)."""

    def info(self) -> NodeInfo:
        """What its agent reported."""
        return NodeInfo(**{name: getattr(self, name) for name in NodeInfo.model_fields})


class Members(BaseModel):
    """members.json."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    canary: str = ""
    incarnation: int | None = None
    wanted: int = 0
    """Nodes that the head keeps; 0: as many as the base job got."""
    ends: float | None = None
    """When the base job's time is up (Unix), as far as the head knows."""
    internal_errors: dict[str, str] = {}
    """What fails in the head by a mistake of ours: work → error."""
    nodes: tuple[MemberRow, ...] = ()

    @classmethod
    def parse(cls, value: Any, path: Path) -> Self:
        """From JSON's objects; StateError, with the file's `path`, for what is not such a table."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise StateError(
                f"cannot read {path}: {first_problem(error)}", "Move the file away and try again."
            ) from error

    @classmethod
    def read(cls, directory: Path) -> Self:
        """A cluster's; an empty one before its head has written it. Raises StateError."""
        path = directory / records.MEMBERS_FILE
        value = files.read_json(path)
        return cls() if value is None else cls.parse(value, path)

    def node(self, name: str) -> MemberRow | None:
        return next((row for row in self.nodes if row.name == name), None)


NOBODY = Members()


def living(directory: Path, cluster: Cluster) -> Members:
    """The table of this life of the cluster; an empty one before its head has written it."""
    table = Members.read(directory)
    return table if table.canary == cluster.canary else NOBODY
