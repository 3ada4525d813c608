"""`raylaunch status`, of state directories made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_runs import Made

from raylaunch.cli import cli
from raylaunch.scheduler.backends import SlurmBackend

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


def test_nothing_is_under_way_in_a_run_that_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Made(tmp_path, "cut", 600.0, 2, 0, 0, 2.0, 50, state="running", load=False).write()
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    rows[-2] |= {"how": "fault", "committed": 250}
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = shown(run, "running", monkeypatch)
    assert "interrupted" in said and "cut: last recovery: fault, cut short" in said and "under way" not in said
