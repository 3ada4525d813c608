"""Training on Slurm: what a run writes, how it goes on after faults and at other sizes with the same
losses, and how it ends."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gate
import pytest
import yaml
from helpers import LIMIT, Command, Done, Site, changed, same_curve, small_training, wait_for, write_texts
from shared import Up

from raylaunch.state import files

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

STEPS = 20
EVERY = 5
"""Steps between commits."""
ALONE = ("--set", "elastic.replace=false", "--set", "elastic.max_requeues=0")
"""What replaces nodes and allocations has tests of its own (tests/chaos)."""
SAME = 1e-4
"""Relative: floating-point order is all that another number of workers may change."""
GATED = {"trainer": {"function": gate.TRAINER}, "slurm": {"env": {"PYTHONPATH": gate.PATH}}}
"""Parts of a config: a run that waits for the test."""


def write_config(site: Site, name: str, **changes: Any) -> Path:
    """A config file for a small training, with these changes to its sections."""
    if not (site.state / "text").exists():
        write_texts(site.state / "text")
    plain = small_training(site.state / "text", max_steps=STEPS, ckpt_every_steps=EVERY, val_every_steps=STEPS)
    path = site.state / "home" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(changed(plain, changes)))
    return path


@dataclass(frozen=True)
class Smooth:
    """The run `smooth` on the cluster `main`, to which nothing happened."""

    config: Path
    done: Done
    losses: dict[int, float]


@functools.cache
def smooth(main: Up) -> Smooth:
    """Made once on a cluster; this ends when the cluster has taken note of the run's end."""
    site, config = main.site, write_config(main.site, "base")
    done = site.run("train", config, "--run", "smooth").expect(0)
    wait_for("run_ended", lambda: bool(of_cluster(main, "run_ended")), LIMIT, lambda: str(of_cluster(main)))
    return Smooth(config, done, site.losses("smooth"))


def of_cluster(main: Up, kind: str | None = None) -> list[dict[str, Any]]:
    """The cluster's events of that run."""
    return [row for row in main.site.events(main.directory, kind) if row.get("run") == "smooth"]


@pytest.fixture
def reference(main: Up) -> Smooth:
    return smooth(main)


def at_gate(site: Site, run: str, steps: int, command: Command) -> None:
    """Wait until a gated run waits with so many steps done."""
    wait_for(f"{run} at step {steps}", lambda: gate.waiting(site.run_dir(run))[1] == steps, LIMIT, lambda: command.said)


def worker(site: Site, run: str, rank: int, attempt: int = 1) -> tuple[str, str]:
    """(node, pid) of a rank, from the first line of its log."""
    log = files.attempt_dir(site.run_dir(run), attempt) / f"rank-{rank}.log"
    wait_for(f"rank {rank} of {run}", lambda: log.exists() and "device=" in log.read_text(), LIMIT)
    words = dict(re.findall(r"(\w+)=(\S+)", log.read_text().splitlines()[0]))
    assert words["rank"] == str(rank) and words["run"] == run
    return words["node"], words["pid"]


# --- a run --------------------------------------------------------------------------------------------


def test_what_train_prints(main: Up, reference: Smooth) -> None:
    done = reference.done
    assert re.search(rf"run smooth is finished at step {STEPS}, loss \d", done.out)
    assert str(main.site.run_dir("smooth")) in done.out
    assert f"step {STEPS}/{STEPS}  loss" in done.err and "world 3" in done.err and "\x1b" not in done.all


def test_metrics_of_a_run(main: Up, reference: Smooth) -> None:
    rows = files.read_lines(main.site.run_dir("smooth") / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "world_size", "attempt", "time"}
    assert all(keys <= row.keys() for row in steps)
    assert {(row["world_size"], row["attempt"]) for row in steps} == {(3, 1)}
    assert [row["tokens"] for row in steps] == [step * 10 * 64 for step in range(1, STEPS + 1)]
    losses = reference.losses
    assert losses[STEPS] < 0.9 * losses[1] and abs(losses[1] - 5.58) < 0.3  # ln 264 at first
    assert [row["step"] for row in rows if "val_loss" in row] == [STEPS]


