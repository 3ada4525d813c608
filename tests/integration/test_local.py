"""The real command line on the local backend: up, train, faults, resume, down; and from the built wheel."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gate
import psutil
import pytest

from raylaunch.checkpoint import store

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
STEPS = 40
LONGER = ["--set", "step_scheduler.max_steps=100000"]
"""It ends when it is told to."""

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
        self.env["PYTHONPATH"] = gate.PATH

    def __call__(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.binary, *words], env=self.env, cwd=self.state.parent, capture_output=True, text=True, timeout=400
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

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.lines(run, "events") if e["kind"] == kind]

    def state_of(self, run: str) -> str:
        return str(json.loads((self.state / "runs" / run / "run.json").read_text())["state"])


def until(condition: Callable[[], Any], what: str, limit: float = 240.0) -> Any:
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


def appending_to(path: Path) -> str:
    """A command that adds its stdin to a file, as a list in YAML."""
    return f"[sh, -c, 'cat >> {path}; echo >> {path}']"


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

    told = site.state.parent / "told"
    run = site.state / "runs" / "hurt"
    site(
        "train", str(site.config), "--cluster", "two", "--run", "hurt", "--detach", "--set", f"trainer={gate.TRAINER}",
        "--set", f"alerts.command={appending_to(told)}",
    )  # fmt: skip
    until(lambda: gate.waiting(run) == (1, gate.FIRST), f"the run waits with {gate.FIRST} steps done")
    until(lambda: [e["step"] for e in site.events("hurt", "commit")] == [5, 10], "the save of step 10")
    os.kill(workers(site, "hurt", 1)[1], signal.SIGKILL)
    gate.open_gate(run)
    until(lambda: site.state_of("hurt") == "finished", "end")
    started = site.events("hurt", "attempt_started")
    assert (started[0]["workers"], started[-1]["workers"]) == (2, 2)
    assert started[1]["from_step"] == 10
    decisions = site.events("hurt", "decision")
    assert all(e["reason"] for e in decisions) and decisions[1]["reason"].startswith("fault: ")
    assert site.curve("hurt") == pytest.approx(curve, rel=1e-4)
    until(lambda: site.events("hurt", "alert")[-1]["alert"] == "finished", "the last alert")
    alerts = [json.loads(line) for line in told.read_text().splitlines()]
    assert [alert["kind"] for alert in alerts][:2] == ["started", "recovered"] and alerts[-1]["kind"] == "finished"
    assert alerts[1]["text"].startswith("recovered: ") and alerts[1]["facts"]["steps_lost"] >= 0
    assert f"finished at step {STEPS}" in alerts[-1]["text"] and "1 fault " in alerts[-1]["text"]

    said = json.loads(site("report", "hurt", "--json").stdout)
    assert said["state"] == "finished" and said["training"]["steps"] == STEPS
    assert said["code"][0]["versions"]["ray"]
    recovery = said["recoveries"][0]
    assert recovery["kind"] == "fault" and recovery["total"] > 0 and recovery["workers"] == [2, 2]
    assert 0 < said["cost"]["node_hours"] <= 2 * said["seconds"] / 3600 + 0.001
    past = json.loads(site("history", "--json").stdout)
    assert {r["run"]: r["state"] for r in past["runs"]}.items() >= {"plain": "finished", "hurt": "finished"}.items()
    assert past["clusters"][-1]["state"] == "up" and past["trouble"] == []
    rows = json.loads(site("history", "--audit", "--json").stdout)["audit"]
    asked = [
        (row["action"], row["cluster"], row.get("run")) for row in rows if row.get("run") in (None, "plain", "hurt")
    ]
    assert asked == [("up", "two", None), ("train", "two", "plain"), ("train", "two", "hurt")]


def test_a_lost_node_is_left_at_once_and_grown_back_onto_at_a_commit(site: Site) -> None:
    more = [*LONGER, "--set", "elastic.scale_up_delay=2"]
    site("train", str(site.config), "--cluster", "two", "--run", "lose", "--detach", *more)
    until(lambda: max(site.curve("lose"), default=0) >= 8, "step 8")
    row = next(r for r in json.loads((site.state / "clusters/two/agents.json").read_text()) if r["node"] == "local2")
    (agent,) = [
        c for c in psutil.Process(row["pid"]).children() if "raylaunch.cluster.agent.supervisor" not in c.name()
    ]
    killed = time.time()
    agent.kill()  # its keeper starts it again, and the node comes back

    whole = ["local1", "local2"]

    def placed() -> list[list[str]]:
        return [e["on"] for e in site.events("lose", "attempt_started")]

    until(lambda: ["local1"] in placed() and placed()[-1] == whole, "growth")
    grown = len(placed())
    until(lambda: site.lines("lose")[-1]["attempt"] == grown, "a step at the old size")
    the_load_of_all_nodes_is_known(site)
    site("stop", "lose")
    started = site.events("lose", "attempt_started")
    assert started[0]["on"] == whole and started[1]["on"] == ["local1"] and started[-1]["on"] == whole
    fault = site.events("lose", "fault")[0]
    assert (fault["cause"], fault["node"]) == ("node_lost", "local2")  # by our agents' word, before Ray misses a node
    known, again = fault["time"] - killed, started[1]["time"] - fault["time"]
    print(f"a lost node: known after {known:.1f} s, the next attempt {again:.1f} s later")
    asked = site.events("lose", "resize_requested")[-1]
    assert (asked["why"], asked["when"], asked["nodes"]) == ("grow", "commit", ["local2"])
    ended = site.events("lose", "attempt_ended")
    assert ended[0]["how"] == "fault" and [e["how"] for e in ended][-2:] == ["resized", "stopped"]
    assert started[1]["from_step"] == ended[0]["committed"]
    assert ended[-2]["step"] == ended[-2]["committed"] == started[-1]["from_step"]
    assert all(e["reason"] for e in site.events("lose", "decision"))


def the_load_of_all_nodes_is_known(site: Site) -> None:
    """By the agents, in the cluster's directory and for Prometheus."""
    cluster = site.state / "clusters" / "two"
    loads = until(lambda: len(n := json.loads((cluster / "load.json").read_text())["nodes"]) == 2 and n, "loads")
    assert all(0 <= load["cpu"] <= 1 and 0 < load["memory"] < 1 for load in loads.values())
    at = json.loads((cluster / "metrics.json").read_text())
    bearer = {"Authorization": f"Bearer {(site.state / 'metrics.token').read_text().strip()}"}
    request = urllib.request.Request(f"http://{at['address']}:{at['port']}/metrics", headers=bearer)
    with urllib.request.urlopen(request, timeout=60) as answer:
        told = answer.read().decode()
    assert 'raylaunch_run_world_size{cluster="two",run="lose"} 2.0' in told


