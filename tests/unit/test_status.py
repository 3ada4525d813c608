"""`raylaunch status`, of state directories made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_runs import Made

from raylaunch.cli import cli
from raylaunch.observe import status
from raylaunch.scheduler.backends import SlurmBackend
from raylaunch.state.records import Cluster

REASON = "the same error 2 times: rank 1: KeyError: [red]\n" + "far " * 100


def shown(run: Path, state: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of a run in this state, whose cluster is gone."""
    (run.parents[1] / "clusters" / run.name / "ended.json").write_text("{}")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"state": state, "reason": REASON}))
    monkeypatch.setattr(SlurmBackend, "states", lambda *_: {})
    done = CliRunner().invoke(cli, ["status", "--all", "--state-dir", str(run.parents[1])])
    assert done.exit_code == 0, done.output
    return done.output


def test_why_a_run_failed_stands_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Made(tmp_path, "bug", 600.0, 2, 0, 0, 2.0, 50, state="failed", load=False).write()
    assert "  bug: the same error 2 times: rank 1: KeyError: [red] far far" in shown(run, "failed", monkeypatch)
    assert all(len(line) <= 200 for line in shown(run, "failed", monkeypatch).splitlines())
    assert "the same error" not in shown(run, "finished", monkeypatch)


def test_a_cluster_whose_table_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    clusters = tmp_path / "clusters"
    for name in ("bad", "good"):
        (clusters / name).mkdir(parents=True)
        Cluster(name, "local", 1, "canary", 0.0, 1, 8, 1).write(clusters / name / "cluster.json")
    (clusters / "bad" / "members.json").write_text('{"canary": []}')
    bad, good = status.gather(tmp_path, with_ended=True)["clusters"]
    assert (bad["state"], good["state"]) == ("unknown", "down")
    assert "members.json" in bad["error"] and good["error"] is None


def test_nothing_is_under_way_in_a_run_that_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Made(tmp_path, "cut", 600.0, 2, 0, 0, 2.0, 50, state="running", load=False).write()
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    rows[-2] |= {"how": "fault", "committed": 250}
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = shown(run, "running", monkeypatch)
    assert "interrupted" in said and "cut: last recovery: fault, cut short" in said and "under way" not in said