@pytest.mark.usefixtures("reference")
def test_events_of_a_run(main: Up) -> None:
    site, run = main.site, main.site.run_dir("smooth")
    events = site.events(run)
    assert all({"time", "kind"} <= event.keys() for event in events)
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "queued" and kinds[-1] == "finished"
    decisions = [(e["decision"], e["reason"], e["setting"]) for e in events if e["kind"] == "decision"]
    assert [d[0] for d in decisions] == ["start", "finish"] and all(d[1] for d in decisions) and decisions[0][2]
    (started,) = site.events(run, "attempt_started")
    assert (started["workers"], started["nodes"], started["from_step"]) == (3, 3, 0)
    assert [e["step"] for e in site.events(run, "commit")] == list(range(EVERY, STEPS + 1, EVERY))
    states = [(row["kind"], row.get("state")) for row in of_cluster(main)]
    assert states == [("run_started", None), ("run_ended", "finished")]


def test_config_checkpoints_and_status_of_a_run(main: Up, reference: Smooth) -> None:
    site, run = main.site, main.site.run_dir("smooth")
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["model"]["dim"] == 64 and resolved["optimizer"]["betas"] == [0.9, 0.95]
    assert resolved["step_scheduler"]["global_batch_size"] == 10
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == [
        f"step-{step:08d}" for step in (STEPS - EVERY, STEPS)
    ]

    found = site.run_status("smooth")
    wanted = {"name", "state", "step", "loss", "attempt", "world_size", "directory"}
    assert wanted <= found.keys()
    assert (found["state"], found["step"], found["attempt"], found["world_size"]) == ("finished", STEPS, 1, 3)
    assert found["loss"] == reference.losses[STEPS] and found["directory"] == str(run)
    assert found in site.cluster_status("main")["runs"]
    site.run("status").expect(0, "smooth", "finished", f"{reference.losses[STEPS]:.4f}")


@pytest.mark.usefixtures("reference")
def test_logs_of_a_run(main: Up) -> None:
    site = main.site
    out = site.run("logs", "smooth").expect(0).out
    assert {line.split(":")[0] for line in out.splitlines()} == {"driver", "rank-0", "rank-1", "rank-2"}
    one = site.run("logs", "smooth", "--rank", 2).expect(0).out
    assert one.startswith("raylaunch worker run=smooth attempt=1 rank=2 world=3 ")
    node, _ = worker(site, "smooth", 2)
    assert site.run("logs", "smooth", "--node", node).expect(0).out == one
    site.run("logs", "smooth", "--rank", 9).expect(2)


def test_a_finished_run_is_not_done_again(main: Up, reference: Smooth) -> None:
    site = main.site
    done = site.run("train", reference.config, "--run", "smooth")
    done.expect(2, "finished", "max_steps", "--fresh", "--run")
    assert done.out == ""
    site.run("attach", "smooth").expect(0, "run smooth is finished")
    site.run("stop", "smooth").expect(0, "finished already")
    assert site.losses("smooth") == reference.losses and site.run_status("smooth")["state"] == "finished"


def test_what_cannot_continue_is_refused_with_the_differences(main: Up, reference: Smooth) -> None:
    site = main.site
    before = (site.run_dir("smooth") / "config.yaml").read_bytes()
    sets = ["--set", "data.seq_len=32", "--set", "model.n_layers=3", "--set", "step_scheduler.max_steps=99"]
    done = site.run("train", reference.config, "--run", "smooth", *sets)
    done.expect(1, "data.seq_len: 64 → 32", "model.n_layers: 2 → 3", "--fresh", "--run")
    assert "max_steps" not in done.err and "Traceback" not in done.err
    assert (site.run_dir("smooth") / "config.yaml").read_bytes() == before
    assert site.run_status("smooth")["state"] == "finished"


# --- faults -------------------------------------------------------------------------------------------


