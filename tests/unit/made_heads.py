"""Heads made by hand: a cluster directory, members without connections, no agent, no Ray, no Slurm."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from raylaunch.cluster.head import HeadController
from raylaunch.cluster.membership.control_channel import ControlServer, Member
from raylaunch.config.schema import Config
from raylaunch.state import event_log, files, records, runs
from raylaunch.state.members import NodeInfo
from raylaunch.state.records import Cluster, Head


class Place:
    """A cluster directory, and heads that lead it one after the other."""

    def __init__(self, state_dir: Path, backend: str = "local", life: str = "local") -> None:
        self.state_dir, self.life = state_dir, life
        self.directory = state_dir / "clusters" / "main"
        for part in (records.REQUESTS, records.INCARNATIONS, records.LOGS, records.NODES):
            (self.directory / part).mkdir(parents=True)
        self.cluster = Cluster("main", backend, 1, "canary", 0.0, 1, 8, 1, (life.partition(":")[0],))
        self.cluster.write(self.directory / records.CLUSTER_FILE)
        self.stopped: list[str] = []
        self.resigned: list[str] = []

    def head(self, incarnation: int) -> Head:
        return Head("canary", incarnation, "n1", "n1", "127.0.0.1", 1, "", 1, float(incarnation), self.life)

    def lead(self, incarnation: int, config: Config | None = None, nodes: int = 4) -> HeadController:
        """The head of the next incarnation, which has claimed it."""
        assert records.claim(self.directory, incarnation, "n1")
        head = HeadController(
            self.directory, self.cluster, config or Config(), self.head(incarnation), ControlServer("t", lambda: "lost"), {},
            self.stopped.append, self.resigned.append, nodes,
        )  # fmt: skip
        head.context.recall(nodes)
        return head

    def run(self, name: str, condition: str = "queued") -> Path:
        """A run that was handed over; its directory."""
        directory = files.run_dir(self.state_dir, name)
        files.make_dir(directory.parent)
        with runs.prepared(directory, Config(), "main") as record:
            record.save(directory, state=condition)
        return directory

    def read(self, name: str) -> Any:
        return json.loads((self.directory / name).read_text())

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return event_log.read(self.directory, *kinds)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def joined(head: HeadController, *nodes: str, job: str = "1") -> None:
    """These nodes are here and ready, without anything being told of it."""
    for index, node in enumerate(nodes):
        head.table.members.table[node] = Member(node, NodeInfo(state="ready", pid=index, job=job))


def heard(head: HeadController, node: str, **info: Any) -> None:
    """The head knows this of a node, without anything being told of it."""
    member = head.table.members.table[node]
    member.info = member.info.model_copy(update=info)


def lost(head: HeadController, *nodes: str, ago: float = 0.0) -> None:
    for node in nodes:
        member = head.table.members.table[node]
        member.alive, member.since = False, member.since - ago
