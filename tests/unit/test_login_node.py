"""The node loop on the login node, on a fake Slurm: what it asks of the head, and when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_node_loop import Place

from raylaunch.checkpoint.events import Event
from raylaunch.cluster.node_loop import login_node
from raylaunch.cluster.node_loop.login_node import ASK_AGAIN, LoginLoop
from raylaunch.scheduler.backends import SlurmBackend
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.state import event_log, files, records


class Login:
    """A cluster of two nodes, watched from the login node."""

    def __init__(self, directory: Path) -> None:
        self.place = Place(directory)
        self.said: list[Event] = []
        backend = SlurmBackend(Slurm(self.place.slurm))
        self.loop = LoginLoop(directory, self.place.config, backend, self.said.append, lambda: self.place.now)
        self.write("ready")

    def write(self, condition: str) -> None:
        """members.json, with n2 in this state."""
        rows = [self.place.rows[0], {**self.place.rows[1], "state": condition}]
        files.write_json(self.place.directory / records.MEMBERS_FILE, {"canary": "ab12", "nodes": rows})

    def turn(self, seconds: float = 2.0) -> str | None:
        self.place.now += seconds
        return self.loop.turn()

    def asked(self) -> list[str]:
        """The nodes that the head is asked to drain; asked is taken."""
        paths = sorted((self.place.directory / records.REQUESTS).glob("*.json"))
        found = [str(files.read_json(path)["node"]) for path in paths]
        for path in paths:
            path.unlink()
        return found


@pytest.fixture
def login(tmp_path: Path) -> Iterator[Login]:
    yield Login(tmp_path / "main")


def test_a_drain_is_asked_for_once_while_the_head_sees_to_it(login: Login) -> None:
    login.place.slurm.nodes["n2"] = "draining"
    assert login.turn() is None and login.asked() == ["n2"]
    assert login.turn() is None and login.asked() == []
    login.write("draining")
    for _ in range(5):
        assert login.turn(ASK_AGAIN) is None and login.asked() == []


def test_a_node_that_comes_anew_is_asked_for_again(login: Login) -> None:
    """Its head has forgotten that it drains, or never heard of it."""
    login.place.slurm.nodes["n2"] = "draining"
    login.turn()
    login.write("draining")
    login.turn()
    assert login.asked() == ["n2"]
    login.write("ready")
    login.turn(ASK_AGAIN / 2)
    login.turn(ASK_AGAIN)
    assert login.asked() == ["n2"]


def test_it_ends_with_the_cluster(login: Login) -> None:
    assert login.turn() is None and login.loop.pause > 0
    files.write_json(login.place.directory / records.ENDED_FILE, {"reason": "down"})
    assert login.turn() == "down"


def test_it_does_not_watch_the_next_life(login: Login) -> None:
    replace(login.place.cluster, canary="new").write(login.place.directory / records.CLUSTER_FILE)
    assert login.turn() == "it was brought up anew"


def test_what_it_does_is_an_event_of_the_cluster(login: Login) -> None:
    login.place.slurm.jobs["7"][1] = "CANCELLED"
    login.place.rows[0]["state"] = "lost"
    login.write("lost")
    assert "cancelled" in str(login.turn(100.0))
    rows = event_log.read_all(login.place.directory)
    assert [row["by"] for row in rows] == ["watch"] and login.said[0].values()["decision"] == "give_up"


def test_the_command_turns_it_until_then(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    over = iter([None, None, "down"])
    monkeypatch.setattr(LoginLoop, "turn", lambda _: next(over))
    pauses: list[float] = []
    monkeypatch.setattr(login_node, "time", SimpleNamespace(time=lambda: 0.0, sleep=pauses.append))
    place = login.place
    assert login_node.watch(place.directory, place.config, SlurmBackend(Slurm(place.slurm)), print) == "down"
    assert len(pauses) == 2
