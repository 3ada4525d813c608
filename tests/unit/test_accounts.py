"""What there was, who held what, and who asked for it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made_runs import NOW, Made

from raylaunch.cli import cli
from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import RunError, SlurmUnavailable, UsageError
from raylaunch.observe.history import accounting, node_hours
from raylaunch.observe.history.timeline import Attempt, settled
from raylaunch.observe.report.gather import gather
from raylaunch.scheduler import backends
from raylaunch.scheduler.backends import Job
from raylaunch.state import audit, files, provenance, records, runs

DAY = 86400.0


class Silent:
    """A Slurm that does not answer."""

    def states(self, directory: Path, ids: Any) -> dict[str, Job]:
        raise SlurmUnavailable("it is silent")


class Knows:
    """A Slurm that says RUNNING of these jobs."""

    def __init__(self, *jobs: str) -> None:
        self.jobs, self.asked = jobs, 0

    def states(self, directory: Path, ids: Any) -> dict[str, Job]:
        self.asked += 1
        return {job: Job(job, "RUNNING", True) for job in self.jobs}


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A run that finished ten days ago, one of yesterday, one that goes on."""
    Made(tmp_path, "old", 7200.0, 4, 8, 2, 60.0, 10, load=False, began=NOW - 10 * DAY).write()
    Made(
        tmp_path, "new", 3600.0, 2, 0, 0, 60.0, 10, load=False, began=NOW - DAY, config="slurm:\n  account: null\n"
    ).write()
    Made(tmp_path, "going", 1800.0, 2, 4, 0, 60.0, 10, state="running", load=False, began=NOW - 1800).write()
    return tmp_path


