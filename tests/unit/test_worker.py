"""A worker around its trainer: the session it gets, and the word it leaves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from made_cluster import Made

from raylaunch.config.schema import Config
from raylaunch.errors import StateError
from raylaunch.state import files
from raylaunch.training.heartbeat_server import HeartbeatServer
from raylaunch.training.worker import main
from raylaunch.training.worker.heartbeat import DriverAddress, HeartbeatClient
from raylaunch.training.worker.main import Seat, WorkerSpec
from raylaunch.training.worker.session import Session
from raylaunch.training.worker_group import Newest

Trainer = Callable[[Config, Session], object]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Made]]:
    """Work as a rank of attempt 1 with this trainer."""
    module = ModuleType("a_trainer")
    monkeypatch.setitem(sys.modules, "a_trainer", module)
    server, pulses = HeartbeatServer("127.0.0.1", (), 2), list[HeartbeatClient]()

    def connected(*given: Any) -> HeartbeatClient:
        pulses.append(HeartbeatClient(*given))
        return pulses[-1]

    monkeypatch.setattr(main, "HeartbeatClient", connected)
    made = Made(tmp_path, Config.model_validate({"trainer": {"function": "a_trainer:train"}}))
    files.make_dir(files.attempt_dir(made.run_dir, 1))

    def work(train: Trainer, rank: int = 0) -> Made:
        module.train = train  # type: ignore[attr-defined]
        main.work(WorkerSpec(made.run_dir, 1, 3, 8, server.place()), Seat(rank, 2, 0, 1, "a", "cpu"))
        return made

    work.made = made  # type: ignore[attr-defined]
    yield work
    for pulse in pulses:
        pulse.close()
    server.close()


def test_the_trainer_gets_its_session(trained: Callable[..., Made]) -> None:
    got: list[Any] = []

    def train(config: Config, session: Session) -> None:
        got.append(
            (session.run, session.attempt, session.run_incarnation, session.world_size, session.global_batch_size)
        )
        session.report(step=1, loss=2.0)
        session.at_return = ("finished", 1)

    made = trained(train)
    assert got == [("r", 1, 3, 2, 8)] and made.events("workers_connected")[0]["workers"] == 2
    assert files.read_lines(made.run_dir / "metrics.jsonl")[0]["loss"] == 2.0
    assert files.read_json(files.attempt_dir(made.run_dir, 1) / "outcome.json") == {"outcome": "finished", "step": 1}


def test_an_error_is_left_as_a_file_and_raised(
    trained: Callable[..., Made], capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Config, session: Session) -> None:
        session.progress(7)
        session.report(step=7)
        raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="my own mistake"):
        trained(train, rank=1)
    record = files.read_json(files.attempt_dir(trained.made.run_dir, 1) / "rank-1.error.json")  # type: ignore[attr-defined]
    assert (record["exception"], record["message"], record["step"], record["node"]) == (
        "ValueError", "my own mistake", 7, "a",
    )  # fmt: skip
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_does_not_hide_the_error(trained: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StateError("the disk is full")

    def train(config: Config, session: Session) -> None:
        monkeypatch.setattr(files, "write_json", full)
        raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="my own mistake"):
        trained(train)


def test_a_token_is_not_shown() -> None:
    spec = WorkerSpec(Path("r"), 4, 1, 8, DriverAddress("127.0.0.1", 1, "hidden"))
    assert "hidden" not in repr(spec)  # Ray writes down what a worker is given


def test_of_a_node_that_came_back_the_newest_id_counts() -> None:
    def row(name: str, id_: str, alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"NodeName": name, "NodeID": id_, "Alive": alive, "Resources": resources}

    newest = Newest()
    assert [node.id for node in newest.of([row("a", "1", GPU=4.0), row("b", "2")]).values()] == ["1", "2"]
    found = newest.of([row("a", "3"), row("a", "1", GPU=4.0), row("b", "2", alive=False)])
    assert {name: node.id for name, node in found.items()} == {"a": "3"}  # Ray still believes in the old one
    assert newest.of([row("a", "1", GPU=4.0)])["a"].gpus == 4
