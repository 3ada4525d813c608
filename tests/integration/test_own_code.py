"""Other people's code on the local backend: unmodified torchrun scripts, and loops of one's own around `Loop`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raylaunch.observe.status import LIVE_RUNS

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.timeout(600)


class Site:
    """A cluster of two local nodes, and the command line on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        self.env = {**os.environ, "RAYLAUNCH_STATE_DIR": str(self.state), "XDG_CONFIG_HOME": str(folder / "none")}

    def __call__(self, *words: object, code: int = 0, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [BIN / "raylaunch", *map(str, words)], env=self.env, cwd=cwd or self.folder, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert "Traceback" not in said, said
        assert done.returncode == code, f"{words} → {done.returncode}\n{said}"
        return said

    def script(self, run: str, script: Path, *args: object, **sets: object) -> list[object]:
        """The words that train a script."""
        config = self.folder / f"{run}.yaml"
        trainer = {"script": str(script), "args": [str(a) for a in args], **sets}
        config.write_text(json.dumps({"trainer": trainer, "elastic": {"restart_backoff": 0}}))
        return ["train", config, "--run", run]

    def lines(self, run: str, what: str) -> list[dict[str, Any]]:
        path = self.state / "runs" / run / f"{what}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.lines(run, "events") if row["kind"] == kind]

    def log(self, run: str, attempt: int, rank: int) -> str:
        path = self.state / f"runs/{run}/attempts/{attempt:04d}/rank-{rank}.log"
        return path.read_text() if path.exists() else ""


def until(what: str, condition: Callable[[], Any], limit: float = 240.0) -> Any:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {limit:g} s: {what}")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("own"))
    made("up", "--backend", "local", "--nodes", 2)
    yield made
    made("down", "--all")
    assert processes(str(made.folder)) == []


@pytest.fixture(autouse=True)
def nothing_left_running(site: Site) -> Iterator[None]:
    """A test that fails in the middle of a run does not leave the nodes of the tests after it to that run."""
    yield
    for run in sorted((site.state / "runs").glob("*/run.json")):
        if json.loads(run.read_text())["state"] in LIVE_RUNS:
            site("stop", run.parent.name)


def processes(word: str) -> list[psutil.Process]:
    """Those with this word in their command line, but for this one."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or ())
        if word in words and process.pid != os.getpid() and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


# --- scripts ------------------------------------------------------------------------------------------

SHOW = """
import json, os, sys
names = [n for n in os.environ if n.startswith(("TORCHELASTIC", "ROLE", "GROUP")) or n in (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
row = {"env": {n: os.environ[n] for n in names}, "args": sys.argv[1:], "cwd": os.getcwd()}
sys.stdout.write(f"SHOWN {json.dumps(row)}\\n")
"""
"""One write for all: torchrun's workers are unbuffered and share a pipe."""


def shown(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in re.findall(r"SHOWN (\{.*\})", text)]
    return sorted(found, key=lambda row: int(row["env"]["RANK"]))


@pytest.mark.long
def test_a_script_sees_what_torchrun_shows_it(site: Site, tmp_path: Path) -> None:
    script = site.folder / "show.py"
    script.write_text(SHOW)
    site(*site.script("shown", script, "--lr", 0.1))
    ours = shown(site.log("shown", 1, 0) + site.log("shown", 1, 1))
    done = subprocess.run(
        [BIN / "torchrun", "--nproc-per-node", "2", str(script), "--lr", "0.1"], cwd=site.folder, capture_output=True,
        text=True, check=True, timeout=120,
    )  # fmt: skip
    theirs = shown(done.stdout)
    assert len(ours) == len(theirs) == 2
    agents = {"TORCHELASTIC_SIGNALS_TO_HANDLE"}  # for torchrun itself
    assert [set(row["env"]) for row in ours] == [set(row["env"]) - agents for row in theirs]
    assert [(row["args"], row["cwd"]) for row in ours] == [(row["args"], row["cwd"]) for row in theirs]
    for name in ("RANK", "WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        assert [row["env"][name] for row in ours] == [row["env"][name] for row in theirs], name
    assert [row["env"]["GROUP_RANK"] for row in ours] == ["0", "1"]  # two nodes of one worker each
    assert [row["env"]["LOCAL_RANK"] for row in ours] == ["0", "0"]


def test_the_ddp_example_goes_on_from_its_snapshot_when_a_rank_is_killed(site: Site) -> None:
    script = site.folder / "held_ddp.py"  # the example, but that its first attempt goes no further than epoch 5
    text = (EXAMPLES / "torchrun-script" / "ddp.py").read_text()
    end = "    dist.destroy_process_group()\n"
    assert text.count(end) == 1
    held = "        while (first, epoch) == (0, 4):\n            print('held', flush=True)\n            __import__('time').sleep(0.1)\n"
    script.write_text(text.replace(end, held + end))
    site(*site.script("ddp", script), "--detach")
    until("both at epoch 5", lambda: all("held" in site.log("ddp", 1, rank) for rank in (0, 1)))
    victim = next(p for p in processes(str(script)) if p.environ()["RANK"] == "1")
    victim.kill()
    site("attach", "ddp")
    fault = site.events("ddp", "fault")[0]
    assert fault["cause"] == "worker_lost" and fault["rank"] == 1
    again = site.log("ddp", 2, 0) + site.log("ddp", 2, 1)
    assert set(re.findall(r"goes on from epoch (\d+)", again)) == {"5"}
    assert "epoch 6 loss" in again and "epoch 20 loss" in again
    assert processes(str(script)) == []


@pytest.mark.long
def test_the_same_losses_as_under_torchrun(site: Site, tmp_path: Path) -> None:
    script = EXAMPLES / "torchrun-script" / "ddp.py"
    site(*site.script("same", script, "--epochs", 3))
    plain = subprocess.run(
        [BIN / "torchrun", "--nproc-per-node", "2", str(script), "--epochs", "3", "--dir", str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    losses = re.findall(r"epoch \d loss \S+", plain.stdout)
    assert len(losses) == 3 and re.findall(r"epoch \d loss \S+", site.log("same", 1, 0)) == losses


@pytest.mark.long
def test_a_script_that_is_stopped_saves_and_goes_on_from_there(site: Site) -> None:
    script = EXAMPLES / "torchrun-script" / "fsdp2.py"
    words = site.script("fsdp2", script, "--steps", 100_000, "--save-every", 1_000_000)
    site(*words, "--detach")
    until("step 40", lambda: "step 40 " in site.log("fsdp2", 1, 0))
    assert "is stopped" in site("stop", "fsdp2")
    (saved,) = [p for p in (site.state / "runs/fsdp2/checkpoints").iterdir() if p.name.startswith("step-")]
    site(*words, "--detach")
    step = saved.name.removeprefix("step-")
    until("the second attempt", lambda: f"goes on from step {step}" in site.log("fsdp2", 2, 1))
    site("stop", "fsdp2")
    assert site.events("fsdp2", "fault") == [] and processes(str(script)) == []


@pytest.mark.long
def test_a_script_that_fails_says_why_and_ends_the_run(site: Site) -> None:
    script = site.folder / "wrong.py"
    script.write_text(
        "import os, torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "if dist.get_rank() == 1:\n    raise KeyError('column')\ndist.barrier()\n"
    )
    said = site(*site.script("wrong", script), code=1)
    assert "the same error 2 times" in said and "exited with code 1: KeyError: 'column'" in said and "rank 1" in said


@pytest.mark.long
def test_a_script_that_ignores_the_signal_is_killed(site: Site) -> None:
    script = site.folder / "deaf.py"
    script.write_text(
        "import signal, time\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(600)\n"
    )
    site(*site.script("deaf", script, stop_signal="SIGUSR1", stop_timeout=1.0), "--detach")
    until("both", lambda: all("up" in site.log("deaf", 1, rank) for rank in (0, 1)))
    assert "is stopped" in site("stop", "deaf")
    assert processes(str(script)) == []


@pytest.mark.long
def test_what_a_shell_around_a_script_has_started_is_told_and_ended(site: Site) -> None:
    inner, script = site.folder / "inner.py", site.folder / "wrapper.sh"
    inner.write_text(
        "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (print('told', flush=True), sys.exit(3)))\n"
        "print('up', flush=True)\ntime.sleep(600)\n"
    )
    script.write_text(f"#!/bin/sh\n{sys.executable} {inner}\necho over\n")
    script.chmod(0o755)
    site(*site.script("wrapped", script), "--detach")
    until("both", lambda: all("up" in site.log("wrapped", 1, rank) for rank in (0, 1)))
    pid = int(re.search(r"pid=(\d+)", site.log("wrapped", 1, 1))[1])  # type: ignore[index]
    os.kill(pid, signal.SIGKILL)  # the worker: all below it has to go before the next attempt
    until("the second attempt", lambda: all("up" in site.log("wrapped", 2, rank) for rank in (0, 1)))
    assert len(processes(str(inner))) == 2  # one a rank, and none of the first attempt
    assert "is stopped" in site("stop", "wrapped")
    assert all("told" in site.log("wrapped", 2, rank) for rank in (0, 1))
    assert processes(str(inner)) == []


@pytest.mark.long
@pytest.mark.parametrize("grow", [True, False])
def test_a_script_grows_when_it_may(site: Site, grow: bool) -> None:
    """A node is lost and comes back: the script is started again at the size of before, or stays as it is."""
    run, script = f"grow-{grow}", site.folder / "patient.py"
    script.write_text("import os, time\nprint('world', os.environ['WORLD_SIZE'], flush=True)\ntime.sleep(600)\n")
    words = site.script(run, script, grow=grow)
    config = json.loads(Path(str(words[1])).read_text())
    Path(str(words[1])).write_text(json.dumps(config | {"elastic": {"restart_backoff": 0, "scale_up_delay": 2}}))
    site(*words, "--detach")
    until("two", lambda: "world 2" in site.log(run, 1, 0))

    def members() -> list[dict[str, Any]]:
        return list(json.loads((site.state / "clusters/main/members.json").read_text())["nodes"])

    victim = next(row for row in members() if row["role"] == "worker")
    os.kill(victim["pid"], signal.SIGKILL)

    def sizes() -> list[int]:
        return [e["workers"] for e in site.events(run, "attempt_started")]

    until("one", lambda: 1 in sizes())
    until("both nodes", lambda: {row["state"] for row in members()} == {"ready"})
    world = "world 2" if grow else "world 1"
    until(world, lambda: world in site.log(run, len(sizes()), 0))
    site("stop", run)
    assert sizes()[:2] == [2, 1] and sizes()[-1] == (2 if grow else 1)
    ended = [e["how"] for e in site.events(run, "attempt_ended")]
    assert ended[0] == "fault" and ("resized" in ended) == grow and ended[-1] == "stopped"


@pytest.mark.long
def test_a_script_that_crashes_ends_the_run(site: Site) -> None:
    """Twice on the same instruction is no node's fault: none of them is excluded for it."""
    script = site.folder / "crash.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    said = site(*site.script("crash", script), code=1)
    assert "ended by SIGSEGV" in said and len(site.events("crash", "attempt_started")) == 2


@pytest.mark.long
def test_scripts_that_cannot_start_are_refused_before_anything_is_held(site: Site) -> None:
    said = site(*site.script("none", site.folder / "none.py"), code=2)
    assert "no such file" in said and not (site.state / "runs/none").exists()
    plain = site.folder / "plain.sh"
    plain.write_text("exit 0\n")
    assert "chmod +x" in site(*site.script("plain", plain), code=2)
    plain.chmod(0o755)
    plain.write_text("#!/bin/sh\nexit 0\n")
    assert "no such directory" in site(*site.script("plain", plain, chdir="/nowhere/at/all"), code=2)
    assert "is finished" in site(*site.script("plain", plain))


@pytest.mark.long
def test_what_is_wrong_is_found_without_a_cluster(site: Site) -> None:
    def check(*words: object, code: int = 0) -> str:
        return site("train", *words, "--check", code=code, cwd=site.folder)

    example = EXAMPLES / "stdlib-lm" / "train.yaml"
    said = check(example, "--set", "slurm.ntasks_per_node=3", "--set", "data.val_fraction=0")
    assert (
        "parameters" in said
        and "16 samples a step; 3 workers take 6 each, in 2 passes" in said
        and "0 held out" in said
    )
    assert "nothing wrong" in check(*site.script("ddp", EXAMPLES / "torchrun-script" / "ddp.py")[1:2])
    assert "cannot import nowhere: ModuleNotFoundError" in check(example, "--set", "trainer=nowhere:train", code=1)
    assert "has no function tarin" in check(example, "--set", "trainer=trainers.fsdp:tarin", code=1)
    (site.folder / "own.py").write_text("def train(config, session): ...\n\ndef check(config):\n    yield 'mine'\n")
    assert "mine" in check(example, "--set", "trainer=own:train")
    (site.folder / "trainers").mkdir()  # this checkout has one, too, and it is on sys.path
    shutil.copy(site.folder / "own.py", site.folder / "trainers" / "mine.py")
    assert "mine" in check(example, "--set", "trainer=trainers.mine:train")
    (site.folder / "little.txt").write_text("few")
    assert "needs 129" in check(example, "--set", f"data.text=[{site.folder}/little.txt]", code=1)
    assert "no config.json" in check(example, "--set", f"model.init_from={site.folder}", code=1)


# --- loops of one's own -------------------------------------------------------------------------------


def curve(site: Site, run: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in site.lines(run, "metrics") if "loss" in row}


LOOPS = """
import torch
from torch import nn
from raylaunch.trainers.loop import Loop

def train(config, session):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    loop = Loop(config, session, model, optimizer, samples=100)
    before = model.weight[0, 0].item()
    for batch in loop:
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        if batch.step == 0:
            session.report(step=1, moved=before - model.weight[0, 0].item())
        loop.report(loss=torch.tensor(0.5), wrong=float("nan"))
        if session.run == "early" and session.rank == 1 and batch.step == 6:
            loop.end()
        if session.run == "broken" and batch.step == 6:
            break
    if session.run == "after":
        raise ValueError("what comes after the loop")
"""


@pytest.mark.long
def test_how_loops_end(site: Site) -> None:
    """Early and on one rank's word; by an error after the loop; by a break, which is told."""
    folder = site.folder / "loops"
    folder.mkdir()
    (folder / "loops.py").write_text(LOOPS)
    (folder / "loops.yaml").write_text(
        "trainer: loops:train\nstep_scheduler: {max_steps: 12, global_batch_size: 4, warmup_steps: 0, ckpt_every_steps: 5}\n"
        "elastic: {restart_backoff: 0}\n"
    )
    words = ["train", "loops.yaml", "--run"]
    assert "is finished at step 7" in site(*words, "early", cwd=folder)
    assert [e["step"] for e in site.events("early", "commit")] == [5, 7]
    rows = site.lines("early", "metrics")
    assert rows[1]["loss"] == 0.5 and rows[1]["wrong"] == "nan"
    assert next(row["moved"] for row in rows if "moved" in row) == pytest.approx(0.1, rel=1e-3)  # Adam's first step
    assert "what comes after the loop" in site(*words, "after", cwd=folder, code=1)
    verdict = json.loads(site("why", "after", "--json"))
    assert (verdict["kind"], verdict["cause"]) == ("python_exception", "ValueError: what comes after the loop")
    assert verdict["rank"] in (0, 1) and verdict["host"] == f"local{verdict['rank'] + 1}"
    assert "loops.py" in verdict["evidence"][0]["text"] and "in train" in verdict["evidence"][0]["text"]
    assert "loop.end(), not by break" in site(*words, "broken", cwd=folder, code=1)


HELD = """
import time
import digits
from raylaunch.trainers.loop import Loop

class Held(Loop):
    def report(self, **metrics):
        session = self._session
        while session.attempt == 1 and self.step == 30:
            time.sleep(0.02)
        while session.rank == 0 and self.step == 70 and not session.stop_requested():
            time.sleep(0.02)
        super().report(**metrics)

digits.Loop, train = Held, digits.train
"""
"""It waits after step 30 to be killed, and after step 70 to be stopped."""


@pytest.fixture
def own_site(tmp_path: Path) -> Iterator[Site]:
    """One whose size a test may change."""
    made = Site(tmp_path)
    made("up", "--backend", "local", "--nodes", 2)
    yield made
    made("down", "--all")
    assert processes(str(made.folder)) == []


@pytest.mark.long
def test_the_digits_are_learned_at_any_size_and_whatever_dies(own_site: Site) -> None:
    """The losses of a run that lost a worker, went on with another size of cluster and was stopped are the same."""
    site = own_site
    folder = site.folder / "digits"
    shutil.copytree(EXAMPLES / "own-function", folder)
    few = ["--set", "step_scheduler.max_steps=120", "--set", "step_scheduler.ckpt_every_steps=20"]
    site("train", "train.yaml", "--run", "whole", *few, cwd=folder)
    assert list(curve(site, "whole")) == list(range(1, 121))
    (last,) = [row for row in site.lines("whole", "metrics") if "accuracy" in row]
    assert last["accuracy"] > 0.8

    (folder / "held.py").write_text(HELD)
    words = ["train", "train.yaml", "--run", "torn", *few, "--set", "trainer=held:train"]
    site(*words, "--detach", cwd=folder)
    until("step 30", lambda: max(curve(site, "torn"), default=0) == 30)
    pid = int(re.search(r"pid=(\d+)", site.log("torn", 1, 1))[1])  # type: ignore[index]
    os.kill(pid, signal.SIGKILL)
    until("step 70 of the second attempt", lambda: max(curve(site, "torn"), default=0) == 70)
    site("stop", "torn")
    site("down")
    site("up", "--backend", "local", "--nodes", 1)
    site(*words, cwd=folder)
    whole, torn = curve(site, "whole"), curve(site, "torn")
    assert list(torn) == list(whole)
    sizes = [e["workers"] for e in site.events("torn", "attempt_started")]
    assert sizes[:2] == [2, 2] and sizes[-1] == 1
    # A rank reports its own share's loss: of one worker it is that of the whole batch.
    for step, loss in whole.items():
        if step <= 60:
            assert torn[step] == pytest.approx(loss, rel=1e-6), step
    accuracies = [row["accuracy"] for row in site.lines("torn", "metrics") if "accuracy" in row]
    assert accuracies == [pytest.approx(last["accuracy"], abs=0.01)]
