"""The real command line on the local backend: up, train, faults, resume, down; and from the built wheel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
STEPS = 40

CONFIG = """
model: {{size: tiny}}
data: {{text: ["{text}"], seq_len: 64}}
optimizer: {{lr: 3.0e-3}}
step_scheduler:
  {{max_steps: {steps}, global_batch_size: 6, local_batch_size: 2, warmup_steps: 4, ckpt_every_steps: 5, val_every_steps: 0}}
"""


class Site:
    """One state directory, and the command line on it."""

    def __init__(self, folder: Path, binary: Path | None = None) -> None:
        self.state, self.binary = folder / "state", binary or Path(sys.executable).with_name("raylaunch")
        text = folder / "text"
        text.mkdir()
        for number in range(6):
            (text / f"{number}.txt").write_text(f"the quick brown fox number {number} jumps over the lazy dog. " * 200)
        self.config = folder / "small.yaml"
        self.config.write_text(CONFIG.format(text=text, steps=STEPS))
        self.env = {**os.environ, "RAYLAUNCH_STATE_DIR": str(self.state), "XDG_CONFIG_HOME": str(folder / "none")}

    def __call__(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.binary, *words], env=self.env, cwd=self.state.parent, capture_output=True, text=True, timeout=200
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        if code is not None:
            assert done.returncode == code, f"{words} → {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def status(self, name: str) -> dict[str, Any]:
        picture = json.loads(self("status", "--json").stdout)
        return next(c for c in picture["clusters"] if c["name"] == name)

    def lines(self, run: str, what: str = "metrics") -> list[dict[str, Any]]:
        path = self.state / "runs" / run / f"{what}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def curve(self, run: str) -> dict[int, float]:
        """Step → loss; of a step that was done again, the last."""
        return {row["step"]: row["loss"] for row in self.lines(run) if "loss" in row}


def until(condition: Callable[[], Any], what: str, limit: float = 120.0) -> Any:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {limit:g} s: {what}")


def ours(site: Site) -> list[psutil.Process]:
    """Processes that belong to a cluster of this state directory."""
    found = []
    for process in psutil.process_iter():
        try:
            where = process.environ().get("RAYLAUNCH_CLUSTER_DIR", "")
            if where.startswith(str(site.state)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("local"))
    made("up", "--backend", "local", "--nodes", "2", "--name", "two")
    yield made
    before = {node["name"] for node in made.status("two")["nodes"]}
    assert before == {"local1", "local2"}
    made("down", "--all")
    made("down", "--all")
    assert ours(made) == []
    assert not list((made.state / "clusters").glob("*/token"))
    assert all(not Path(p).exists() for p in temp_dirs(made))


def temp_dirs(site: Site) -> list[str]:
    tables = [json.loads(p.read_text()) for p in (site.state / "clusters").glob("*/members.json")]
    return [node["temp_dir"] for table in tables for node in table["nodes"]]


def workers(site: Site, run: str, attempt: int) -> list[int]:
    """The pids of an attempt's ranks, from the first lines of their logs."""
    logs = (site.state / "runs" / run / "attempts" / f"{attempt:04d}").glob("rank-*.log")
    words = [log.read_text().split("pid=", 1) for log in sorted(logs)]
    return [int(w[1].split()[0]) for w in words if len(w) == 2]


@pytest.mark.timeout(600)
def test_a_killed_worker_leaves_no_trace_in_the_curve(site: Site) -> None:
    plain = site("train", str(site.config), "--cluster", "two", "--run", "plain")
    assert "run plain is finished at step 40" in plain.stdout
    rows = site.lines("plain")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, STEPS + 1))
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "world_size", "attempt", "time"} <= set(
        rows[0]
    )
    curve = site.curve("plain")
    assert curve[STEPS] < 0.8 * curve[1]

    site(
        "train",
        str(site.config),
        "--cluster",
        "two",
        "--run",
        "hurt",
        "--detach",
        "--set",
        "step_scheduler.max_steps=41",
    )
    until(lambda: max(site.curve("hurt"), default=0) >= 8, "step 8")
    os.kill(workers(site, "hurt", 1)[1], signal.SIGKILL)
    until(
        lambda: site.status("two")["runs"][0]["state"] == "finished" and "hurt" in str(site.status("two")["runs"][0]),
        "end",
    )
    events = site.lines("hurt", "events")
    started = [e for e in events if e["kind"] == "attempt_started"]
    assert [e["workers"] for e in started] == [2, 2]
    assert started[1]["from_step"] >= 5
    decisions = [e for e in events if e["kind"] == "decision"]
    assert all(e["reason"] for e in decisions) and "lost rank" in str(decisions[1]["reason"])
    for step, loss in site.curve("hurt").items():
        if step <= 8:  # the schedule is another after that many steps: max_steps differs
            assert loss == pytest.approx(curve[step], rel=1e-2)


