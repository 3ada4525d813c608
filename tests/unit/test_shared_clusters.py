"""What the Slurm tests share (tests/slurm/shared.py): one cluster per spec, and a new one after a failure."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import shared
from helpers import Done, Site
from shared import Ground, Spec


class FakeSandbox:
    """What Ground and Site need of a sandbox."""

    made: list[FakeSandbox]

    def __init__(self, name: str, directory: Path) -> None:
        self.spec, self.is_up = SimpleNamespace(name=name), True
        self.layout = SimpleNamespace(state=directory)
        directory.mkdir()

    def down(self) -> None:
        self.is_up = False


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    made: list[FakeSandbox] = []

    def up(name: str, **sizes: int) -> FakeSandbox:
        made.append(FakeSandbox(name, tmp_path / name))
        return made[-1]

    monkeypatch.setattr(FakeSandbox, "made", made, raising=False)
    monkeypatch.setattr(shared, "Sandbox", SimpleNamespace(up=up))
    monkeypatch.setattr(shared, "leftovers", lambda layout: [])
    monkeypatch.setattr(Site, "run", lambda self, *words, **options: Done("up", 0, "", ""))
    return Ground("test", {})


def test_who_asks_for_the_same_gets_the_same(ground: Ground) -> None:
    first = ground.cluster(Spec(2))
    assert ground.cluster(Spec(2)) is first and ground.cluster(Spec(3)) is not first
    assert len(FakeSandbox.made) == 1


def test_after_a_failure_there_is_a_new_one(ground: Ground) -> None:
    first = ground.cluster(Spec(2))
    ground.dirty = True
    second = ground.cluster(Spec(2))
    assert second is not first and second.site.state != first.site.state
    assert [one.is_up for one in FakeSandbox.made] == [False, True]
    assert ground.cluster(Spec(2)) is second


def test_closing_takes_down_what_there_is(ground: Ground) -> None:
    ground.close()
    ground.site()
    ground.close()
    ground.close()
    assert [one.is_up for one in FakeSandbox.made] == [False]
