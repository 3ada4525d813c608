"""The training itself gets into trouble: it hangs, breaks, runs out of memory or numbers, or cannot save."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import gate
import pytest
from drill import SAME_SIZE, Drill
from helpers import disk_at, mounted, same_curve, wait_for
from trouble import AT
from undisturbed import EVERY, STEPS

from raylaunch.state import files
from raylaunch.tools.sandbox.procs import Proc

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

Trouble = Callable[[Path], AbstractContextManager[None]]


STORAGE, DISK = (Path(f"/var/tmp/raylaunch-test-{name}-{os.getpid()}") for name in ("storage", "disk"))
"""Small file systems for checkpoints: one that may be full or read-only, one that can be stopped."""


@contextmanager
def open_drill() -> Iterator[Drill]:
    """The file systems are made before the nodes, which inherit them. (Their /tmp is their own.)"""
    with mounted(STORAGE, "24m"), disk_at(DISK, 64), Drill.on("training", nodes=2) as made:
        made.up(2, elastic__replace="false", elastic__max_strikes=50)
        yield made
        made.clean()


@pytest.mark.long
def test_a_worker_exits(drill: Drill) -> None:
    drill.finished(drill.train("exits", trainer="trouble:exit_once"), "exits", SAME_SIZE)
    drill.recovered("exits", 2)


@pytest.mark.long
def test_a_worker_is_killed_by_its_memory_limit(drill: Drill) -> None:
    """A real memory cgroup around one worker, and a real out-of-memory kill by the kernel."""
    command = drill.train("oom", trainer="trouble:grows")
    node, pid = drill.worker("oom", 1)
    limit = Path(f"/sys/fs/cgroup/memory/{drill.site.sandbox.spec.name}-oom")
    limit.mkdir()
    try:
        (limit / "memory.limit_in_bytes").write_text(str(1 << 30))
        (limit / "cgroup.procs").write_text(str(on_machine(drill, node, pid)))
        drill.open_gate("oom")
        drill.finished(command, "oom", SAME_SIZE)
        assert "oom_kill 1" in (limit / "memory.oom_control").read_text()
    finally:
        wait_for("an empty cgroup", lambda: not (limit / "cgroup.procs").read_text(), 30)
        limit.rmdir()
    drill.recovered("oom", 2)
    assert drill.run_events("oom", "attempt_ended")[0]["how"] == "fault"
    drill.wait_cluster_event("oom_kill", node=node)
    why = json.loads(drill.site.run("why", "oom", "--json").expect(0).out)
    assert (why["kind"], why["rank"], why["host"]) == ("oom_host", 1, node) and why["confidence"] > 0.9, why


def on_machine(drill: Drill, node: str, pid: str) -> int:
    """The machine's pid of a node's process."""
    root = next(n.pid for n in drill.site.sandbox.status().nodes if n.name == node)
    assert root is not None and Proc.of(root).alive()
    inside = Path(f"/proc/{root}/ns/pid").readlink()
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            ids = next(line for line in path.read_text().splitlines() if line.startswith("NSpid:")).split()[1:]
            if ids[-1] == pid and (path.parent / "ns/pid").readlink() == inside:
                return int(ids[0])
        except (OSError, StopIteration):
            continue
    raise AssertionError(f"no process {pid} in {node}")


def test_a_rank_hangs(drill: Drill) -> None:
    """The watchdog names the rank that is missing, keeps its stack, and a new attempt goes on."""
    command = drill.train("hangs", trainer="trouble:hang_once", elastic={"hang_timeout": 8, "hang_factor": 5})
    hang = drill.wait_event("hangs", "hang")
    drill.finished(command, "hangs", SAME_SIZE)
    assert hang["rank"] == 1 and hang["step"] == AT - 1
    stack = (files.attempt_dir(drill.site.run_dir("hangs"), 1) / "rank-1.stack.txt").read_text()
    assert "_sleeps_here" in stack


def test_the_same_error_twice_ends_the_run(drill: Drill) -> None:
    done = drill.train("broken", trainer="trouble:broken", step_scheduler={"ckpt_every_steps": 50}).ended()
    done.expect(1, "a bug in somebody's code", "2 times")
    decision = drill.run_events("broken", "decision")[-1]
    assert "max_identical_errors" in decision["setting"]


@pytest.mark.long
def test_a_loss_that_is_no_number_ends_the_run(drill: Drill) -> None:
    drill.train("nan", trainer="trouble:not_a_number").ended().expect(1, "nan")
    event = drill.run_events("nan", "nonfinite")[-1]
    assert event["action"] == "stop"
    assert [row["step"] for row in drill.run_events("nan", "commit")] == [5, 10]


@pytest.mark.long
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_loss_that_is_no_number_is_left_out(drill: Drill, policy: str) -> None:
    run = f"nan-{policy}"
    drill.train(run, trainer="trouble:not_a_number", optimizer={"on_nonfinite": policy}).ended().expect(0)
    (event,) = drill.run_events(run, "nonfinite")
    assert event["action"] == policy and drill.sizes(run) == [2]
    losses, reference = drill.site.losses(run), drill.reference(run)
    same_curve({s: v for s, v in losses.items() if s < AT}, {s: v for s, v in reference.items() if s < AT}, SAME_SIZE)
    assert all(math.isfinite(float(v)) for s, v in losses.items() if s != AT) and max(losses) == STEPS


@contextmanager
def full(storage: Path) -> Iterator[None]:
    subprocess.run(["dd", "if=/dev/zero", f"of={storage}/ballast", "bs=64k"], check=False, capture_output=True)
    yield
    (storage / "ballast").unlink()


@contextmanager
def read_only(storage: Path) -> Iterator[None]:
    def remount(how: str) -> bool:
        return subprocess.run(["mount", "-o", f"remount,{how}", str(storage)], capture_output=True).returncode == 0

    wait_for("a moment without an open file", lambda: remount("ro"), 30)
    yield
    assert remount("rw")


@pytest.mark.long
@pytest.mark.parametrize(("trouble", "words"), [(full, "space"), (read_only, "Read-only")])
def test_storage_that_takes_nothing_does_not_end_training(drill: Drill, trouble: Trouble, words: str) -> None:
    """Saves fail meanwhile, and are made again afterwards."""
    run = f"storage-{words.lower()}"
    command = drill.train(run, checkpoint={"checkpoint_dir": str(STORAGE / run)})
    drill.at_gate(run)
    with trouble(STORAGE):
        drill.open_gate(run, gate.FIRST + EVERY)
        assert words in drill.wait_event(run, "checkpoint_failed")["error"]
    drill.open_gate(run)
    drill.finished(command, run, SAME_SIZE)
    assert drill.sizes(run) == [2]


@pytest.mark.long
def test_storage_that_stalls_does_not_end_training(drill: Drill) -> None:
    """A disk that answers nothing for a while, as a shared one may: no hang, and somebody is told."""
    command = drill.train("stalls", checkpoint={"checkpoint_dir": str(DISK)}, elastic={"hang_timeout": 10})
    drill.at_gate("stalls")
    subprocess.run(["fsfreeze", "--freeze", str(DISK)], check=True)
    frozen = time.monotonic()
    drill.open_gate("stalls")
    try:
        wait_for("the disk to have been away for long", lambda: time.monotonic() - frozen > 25, 60)
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(DISK)], check=True)
    assert drill.wait_event("stalls", "checkpoint_slow")["seconds"] > 10
    drill.finished(command, "stalls", SAME_SIZE)
    assert drill.sizes("stalls") == [2]


@pytest.mark.parametrize("damage", ["flipped", pytest.param("torn", marks=pytest.mark.long)])
def test_a_damaged_checkpoint_is_done_without(drill: Drill, damage: str) -> None:
    """The newest does not verify: it is named, kept, and the one before it is taken."""
    command = drill.train(damage)
    drill.at_gate(damage)
    node, pid = drill.worker(damage, 0)
    checkpoints = drill.site.run_dir(damage) / "checkpoints"
    newest = max(path for path in checkpoints.glob("step-????????"))
    file = next(newest.glob("*.distcp"))
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    file.write_bytes(flipped if damage == "flipped" else content[:middle])
    drill.site.inside(node, "kill", "-9", pid)
    drill.open_gate(damage)
    command.ended().expect(0, f"run {damage} is finished")
    same_curve(drill.site.losses(damage), drill.reference(damage), SAME_SIZE)
    bad = drill.run_events(damage, "checkpoint_invalid")[0]
    assert bad["file"] == f"{newest.name}/{file.name}"
    kept = [path for path in checkpoints.iterdir() if ".bad-" in path.name]
    assert len(kept) == 1 and (kept[0] / file.name).stat().st_size == len(
        flipped if damage == "flipped" else content[:middle]
    )
    assert json.loads((kept[0] / "commit.json").read_text())["step"] == bad["step"]
    started = drill.run_events(damage, "resumed")[-1]
    assert started["step"] == bad["step"] - EVERY