def test_stop_resume_refuse_and_begin_anew(site: Site) -> None:
    longer = ["--set", "step_scheduler.max_steps=400"]
    site("train", str(site.config), "--cluster", "two", "--run", "again", "--detach", *longer)
    until(lambda: max(site.curve("again"), default=0) >= 3, "step 3")
    busy = site("train", str(site.config), "--cluster", "two", "--run", "again", *longer, code=2)
    assert "raylaunch attach again" in busy.stderr
    assert "is stopped" in site("stop", "again").stdout
    stopped_at = max(site.curve("again"))
    commits = sorted((site.state / "runs/again/checkpoints").glob("step-*/commit.json"))
    assert int(commits[-1].parent.name.removeprefix("step-")) == stopped_at
    refused = site("train", str(site.config), "--cluster", "two", "--run", "again", "--set", "model.dim=32", code=1)
    assert "model.dim: 64 → 32" in refused.stderr and "--fresh" in refused.stderr
    site("train", str(site.config), "--cluster", "two", "--run", "again", "--detach", *longer)
    until(lambda: max(site.curve("again"), default=0) > stopped_at, "a step after the resume")
    resumed = [e for e in site.lines("again", "events") if e["kind"] == "resumed"]
    assert resumed[-1]["step"] == stopped_at
    site("stop", "again")
    assert "rank=1" in site("logs", "again", "--rank", "1").stdout
    assert "node=local2" in site("logs", "again", "--node", "local2").stdout


def test_an_error_of_the_code_ends_the_run_with_a_verdict(site: Site) -> None:
    (site.state.parent / "bad.py").write_text("def train(config, session):\n    raise ValueError('my own mistake')\n")
    site.env["PYTHONPATH"] = str(site.state.parent)
    failed = site("train", str(site.config), "--cluster", "two", "--run", "bad", "--set", "trainer=bad:train", code=1)
    assert "the same error 2 times" in failed.stderr and "my own mistake" in failed.stderr
    assert [e["how"] for e in site.lines("bad", "events") if e["kind"] == "attempt_ended"] == ["error", "error"]


def test_agents_that_were_killed_leave_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site("up", "--backend", "local", "--nodes", "1", "--name", "hit")
    for row in json.loads((site.state / "clusters/hit/agents.json").read_text()):
        os.kill(row["pid"], signal.SIGKILL)
    assert "is up" in site("status").stdout  # "no cluster is up"
    site("down", "hit")
    assert ours(site) == [] and not any(Path(p).exists() for p in temp_dirs(site))


@pytest.mark.timeout(600)
def test_the_built_wheel_trains_away_from_the_checkout(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    packages = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    wheel = next(tmp_path.glob("*.whl"))
    run(str(tmp_path / "venv/bin/pip"), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    # The dependencies of the environment under test; its own editable raylaunch is not reached by a path.
    theirs = next(p for p in sys.path if p.endswith("site-packages"))
    (packages / "dependencies.pth").write_text(theirs + "\n")
    where = run(str(tmp_path / "venv/bin/python"), "-c", "import raylaunch, trainers, sbatch; print(trainers.__file__)")
    assert where.startswith(str(tmp_path))
    site = Site(tmp_path, tmp_path / "venv/bin/raylaunch")
    try:
        assert "#SBATCH --no-kill" in site("script").stdout
        site("up", "--backend", "local", "--nodes", "1")
        done = site("train", str(site.config), "--set", "step_scheduler.max_steps=5")
        assert "is finished at step 5" in done.stdout
    finally:
        site("down", code=None)
    assert ours(site) == []


def run(*words: Sequence[str] | str) -> str:
    done = subprocess.run(list(map(str, words)), cwd="/", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