def continued(site: Site, run: str) -> list[int]:
    """The sizes of the run's attempts. Each began at the last commit before it, not at 0; no committed step was done
    again."""
    started = site.events(site.run_dir(run), "attempt_started")
    commits = site.events(site.run_dir(run), "commit")
    for row in started[1:]:
        before = max(c["step"] for c in commits if c["time"] < row["time"])
        assert row["from_step"] == before >= EVERY
    rows = [r for r in files.read_lines(site.run_dir(run) / "metrics.jsonl") if "loss" in r]
    for number, row in enumerate(started[1:], 2):
        steps = [r["step"] for r in rows if r["attempt"] == number]
        assert not steps or min(steps) == row["from_step"] + 1
    return [row["workers"] for row in started]


@pytest.mark.long  # as tests/chaos has it
def test_a_killed_node_then_other_sizes(site: Site) -> None:
    """Three nodes, a death, two nodes, `down`; then another cluster, of one node, ends the run."""
    first, second = gate.FIRST, gate.FIRST + 2 * EVERY
    steps = {"max_steps": second + 2 * EVERY}
    site.run("up", "-c", write_config(site, "cluster", **GATED), "--nodes", 3, "--mem", "3G", *ALONE).expect(0)
    site.run("train", write_config(site, "plain", step_scheduler=steps), "--run", "plain").expect(0)
    config, run = write_config(site, "shrunk", step_scheduler=steps, **GATED), site.run_dir("shrunk")

    command = site.start("train", config, "--run", "shrunk")
    at_gate(site, "shrunk", first, command)
    site.sandbox.kill("node3")
    gate.allow(run, second)
    try:
        at_gate(site, "shrunk", second, command)
        assert "2 workers, from step" in command.said
        found = site.cluster_status("main")
        states = {node["name"]: node["state"] for node in found["nodes"]}
        assert states == {"node1": "ready", "node2": "ready", "node3": "lost"}
        kinds = [(e["kind"], e.get("node")) for e in site.events(site.cluster("main"))]
        assert ("node_lost", "node3") in kinds

        # What is left of the cluster still is one, and saves what it does before it ends.
        site.run("down").expect(0, "cluster main is down")
        command.ended().expect(1, "run shrunk is stopped and saved at step")
        stopped_at = site.run_status("shrunk")["step"]
        assert second <= stopped_at < steps["max_steps"]
        assert site.events(run, "commit")[-1]["step"] == stopped_at
        site.wait_clean()
    finally:
        site.sandbox.start("node3")

    site.run("up", "-c", write_config(site, "cluster", **GATED), "--nodes", 1, *ALONE).expect(0)
    gate.open_gate(run)
    site.run("train", config, "--run", "shrunk").expect(0, f"1 workers, from step {stopped_at}", "finished")
    sizes = continued(site, "shrunk")
    assert (sizes[0], sizes[-1]) == (3, 1) and 2 in sizes
    same_curve(site.losses("shrunk"), site.losses("plain"), SAME)
    site.run("down").expect(0)


# --- handing over, letting go, ending ------------------------------------------------------------------


@pytest.mark.long
def test_stopped_and_begun_anew(main: Up) -> None:
    """`stop` saves the run and leaves the cluster; `--fresh` keeps the old run aside."""
    site, config = main.site, write_config(main.site, "anew", step_scheduler={"max_steps": 5000})
    command = site.start("train", config)
    site.wait_step("anew", EVERY)
    site.run("stop", "anew").expect(0, "run anew is stopped: raylaunch stop")
    command.ended().expect(1, "run anew is stopped and saved at step")
    run, old = site.run_status("anew"), site.losses("anew")
    assert (run["state"], run["attempt"]) == ("stopped", 1)
    assert site.events(site.run_dir("anew"), "commit")[-1]["step"] == run["step"] == max(old)

    site.run("train", config, "--fresh", "--set", f"step_scheduler.max_steps={EVERY}").expect(0)
    assert list(site.losses("anew")) == list(range(1, EVERY + 1))
    (aside,) = (path.name for path in (site.state / "runs").glob("anew.*"))
    assert site.losses(aside) == old
    assert site.cluster_status("main")["state"] == "ready"