@pytest.mark.long
def test_stop_resume_refuse_and_begin_anew(site: Site) -> None:
    site("train", str(site.config), "--cluster", "two", "--run", "again", "--detach", *LONGER)
    until(lambda: max(site.curve("again"), default=0) >= 3, "step 3")
    busy = site("train", str(site.config), "--cluster", "two", "--run", "again", *LONGER, code=2)
    assert "raylaunch attach again" in busy.stderr
    assert "is stopped" in site("stop", "again").stdout
    stopped_at = max(site.curve("again"))
    commits = sorted((site.state / "runs/again/checkpoints").glob("step-*/commit.json"))
    assert int(commits[-1].parent.name.removeprefix("step-")) == stopped_at
    refused = site("train", str(site.config), "--cluster", "two", "--run", "again", "--set", "model.dim=32", code=1)
    assert "model.dim: 64 → 32" in refused.stderr and "--fresh" in refused.stderr
    # As if it had been on a cluster that elected many a head: this one's incarnations begin at one.
    store.fence(site.state / "runs/again/checkpoints", 12, 1)
    site("train", str(site.config), "--cluster", "two", "--run", "again", "--detach", *LONGER)
    until(lambda: max(site.curve("again"), default=0) > stopped_at, "a step after the resume")
    assert [e["run_incarnation"] for e in site.lines("again", "events") if e["kind"] == "attempt_started"] == [1, 13]
    resumed = site.events("again", "resumed")
    assert resumed[-1]["step"] == stopped_at
    site("stop", "again")
    assert "rank=1" in site("logs", "again", "--rank", "1").stdout
    assert "node=local2" in site("logs", "again", "--node", "local2").stdout


