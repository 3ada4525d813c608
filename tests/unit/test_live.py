"""The live view: what is read of the files, and that it fits whatever terminal there is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import UsageError
from raylaunch.observe.live import braille_plot, screen, snapshot
from raylaunch.observe.live.snapshot import Picture, Point
from raylaunch.observe.why.run import last_failure
from raylaunch.scheduler.backends import Job
from raylaunch.state import event_log, files, records
from raylaunch.state.head_state import HeadState
from raylaunch.state.records import Cluster
from raylaunch.state.runs import Run
from raylaunch.tools.chaos import recovery_summary

NOW = 1_700_000_000.0


def node(name: str, state: str = "ready", strikes: int = 0, **load: Any) -> dict[str, Any]:
    return {"name": name, "state": state, "role": "worker", "strikes": strikes, "load": load}


def picture(nodes: int = 3, points: int = 50, **changes: Any) -> Picture:
    rows = [
        node(f"n{i}", cpu=0.5, memory=0.2, gpu=0.9, gpu_memory=0.7, watts=5000, temperature=60) for i in range(nodes)
    ]
    run = Run("llama", "running", "main", NOW, attempt=3, world_size=24, nodes=3)
    curve = tuple(Point(NOW + i, i + 1, 9.0 - i / 10, 1e5, 24 - 8 * (i > 20)) for i in range(points))
    return Picture(**{
        "time": NOW + points, "cluster": "main", "state": "3 of 3 nodes ready", "nodes": tuple(rows), "run": run,
        "jobs": (Job("4711", "RUNNING", True, time_left=7500),), "max_steps": 1000, "next_save": 100, "points": curve,
        "step_seconds": 1.0, "ledger": {"goodput": 0.973, "recoveries": 2, "steps_lost": 4},
        "events": tuple((NOW + i, "commit", f"step={i}") for i in range(30)), **changes,
    })  # fmt: skip


def text(shown: Picture, view: str = "main", width: int = 120, height: int = 40, **more: Any) -> str:
    return "\n".join(line.plain for line in screen.lines(shown, view, width, height, **more))


def test_what_one_asks_first() -> None:
    shown = text(picture())
    for words in ("3 of 3 nodes ready", "job 4711 RUNNING, 2h 05m left", "llama", "attempt 3", "24 workers on 3 nodes",
                  "step 50 of 1000", "15m 50s to go", "loss 4.1", "100k tokens/s", "saves at 100, in 50s", "goodput 97%",
                  "2 recoveries, 4 steps lost", "GPU", "90%", "15.0 kW", "60 °C", "workers by time"):  # fmt: skip
        assert words in shown, words
    assert "no step for" not in shown
    assert "as of 1m 00s ago" in text(picture(), age=60.0)
    assert "no step for 1m 41s" in text(picture(time=NOW + 150))


@pytest.mark.parametrize("view", screen.VIEWS.values())
@settings(max_examples=25, deadline=None)
@given(width=st.integers(20, 250), height=st.integers(6, 80), nodes=st.integers(0, 1000), points=st.integers(0, 60))
def test_it_fits(view: str, width: int, height: int, nodes: int, points: int) -> None:
    logs = [("a/rank-0.log", ["word " * 100] * 200)]
    found = screen.lines(picture(nodes, points), view, width, height, logs)
    assert len(found) == height
    assert all(line.cell_len <= width for line in found)
    assert "quit" in found[-1].plain or width < 31


def test_the_worst_of_a_thousand_nodes_are_seen() -> None:
    rows = [node(f"n{i}", gpu=0.9) for i in range(1000)]
    rows[500] |= {"state": "lost"}
    rows[600]["load"]["throttled"] = "GPU 3: hardware thermal"
    rows[700]["load"]["gpu"] = 0.1
    shown = text(Picture(NOW, "main", nodes=tuple(rows)), "nodes", 120, 20)
    names = [line.split()[0] for line in shown.splitlines() if line.startswith("n") and line[1].isdigit()]
    assert names[:3] == ["n500", "n600", "n700"]
    assert "GPU 3: hardware thermal" in shown and "and 985 more" in shown


def test_a_cluster_without_a_run_and_one_without_anything() -> None:
    assert "no run" in text(Picture(NOW, "main", "2 of 2 nodes ready"))
    assert "not started yet" in text(Picture(0.0, "main"))
    assert "this command submits them (login nodes only)" in text(picture(cannot_submit="login nodes only"))


@given(st.lists(st.tuples(st.integers(0, 99), st.floats()), max_size=50), st.integers(0, 40), st.integers(0, 10))
def test_any_curve_is_drawn(points: list[tuple[int, float]], width: int, height: int) -> None:
    """Also one that goes back, as steps do that are done again."""
    rows, low, high = braille_plot.curve([float(x) for x, _ in points], [y for _, y in points], width, height)
    assert len(rows) == height and all(len(row) == width for row in rows)
    assert low <= high or math.isnan(low)


def test_a_line_is_a_line() -> None:
    rows, low, high = braille_plot.curve([0, 1, 2, 3], [0, 1, 2, 3], 2, 1)
    assert (rows, low, high) == (["⡠⠊"], 0, 3)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A local cluster whose processes are gone, with a run of 40,000 steps."""
    made = files.make_dir(tmp_path / "clusters" / "c")
    Cluster("c", "local", 1, "canary", NOW, 1, 2, 1).write(made / records.CLUSTER_FILE)
    HeadState("canary", running="r", wanted=2, strikes={"n2": 1}).write(made / records.DUTIES_FILE)
    files.write_json(made / records.MEMBERS_FILE, {"canary": "canary", "nodes": [
        {"name": "n1", "role": "head", "state": "ready"}, {"name": "n2", "role": "worker", "state": "ready"}]})  # fmt: skip
    run = files.make_dir(tmp_path / "runs" / "r")
    Run("r", "running", "c", NOW, attempt=1, world_size=2).write(run / records.RUN_FILE)
    files.write_text(run / records.CONFIG_FILE, loader.dump(Config()))
    event_log.write(run, "commit", step=5, seconds=1.0)
    rows = (
        {"step": i, "loss": 1 / i, "attempt": 1, "time": NOW + i, "world_size": 2, "tokens_per_s": 3.0}
        for i in range(1, 40_001)
    )
    (run / files.METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40001, "lo')
    return made


def test_a_long_run_is_read_thinly_and_goes_on(directory: Path) -> None:
    reader = snapshot.SnapshotReader(directory, None)
    first = reader.read()
    assert first.state == "interrupted: its job is gone" and first.nodes == ()
    assert len(first.points) <= snapshot.POINTS + 1 and first.points[0].step < 500 and first.points[-1].step > 39_000
    assert first.next_save == 200 and first.max_steps == 200  # the default's
    with (directory.parent.parent / "runs/r" / files.METRICS_FILE).open("a") as out:
        out.write('ss": 0.5, "attempt": 1, "time": 1700040003, "world_size": 2}\n')
    assert reader.read().points[-1].step == 40_001
    assert [kind for _, kind, _ in first.events] == ["commit"]


def test_it_is_found_by_the_name_of_the_run_or_of_the_cluster(directory: Path) -> None:
    where = directory.parent.parent
    assert snapshot.find(where, "r") == (directory, where / "runs" / "r")
    assert snapshot.find(where, "c") == snapshot.find(where, None) == (directory, None)
    with pytest.raises(UsageError, match="no cluster"):
        snapshot.find(where, "x")
    files.write_json(directory / records.ENDED_FILE, {"reason": "down"})
    with pytest.raises(UsageError, match="no cluster is running"):
        snapshot.find(where, None)
    assert snapshot.SnapshotReader(directory, None).read().state == "down: down"


def test_broken_files_leave_the_rest(directory: Path) -> None:
    (directory / records.MEMBERS_FILE).write_text("{")
    (directory.parent.parent / "runs/r" / records.CONFIG_FILE).write_bytes(b"\x00\xff")
    found = snapshot.SnapshotReader(directory, None).read()
    assert found.events and found.time
    assert text(found)


def test_events_with_values_of_wrong_types_are_no_mistake_of_ours(directory: Path) -> None:
    rows = [
        '{"time": NaN, "kind": "x"}',
        '{"time": 1e300, "kind": "x"}',
        '{"time": %s, "kind": "commit"}' % ("9" * 400),
    ]
    for value in ("[]", "{}", "1", "true", "null", '"x"', "9" * 400):
        for kind in ("attempt_started", "attempt_ended", "checkpoint_invalid", "strike", "submitted", "resumed"):
            fields = ", ".join(
                f'"{key}": {value}' for key in ("on", "step", "how", "job", "workers", "seconds", "phases")
            )
            rows.append(f'{{"time": 1796143600, "kind": "{kind}", "attempt": 1, {fields}}}')
    run = directory.parents[1] / "runs" / "r"
    for folder in (directory, run):
        with (folder / "events.jsonl").open("a") as out:
            out.write("".join(row + "\n" for row in rows))
    found = snapshot.SnapshotReader(directory, run).read()
    assert text(found) and not found.internal_errors and "x" not in {kind for _, kind, _ in found.events}
    recovery_summary.of(run, [], 0.0, 2e9, 1)
    assert last_failure(run) is None


def test_a_mistake_of_ours_is_shown(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rest of the picture, too; nothing is written into the cluster's directory."""

    def _run(_self: snapshot.SnapshotReader) -> dict[str, Any]:
        raise AttributeError("no such name")

    monkeypatch.setattr(snapshot.SnapshotReader, "_run", _run)
    found = snapshot.SnapshotReader(directory, None).read()
    assert found.events and "internal error (run): AttributeError: no such name" in text(found, width=150)


def test_a_mistake_in_the_metrics_is_an_event(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raylaunch.observe.prometheus.collector import ClusterCollector

    def _of_nodes(*_: object) -> Iterator[object]:
        raise KeyError("cpu")
        yield

    monkeypatch.setattr(ClusterCollector, "_of_nodes", _of_nodes)
    reader = ClusterCollector(directory)
    for _ in range(3):
        assert "raylaunch_run_step" in {family.name for family in reader.collect()}
    (told,) = event_log.read(directory, "internal_error")
    assert told["work"] == "metrics (_of_nodes)" and "KeyError: 'cpu'" in told["error"]
