"""A cluster for the training loop without processes: a directory, a clock that only sleeping moves, and a Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.state import files, records, runs
from raylaunch.state.records import Cluster
from raylaunch.training.policy import AttemptOutcome
from raylaunch.training.worker_group import RayNode, WorkerGroupSpec


class Clock:
    """Starts at 1000; `at` does something when it is so late."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._due: list[tuple[float, Callable[[], object]]] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        due = sorted((d for d in self._due if d[0] <= self.now), key=lambda d: d[0])
        self._due = [d for d in self._due if d[0] > self.now]
        for _, work in due:
            work()
        assert self.now < 1e5, "waits for ever"

    def at(self, seconds: float, work: Callable[[], object]) -> None:
        self._due.append((1000.0 + seconds, work))


@dataclass
class Made:
    """STATE/clusters/main and STATE/runs/r, and what is written there."""

    state_dir: Path
    config: Config = field(default_factory=Config)

    def __post_init__(self) -> None:
        self.directory = files.make_dir(files.cluster_dir(self.state_dir, "main"))
        files.make_dir(self.directory / records.REQUESTS)
        self.record = Cluster("main", "local", 1, "c", 0.0, 1, 9, 2, ("7",))
        self.record.write(self.directory / records.CLUSTER_FILE)
        self.run_dir = files.run_dir(self.state_dir, "r")
        with runs.prepared(self.run_dir, self.config, "main"):
            pass
        self.config = loader.load_resolved(self.run_dir / records.CONFIG_FILE)
        self.nodes: dict[str, str] = {}

    def members(self, incarnation: int = 1, **nodes: str) -> None:
        """The table, changed by these nodes' states."""
        self.nodes |= nodes
        rows = [{"name": name, "state": what} for name, what in self.nodes.items()]
        files.write_json(
            self.directory / records.MEMBERS_FILE, {"incarnation": incarnation, "nodes": rows, "ends": 77.0}
        )

    def head(self, incarnation: int) -> None:
        head = records.Head("c", incarnation, "a", "host", "127.0.0.1", 20000, "g", 1, 0.0)
        head.write(self.directory / records.HEAD_FILE)

    def requests(self) -> list[dict[str, Any]]:
        return [files.read_json(path) for path in sorted((self.directory / records.REQUESTS).iterdir())]

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [row for row in files.read_lines(self.run_dir / "events.jsonl") if not kinds or row["kind"] in kinds]

    def finish(self, attempt: int, outcome: str, step: int) -> None:
        """The trainer's word."""
        folder = files.make_dir(files.attempt_dir(self.run_dir, attempt))
        files.write_json(folder / "outcome.json", {"outcome": outcome, "step": step})


Work = Callable[[WorkerGroupSpec], AttemptOutcome | None]


class FakeGroup:
    def __init__(self, order: WorkerGroupSpec, work: Work) -> None:
        self.order, self._work, self.aborted = order, work, 0

    def fit(self) -> AttemptOutcome | None:
        return self._work(self.order)

    def abort(self) -> None:
        self.aborted += 1


class FakeRay:
    """Knows these nodes; each group does the next piece of `work`."""

    def __init__(self, *names: str) -> None:
        self.names, self.leaving = list(names), frozenset[str]()
        self.work: list[Work] = []
        self.groups: list[FakeGroup] = []

    def alive(self) -> Mapping[str, RayNode]:
        return {name: RayNode(name, f"id of {name}", 0) for name in self.names}

    def draining(self) -> frozenset[str]:
        return self.leaving

    def group(self, order: WorkerGroupSpec) -> FakeGroup:
        self.groups.append(FakeGroup(order, self.work.pop(0)))
        return self.groups[-1]
