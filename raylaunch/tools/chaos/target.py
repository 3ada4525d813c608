"""The run that faults are done to, as its files show it: nodes, workers, commits, and how it goes on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylaunch.cluster import up
from raylaunch.config import loader
from raylaunch.errors import UsageError
from raylaunch.state import event_log, files, records, runs
from raylaunch.state.event_log import EventReader
from raylaunch.state.members import MemberRow, Members
from raylaunch.state.records import Cluster, Head

_FIRST_LINE = re.compile(r"raylaunch worker run=(\S+) attempt=(\d+) rank=(\d+) .*?node=(\S+) .*?pid=(\d+)")


@dataclass(frozen=True)
class Worker:
    """A training worker, by the first line of its log."""

    rank: int
    node: str
    pid: int


@dataclass
class Victim:
    """One run on one living cluster."""

    run_dir: Path
    cluster_dir: Path
    cluster: Cluster
    min_nodes: int
    _events: list[dict[str, Any]] = field(default_factory=list)
    _reader: EventReader | None = None

    @classmethod
    def of(cls, state_dir: Path, name: str) -> Victim:
        """The run of that name; UsageError when it does not run."""
        from raylaunch.observe.status import find_run

        run_dir, record = find_run(state_dir, name)
        if record.state in runs.FINAL:
            raise UsageError(f"run {name} is {record.state}", "Start it with `raylaunch train`.")
        directory, cluster = up.require_alive(state_dir, record.cluster)
        config = loader.load_resolved(run_dir / records.CONFIG_FILE)
        return cls(run_dir, directory, cluster, config.elastic.min_nodes or 1)

    def events(self) -> list[dict[str, Any]]:
        """All events so far."""
        if self._reader is None:
            self._reader = EventReader(self.run_dir)
        self._events += self._reader.read()
        return self._events

    @property
    def state(self) -> str:
        record = runs.Run.read(self.run_dir)
        return record.state if record is not None else "gone"

    @property
    def attempt(self) -> int:
        """The newest attempt that has started."""
        return max((int(e["attempt"]) for e in self.events() if e["kind"] == "attempt_started"), default=0)

    def commits(self, after: int) -> list[dict[str, Any]]:
        """Commits among the events behind the first `after` ones."""
        return [e for e in self.events()[after:] if e["kind"] == "commit"]

    @property
    def is_training(self) -> bool:
        """The newest attempt has committed, and nothing has been noticed against it."""
        kinds = [
            "withdraw" if e["kind"] == "decision" and e.get("decision") == "withdraw" else str(e["kind"])
            for e in self.events()
            if e.get("attempt") == self.attempt
        ]
        asked = [kind for kind in kinds if kind in {"resize_requested", "withdraw"}]
        leaves = asked[-1:] == ["resize_requested"]
        return "commit" in kinds and not leaves and not {"fault", "attempt_ended"} & set(kinds)

    def known(self) -> str:
        """What there is to say about a run that does not go on."""
        cluster = event_log.read_all(self.cluster_dir)
        nodes = ", ".join(f"{row.name} {row.state}" for row in self.members())
        return f"last of the run: {_shown(self.events())}; of the cluster: {_shown(cluster)}; nodes: {nodes or 'none'}"

    def members(self) -> tuple[MemberRow, ...]:
        return Members.read(self.cluster_dir).nodes

    def ready(self) -> list[str]:
        """Nodes that may train, by name."""
        return sorted(row.name for row in self.members() if row.state == "ready")

    def head(self) -> str:
        found = Head.read(self.cluster_dir)
        return found.node if found is not None else ""

    def agent(self, node: str) -> int:
        """The pid of a node's agent; 0 when it is not known."""
        return next((row.pid or 0 for row in self.members() if row.name == node), 0)

    def workers(self) -> list[Worker]:
        """The newest attempt's workers that have said where they are."""
        found = []
        for path in sorted(files.attempt_dir(self.run_dir, self.attempt).glob("rank-*.log")):
            with path.open(encoding="utf-8", errors="replace") as source:
                match = _FIRST_LINE.match(source.readline())
            if match is not None:
                found.append(Worker(int(match[3]), match[4], int(match[5])))
        return sorted(found, key=lambda w: w.rank)


def _shown(events: list[dict[str, Any]]) -> str:
    return str({k: v for k, v in events[-1].items() if k != "stack"})[:300] if events else "nothing"
