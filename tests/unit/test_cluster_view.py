"""What a driver reads of its cluster: states and how long, who is head, and nothing of an older head's table."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_cluster import Clock, Made

from raylaunch.state import files, records
from raylaunch.training.cluster_view import ClusterView
from raylaunch.training.policy import TrainingNode


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_nodes_are_ready_for_as_long_as_we_have_seen_them_so(made: Made) -> None:
    clock = Clock()
    roster = ClusterView(made.directory, 1, clock)
    assert roster.nodes() == {} and roster.end() is None
    made.members(a="ready", b="starting")
    assert roster.nodes() == {"a": TrainingNode("ready", 0), "b": TrainingNode("starting", 0)} and roster.end() == 77.0
    clock.sleep(5)
    made.members(b="ready")
    assert roster.nodes() == {"a": TrainingNode("ready", 5), "b": TrainingNode("ready", 0)}
    made.members(a="restarting")
    assert roster.nodes()["a"] == TrainingNode("restarting", 0)
    clock.sleep(5)
    made.members(a="ready")
    assert roster.nodes()["a"] == TrainingNode("ready", 0)  # counted anew


def test_the_table_of_an_older_head_says_nothing(made: Made) -> None:
    roster = ClusterView(made.directory, 2, Clock())
    made.members(1, a="ready")
    assert roster.nodes() == {} and roster.end() is None
    made.members(2, a="ready")
    assert set(roster.nodes()) == {"a"}


def test_a_file_is_read_again_only_when_it_has_changed(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made.members(a="ready")
    roster, reads, real = ClusterView(made.directory, 1, Clock()), list[Path](), files.read_json
    monkeypatch.setattr(files, "read_json", lambda path: [reads.append(path), real(path)][1])
    for _ in range(3):
        roster.nodes()
    assert len(reads) == 1


def test_a_newer_head_fences_this_driver(made: Made) -> None:
    roster = ClusterView(made.directory, 2, Clock())
    assert not roster.fenced() and roster.pulse_place() == ("127.0.0.1", ())
    made.head(2)
    assert not roster.fenced() and roster.pulse_place()[0] == "127.0.0.1" and roster.pulse_place()[1]
    made.head(3)
    assert roster.fenced()


def test_excluded_nodes(made: Made) -> None:
    roster = ClusterView(made.directory, 1, Clock())
    assert roster.excluded() == frozenset()
    files.write_json(made.directory / records.DUTIES_FILE, {"excluded": ["b"]})
    assert roster.excluded() == {"b"}