@pytest.mark.long
def test_checkpoints_are_listed_verified_tidied_up_and_exported(site: Site) -> None:
    more = "{keep_last_n_checkpoints: 4, save_consolidated: true}"
    site("train", str(site.config), "--cluster", "two", "--run", "kept", "--set", f"checkpoint={more}")
    directory = site.state / "runs/kept/checkpoints"
    assert (site.state / "runs/kept/model/model.safetensors").exists()
    assert [e["kind"] for e in site.lines("kept", "events")][-3:] == ["finished", "exporting", "exported"]
    listed = json.loads(site("checkpoints", "kept", "ls", "--json").stdout)
    assert [row["step"] for row in listed["checkpoints"]] == [40, 35, 30, 25]
    assert all(row["bytes"] > 100_000 and row["world_size"] == 2 and not row["bad"] for row in listed["checkpoints"])
    assert "step 25: as it was written" in site("checkpoints", "kept", "verify").stdout

    damaged = next((directory / "step-00000030").glob("*.distcp"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    said = site("checkpoints", "kept", "verify", code=1)
    assert f"step 30: {damaged.name}: sha256" in said.stdout and "1 checkpoints cannot be used" in said.stderr
    assert "of step 7" in site("checkpoints", "kept", "verify", "7", code=2).stderr

    (directory / "step-00000033.tmp-1-0").mkdir()
    would = site("checkpoints", "kept", "gc", "--keep", "2", "--dry-run").stdout
    assert len(list(directory.glob("step-*"))) == 5
    gone = site("checkpoints", "kept", "gc", "--keep", "2").stdout
    assert gone == would.replace("would remove", "removes") and "step-00000033.tmp-1-0" in gone
    assert sorted(p.name for p in directory.glob("step-*")) == ["step-00000035", "step-00000040"]
    assert "nothing to remove" in site("checkpoints", "kept", "gc", "--keep", "2").stdout

    out = site.state.parent / "exported"
    site("checkpoints", "kept", "export", "latest", "--to", str(out), "--dtype", "bfloat16")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (out / "model.safetensors").stat().st_size < 400_000
    assert "already exists" in site("checkpoints", "kept", "export", "40", "--to", str(out), code=2).stderr
    assert "is not a step number" in site("checkpoints", "kept", "export", "best", "--to", "/x", code=2).stderr


@pytest.mark.long
def test_an_error_of_the_code_ends_the_run_with_a_verdict(site: Site) -> None:
    (site.state.parent / "bad.py").write_text("def train(config, session):\n    raise ValueError('my own mistake')\n")
    told = site.state.parent / "told-bad"
    own = ["--set", "trainer=bad:train", "--set", f"alerts.command={appending_to(told)}"]
    failed = site("train", str(site.config), "--cluster", "two", "--run", "bad", *own, code=1)
    assert "the same error 2 times" in failed.stderr and "my own mistake" in failed.stderr
    until(lambda: len(site.events("bad", "alert")) == 2, "two alerts")
    alert = json.loads(told.read_text().splitlines()[-1])
    assert alert["kind"] == "failed" and alert["facts"]["verdict"]["kind"] == "python_exception"
    assert [e["how"] for e in site.lines("bad", "events") if e["kind"] == "attempt_ended"] == ["error", "error"]


HANGER = """
import time
import torch, torch.distributed as dist

def stuck():
    while True:
        time.sleep(0.1)

def train(config, session):
    stop, step = torch.zeros(1), 0
    while not stop.item():
        session.progress(step, "step")
        if step == 20 and session.rank == 1 and (session.attempt == 1 or session.run == "always"):
            stuck()
        session.progress(step, "sync")
        stop.fill_(float(session.stop_requested()))
        dist.all_reduce(stop)
        step += 1
        session.report(step=step, loss=1.0)
        time.sleep(0.02)
    session.finish("stopped", step)
"""


@pytest.fixture(scope="module")
def elastic_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("elastic"))
    (made.state.parent / "hanger.py").write_text(HANGER)
    made("up", "--backend", "local", "--nodes", "2", "--name", "pair")
    yield made
    made("down", "--all")
    assert ours(made) == []


@pytest.mark.long
def test_a_hang_is_found_with_its_line_and_stops_the_run_when_it_is_the_code(elastic_site: Site) -> None:
    site = elastic_site
    own = ["--set", "trainer=hanger:train", "--set", "elastic.hang_timeout=8"]
    site("train", str(site.config), "--cluster", "pair", "--run", "once", "--detach", *own)
    until(lambda: site.lines("once") and site.lines("once")[-1]["attempt"] == 2, "the second attempt")
    site("stop", "once")
    (hang,) = site.events("once", "hang")
    assert (hang["rank"], hang["node"], hang["step"], hang["phase"]) == (1, "local2", 20, "step")
    assert hang["line"] == "hanger.py:7 in stuck" and 'hanger.py", line 7 in stuck' in Path(hang["stack"]).read_text()
    assert [e["cause"] for e in site.events("once", "fault")] == ["hang"]

    failed = site("train", str(site.config), "--cluster", "pair", "--run", "always", *own, code=1)
    assert "the same hang 2 times" in failed.stderr and "hanger.py:7" in failed.stderr
    verdict = json.loads(site("why", "always", "--json").stdout)
    assert (verdict["kind"], verdict["rank"], verdict["host"]) == ("hang", 1, "local2")
    assert verdict["evidence"][-1]["text"] == "hanger.py:7 in stuck"


@pytest.mark.long
def test_a_plan_of_two_workers_goes_on_with_two_when_a_node_of_three_dies(tmp_path: Path) -> None:
    """One of three nodes is idle, as the plan has no use for it, and takes the dead one's part."""
    site = Site(tmp_path)
    site("up", "--backend", "local", "--nodes", "3", "--name", "trio", "--set", "elastic.replace=false")
    try:
        more = ["--set", "distributed.tp_size=2", *LONGER, "--detach"]
        site("train", str(site.config), "--cluster", "trio", "--run", "split", *more)
        until(lambda: max(site.curve("split"), default=0) >= 8, "step 8")
        (first,) = site.events("split", "attempt_started")
        assert first["workers"] == 2
        victim = next(name for name in reversed(first["on"]) if name != "local1")
        row = next(r for r in json.loads((site.state / "clusters/trio/agents.json").read_text()) if r["node"] == victim)
        for process in (psutil.Process(row["pid"]), *psutil.Process(row["pid"]).children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it goes with its parent
                process.kill()
        second = until(lambda: site.events("split", "attempt_started")[1:], "attempt 2")[0]
        assert second["workers"] == 2 and victim not in second["on"] and second["from_step"] >= 5
        until(lambda: site.events("split", "resumed"), "resumed")
        site("stop", "split")
        until(lambda: site.events("split", "stopped"), "the end")
    finally:
        site("down", "trio")
    assert ours(site) == []


@pytest.mark.long
def test_agents_that_were_killed_leave_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site("up", "--backend", "local", "--nodes", "1", "--name", "hit")
    for row in json.loads((site.state / "clusters/hit/agents.json").read_text()):
        os.kill(row["pid"], signal.SIGKILL)
    assert "is up" in site("status").stdout  # "no cluster is up"
    site("down", "hit")
    assert ours(site) == [] and not any(Path(p).exists() for p in temp_dirs(site))


MINE = """
from raylaunch.trainers import fsdp

def train(config, session):
    steps = config.step_scheduler.model_copy(update={"max_steps": 5})
    fsdp.train(config.model_copy(update={"step_scheduler": steps}), session)
"""


def test_the_built_wheel_trains_away_from_the_checkout(tmp_path: Path) -> None:
    """The wheel of the source distribution, and a user whose own package is called as the folder of ours."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    packages = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    wheel = next(tmp_path.glob("*.whl"))
    run(str(tmp_path / "venv/bin/pip"), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    # The dependencies of the environment under test; its own editable raylaunch is not reached by a path.
    theirs = next(p for p in sys.path if p.endswith("site-packages"))
    (packages / "dependencies.pth").write_text(theirs + "\n")
    where = "import raylaunch; from importlib.util import find_spec as f; print(raylaunch.__file__, f('trainers'), f('sbatch'))"
    file, *others = run(str(tmp_path / "venv/bin/python"), "-c", where).split()
    assert file.startswith(str(tmp_path)) and others == ["None", "None"]
    site = Site(tmp_path, tmp_path / "venv/bin/raylaunch")
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "mine.py").write_text(MINE)
    try:
        assert "#SBATCH --no-kill" in site("script").stdout
        site("up", "--backend", "local", "--nodes", "1")
        done = site("train", str(site.config), "--set", "step_scheduler.max_steps=5")
        assert "is finished at step 5" in done.stdout
        done = site("train", str(site.config), "--run", "mine", "--set", "trainer=trainers.mine:train")
        assert "is finished at step 5" in done.stdout
        assert (
            Path(site("report", "small").stdout.strip()).read_text().startswith("<!doctype html>")
        )  # its template is there
    finally:
        site("down", code=None)
    assert ours(site) == []


def run(*words: Sequence[str] | str) -> str:
    done = subprocess.run(list(map(str, words)), cwd="/", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