def event(time: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": time, "kind": kind, **fields}


# -- hours ---------------------------------------------------------------------------------------------------


def test_holds() -> None:
    rows = settled([
        event(0, "submitted", job="1"), event(10, "head_started", node="a"), event(10, "node_joined", node="a"),
        event(12, "node_joined", node="b"), event(13, "node_ready", node="b"), event(100, "node_lost", node="b"),
        event(150, "joiner_submitted", job="2"), event(200, "node_joined", node="c"), event(210, "node_joined", node="a"),
        event(300, "requeued", job="1"), event(400, "node_joined", node="a"), event(500, "ended", reason="down"),
        event(501, "cluster_down"),
        event(1000, "submitted", job="3"), event(1010, "node_joined", node="a"), event(1050, "node_strike", node="a"),
        event(5000, "submitted", job="4"), event(5010, "node_joined", node="a"),
    ])  # fmt: skip
    lives, holds = node_hours.lives(rows, until=5110.0)
    held = [(h.node, h.start, h.end) for h in holds]
    assert held[:5] == [("b", 12, 100), ("a", 10, 300), ("c", 200, 300), ("a", 400, 500), ("a", 1010, 5000)]
    assert held[5:] == [("a", 5010, 5110)]
    assert [life.jobs for life in lives] == [["1", "2"], ["3"], ["4"]] and lives[0].nodes == 2
    assert (lives[0].ended, lives[0].reason, lives[1].ended) == (500, "down", None)
    assert node_hours.lives(rows[:16], until=0.0)[1][-1].end == 1050  # killed, and nothing is known of it after
    assert node_hours.node_seconds(holds, [(0, 50), (250, 450)]) == {"a": 40 + 50 + 50, "b": 38, "c": 50}


def test_a_runs_own_time() -> None:
    rows = [event(1, "queued"), event(5, "finished"), event(9, "queued"), event(10, "attempt_started", attempt=2)]
    assert node_hours.active(rows, 20) == [(1, 5), (9, 20)] and node_hours.active(rows[:2], 20) == [(1, 5)]
    lost, last = Attempt(1, 1, 10.0, 4, 0, ("a",)), Attempt(2, 2, 100.0, 2, 0, ("b", "c"))
    lost.connected = 30.0
    assert [span for _, span in node_hours.spans([lost, last], 160.0)] == [(10, 30), (100, 160)]
    assert node_hours.gpu_seconds([lost, last], {"a": 1, "b": 0, "c": 0}, 160.0) == 4 * 20
    assert node_hours.active([], 20) == [] and node_hours.active(rows[3:], 2) == [(10, 10)]


# -- history ---------------------------------------------------------------------------------------------------


def test_history(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Knows("4711")
    monkeypatch.setattr(backends, "of", lambda name: slurm)
    found = accounting.gather(where, NOW)
    assert [(r.run, r.state, r.account) for r in found.runs] == [
        ("old", "finished", "nlp-project"), ("new", "finished", None), ("going", "running", "nlp-project"),
    ]  # fmt: skip
    assert [(c.cluster, c.state, c.jobs) for c in found.clusters][-1] == ("going", "up", ["4711"]) and slurm.asked == 1
    old, new, going = found.runs
    assert old.took == pytest.approx(7200, abs=70) and old.nodes == 4 and old.steps and old.steps > 90
    assert new.node_hours == pytest.approx(2 * (3600 - 31) / 3600, rel=0.02) and new.gpu_hours == 0
    assert going.ended is None and going.gpu_hours == pytest.approx(4 * (going.node_hours or 0))
    report = gather(where / "runs" / "old", now=NOW)
    assert old.node_hours == pytest.approx(report.cost.node_hours) and old.gpu_hours == report.cost.gpu_hours_held
    assert [r.run for r in accounting.gather(where, NOW, NOW - 2 * DAY).runs] == ["new", "going"]


def test_what_is_broken_hides_nothing(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "of", lambda name: Silent())
    (where / "runs" / "torn").mkdir()
    (where / "runs" / "torn" / "run.json").write_text('{"name": "to')
    (where / "runs" / "odd").mkdir()
    (where / "runs" / "odd" / "run.json").write_text('{"name": 3, "state": [], "cluster": null, "created": "x"}')
    (where / "runs" / "empty").mkdir()
    (where / "clusters" / "odd").mkdir()
    (where / "clusters" / "odd" / "cluster.json").write_text("[]")
    (where / "runs" / "old" / "events.jsonl").write_bytes(b"\x00\xff\n" * 100)
    shutil.rmtree(where / "clusters" / "new")
    found = accounting.gather(where, NOW)
    rows = {r.run: r for r in found.runs}
    assert rows["torn"].state == rows["odd"].state == rows["empty"].state == "unreadable" and rows["torn"].reason
    assert rows["old"].state == "finished" and rows["old"].node_hours is None
    assert rows["new"].node_hours == pytest.approx(2 * (3600 - 40) / 3600, rel=0.02)  # by its attempts alone
    assert rows["going"].state == "running" and "silent" in found.trouble[0]
    assert {c.cluster: c.state for c in found.clusters} == {"old": "down", "going": "unknown", "odd": "unreadable"}
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_cluster_that_was_killed(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "of", lambda name: Knows())
    os.utime(where / "clusters" / "going" / "members.json", (NOW - 1700, NOW - 1700))
    found = accounting.gather(where, NOW + 50 * DAY)
    assert found.runs[-1].state == "interrupted" and found.clusters[-1].state == "lost"
    assert (found.clusters[-1].node_hours or 0) < 2 * 0.52  # up to the last sign of its run


def test_the_command(where: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "of", lambda name: Knows("4711"))
    there = ["--state-dir", str(where)]
    done = CliRunner().invoke(cli, ["history", *there])
    assert done.exit_code == 0 and all(word in done.output for word in ("old", "nlp-project", "GPU-hours"))
    assert set(json.loads(CliRunner().invoke(cli, ["history", "--json", *there]).output)) == {
        "runs", "clusters", "trouble",
    }  # fmt: skip
    monkeypatch.setattr("raylaunch.cli.history.table_width", lambda: 40)
    done = CliRunner().invoke(cli, ["history", *there])
    assert done.exit_code == 0 and max(map(len, done.output.splitlines())) <= 40
    for bad in ("2x", "", "99999999999999d"):
        assert isinstance(
            CliRunner().invoke(cli, ["history", "--since", bad, *there]).exception, (UsageError, type(None))
        )
    assert "nothing yet" in CliRunner().invoke(cli, ["history", "--state-dir", str(tmp_path / "none")]).output


# -- the audit trail -------------------------------------------------------------------------------------------


def test_the_audit_trail(tmp_path: Path) -> None:
    config = loader.load(None, ["slurm.env.KEY=${HOME}", "slurm.env.OTHER=secret"], user_file=None)
    told: list[str] = []
    audit.add(tmp_path / "state", "up", told.append, cluster="main", config=config)
    audit.add(tmp_path / "state", "scale", told.append, cluster="main", nodes=4)
    path = tmp_path / "state" / audit.FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and not told
    first, second = audit.read(tmp_path / "state")
    assert first["action"] == "up" and first["uid"] == os.getuid() and first["user"] == audit.user() and first["host"]
    assert len(first["config"]) == 64 and "secret" not in path.read_text()
    assert second["nodes"] == 4 and "config" not in second
    written = tmp_path / "config.yaml"
    files.write_text(written, loader.dump(config))
    assert subprocess.run(["sha256sum", written], capture_output=True, text=True).stdout.split()[0] == first["config"]
    path.write_bytes(path.read_bytes() + b'{"torn": \n\x00\xff\n[1]\n')
    assert len(audit.read(tmp_path / "state")) == 2


def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / audit.FILE).symlink_to("/dev/full")
    told: list[str] = []
    audit.add(tmp_path, "stop", told.append, run="x")
    assert len(told) == 1 and told[0].startswith("warning: ") and "No space left" in told[0]
    audit.add(Path("/proc/nowhere"), "stop", told.append, run="x")
    assert len(told) == 2


def test_commands_leave_their_line(where: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked, whatever came of it; nothing for what only looks."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "of", lambda name: Knows("4711"))
    (where / "clusters" / "going" / "requests").mkdir()
    config = loader.dump(Config())
    for path in (where / "runs" / "going", where / "clusters" / "going"):
        files.write_text(path / "config.yaml", config)

    def call(*command: str) -> None:
        done = CliRunner().invoke(cli, [*command, "--state-dir", str(where)])
        assert done.exit_code == 0, (command, done.output, done.exception)

    call("stop", "going", "--no-wait")
    call("scale", "going", "1", "--no-wait")
    done = CliRunner().invoke(cli, ["checkpoints", "--state-dir", str(where), "going", "gc"])
    assert done.exit_code == 0, done.output
    call("status")
    call("history")
    rows = audit.read(where)
    assert [(r["action"], r.get("run"), r.get("cluster")) for r in rows] == [
        ("stop", "going", "going"), ("scale", None, "going"), ("checkpoints gc", "going", None),
    ]  # fmt: skip
    shown = CliRunner().invoke(cli, ["history", "--audit", "--state-dir", str(where)]).output
    assert "scale nodes=1" in shown and f"{audit.user()}@" in shown
    assert (
        json.loads(CliRunner().invoke(cli, ["history", "--audit", "--json", "--state-dir", str(where)]).output)["audit"]
        == rows
    )


def test_what_was_refused_does_not_look_like_what_was_done(
    where: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "of", lambda name: Knows("4711"))
    up = ["up", "--name", "going", "--no-wait", "--state-dir", str(where)]
    assert isinstance(CliRunner().invoke(cli, up).exception, UsageError)  # one of that name lives
    going = where / "clusters" / "going"
    monkeypatch.setattr("raylaunch.cluster.up.submit", lambda *_: (going, records.Cluster.read(going)))
    assert CliRunner().invoke(cli, [*up, "--name", "other"]).exit_code == 0
    assert [row.get("outcome") for row in audit.read(where)] == ["refused", None]
    shown = CliRunner().invoke(cli, ["history", "--audit", "--state-dir", str(where)]).output
    assert shown.count("up (refused)") == 1 and len(shown.splitlines()) == 3


# -- the state of the code ----------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    path = tmp_path / "repository"
    path.mkdir()
    (path / "train.py").write_text("1\n")
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for words in (["init", "-q", "-b", "trunk"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", path, *words], check=True, capture_output=True)
    return path


def test_the_state_of_the_code(repository: Path, tmp_path: Path) -> None:
    clean = provenance.git_state(repository, 20.0)
    assert clean is not None and len(clean.pop("commit")) == 40
    assert clean == {"branch": "trunk", "dirty": False, "changed": 0}
    (repository / "train.py").write_text("2\n")
    (repository / "output.log").write_text("untracked\n")
    dirty = provenance.git_state(repository, 20.0)
    assert dirty is not None and dirty["dirty"] is True and dirty["changed"] == 1
    assert provenance.git_state(tmp_path, 20.0) is None and provenance.git_state(tmp_path / "none", 20.0) is None


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # it is not waited for
def test_git_that_hangs_or_is_missing_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "git"
    slow.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\nexec sleep 3600\n")  # longer than any test may take
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert provenance.git_state(tmp_path, 0.1) is None
    assert len((tmp_path / "pids").read_text().split()) <= 1  # it is not asked again
    monkeypatch.setenv("PATH", "/nowhere")
    assert provenance.git_state(tmp_path) is None


def test_a_hand_over_records_it(repository: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    config = loader.load(None, [f"trainer.chdir={repository}"], user_file=None)
    with runs.prepared(run, config, "main"):
        assert not (run / provenance.FILE).exists()  # the hand-over does not wait for it
    longer = loader.load(None, [f"trainer.chdir={repository}", "step_scheduler.max_steps=300"], user_file=None)
    with runs.prepared(run, longer, "main"):
        pass
    first, second = provenance.read(run)
    assert first["versions"]["python"] and first["git"]["branch"] == "trunk" and second["time"] >= first["time"]
    with pytest.raises(RunError), runs.prepared(run, config, "main"):
        raise RunError("the cluster has gone")
    assert len(provenance.read(run)) == 2
    assert loader.load_resolved(run / records.CONFIG_FILE).step_scheduler.max_steps == 300
    for content in ("", "3", '{"hand_overs": 3}', '{"hand_overs": [1, {}]}'):
        (run / provenance.FILE).write_text(content)
        assert all(isinstance(row, dict) for row in provenance.read(run))
    (run / provenance.FILE).unlink()
    (run / provenance.FILE).mkdir()
    provenance.record(run, str(repository))  # cannot be written: nobody hears of it