@pytest.mark.long
def test_let_go_come_back_and_run_out_of_time(site: Site) -> None:
    """Ctrl-C lets go of a run, `attach` comes back; Slurm's signal, with much time left that of a preemption,
    saves it and ends the cluster."""
    site.run("up", "--nodes", 1, *ALONE).expect(0)
    config = write_config(site, "long", step_scheduler={"max_steps": 5000})
    command = site.start("train", config)
    command.wait_said("step 3/5000")
    command.interrupt()
    command.ended().expect(130, "detached", "raylaunch attach long", "raylaunch stop long")
    again = site.start("attach", "long", terminal=True)
    again.wait_said("/5000")
    assert site.run_status("long")["state"] == "running"
    site.run("train", config).expect(2, "run long is running", "raylaunch attach long", "raylaunch stop long")
    site.run("train", config, "--run", "other", "--detach").expect(0, "submitted to cluster main")
    assert site.run_status("other")["state"] == "queued"

    (job,) = site.jobs()
    site.slurm("scancel", "--signal=USR1", "--batch", job.split()[0])
    done = again.ended().expect(1)
    assert re.search(r"run long is stopped and saved at step \d+, .*\(preempted\)", done.out), str(done)
    assert "\x1b[" in done.out and "tokens/s" in done.out  # a progress display on a terminal
    wait_for("the job's end", lambda: not site.jobs(), LIMIT)
    site.wait_clean()
    assert "ExitCode=0:0" in site.slurm("scontrol", "show", "job", job.split()[0])
    last = site.run_status("long")
    assert last["state"] == "stopped"
    assert site.events(site.run_dir("long"), "commit")[-1]["step"] == last["step"]
    assert site.cluster_status("main")["state"] == "down"
    assert site.run_status("other")["state"] in {"interrupted", "stopped"}
    site.run("down").expect(0, "down already")


def test_submit(site: Site) -> None:
    """Two batch jobs side by side, each with a cluster of its own: one trains, one cannot."""
    last = gate.FIRST + 1
    steps = {"max_steps": last, "warmup_steps": 5, "val_every_steps": 0}
    small = {"nodes": 1, "ntasks_per_node": 2, **GATED["slurm"]}
    good = write_config(site, "good", step_scheduler=steps, trainer=GATED["trainer"], slurm=small)
    bad = write_config(site, "bad", data={"text": ["/no/such/text"]}, elastic={"max_identical_errors": 1})
    jobs = {}
    for path in (good, bad):
        done = site.run("submit", path).expect(0)
        assert re.fullmatch(r"\d+\n", done.out) and done.err == ""
        jobs[path.stem] = done.out.strip()
    # While it lives its name is taken, and asking again does it no harm.
    site.run("submit", good).expect(2, "good")
    assert site.run_status("good")["state"] in {"queued", "running"}
    site.run("train", good, "--cluster", "good").expect(2, "belongs to its run good")
    watched = site.start("attach", "good")
    watched.wait_said("step ")
    at_gate(site, "good", gate.FIRST, watched)
    gate.open_gate(site.run_dir("good"))

    wait_for("both jobs' ends", lambda: not site.jobs(), 2 * LIMIT, lambda: str(site.status()))
    watched.ended().expect(0, f"run good is finished at step {last}")
    site.wait_clean()
    for name, words in (("good", ("COMPLETED", "0:0")), ("bad", ("FAILED", "1:0"))):
        text = site.slurm("scontrol", "show", "job", jobs[name])
        assert f"JobState={words[0]} " in text and f"ExitCode={words[1]}" in text
    run = site.run_status("good")
    assert (run["state"], run["step"], run["world_size"]) == ("finished", last, 2)
    run = site.run_status("bad")
    assert run["state"] == "failed" and "/no/such/text" in run["reason"]
    site.run("attach", "bad").expect(1, "run bad failed", "/no/such/text", "logs")
    assert {c["state"] for c in site.status()["clusters"]} == {"down"}
    # The same again is refused before anything is submitted.
    site.run("submit", good).expect(2, "run good is finished")
    assert not site.jobs()
