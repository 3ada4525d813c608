"""The trainer over real gloo processes: the same curve at any size, saved, resumed, broken.

Worker processes serve all cases (`trainer_worker`); a case is a `Run` in a fresh directory.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from attempts import GLOBAL_BATCH_SIZE, Run, assert_same_curve
from helpers import mounted

from raylaunch.checkpoint import store
from raylaunch.config.schema import StepSchedulerConfig
from raylaunch.state import files
from raylaunch.trainers.optim import learning_rate

LONG = pytest.mark.long


def saves(run: Run, beside: str | None) -> None:
    """Where this run's saves are made; None: in the step."""
    run.config["checkpoint"] |= {"async_save": beside is not None, "async_checkpointer_type": beside or "thread"}


def test_a_run_learns_and_says_what_it_did(straight: Run) -> None:
    loss = straight.metrics("loss")
    assert list(loss) == list(range(1, 11))
    assert loss[1] == pytest.approx(5.58, abs=0.2)  # log(264): knows nothing yet
    assert loss[10] < loss[1] - 0.5
    assert list(straight.metrics("val_loss")) == [5, 10]
    assert straight.metrics("tokens")[10] == 10 * GLOBAL_BATCH_SIZE * 32
    assert straight.commits() == [3, 6, 9, 10]
    assert [e["step"] for e in straight.events("commit")] == [3, 6, 9, 10]
    assert [e["step"] for e in straight.events("first_step")] == [1]
    assert straight.outcome() == {"outcome": "finished", "step": 10}


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_curve_is_the_same_at_any_world_size(run: Run, straight: Run, world_size: int) -> None:
    """Three workers take 2, 3 and 3 of 8 samples, in micro-batches of 2: padding is part of it."""
    run.train(world_size)
    assert_same_curve(run, straight)


@pytest.mark.parametrize(
    ("plan", "world_size", "local"),
    [
        pytest.param(*({"strategy": "ddp"}, 2, 1), marks=LONG),
        pytest.param(*({"strategy": "ddp"}, 3, 3), marks=LONG),
        pytest.param(*({"strategy": "hsdp"}, 4, 2), marks=LONG),
        pytest.param(*({"strategy": "hsdp"}, 2, 2), marks=LONG),
        pytest.param(*({"strategy": "hsdp"}, 3, 1), marks=LONG),
        ({"tp_size": 2}, 2, 2),
        pytest.param(*({"tp_size": 2, "strategy": "ddp"}, 4, 4), marks=LONG),
        pytest.param(*({"cp_size": 2}, 4, 1), marks=LONG),
        ({"cp_size": 2, "tp_size": 2, "activation_checkpointing": "full"}, 4, 4),
        pytest.param(*({"pp_size": 2}, 2, 1), marks=LONG),
        pytest.param(*({"pp_size": 2, "strategy": "hsdp"}, 4, 1), marks=LONG),
        pytest.param(*({"pp_size": 2, "tp_size": 2}, 4, 2), marks=LONG),
    ],
    ids=str,
)
def test_the_curve_is_the_same_under_any_plan(
    run: Run, straight: Run, plan: dict[str, Any], world_size: int, local: int
) -> None:
    run.config["distributed"] = plan
    assert_same_curve(run.train(world_size, local_world_size=local), straight)


@pytest.mark.parametrize(
    "plans",
    [
        [({"tp_size": 2}, 2), ({}, 3)],
        pytest.param(
            [({}, 3), ({"strategy": "hsdp"}, 4), ({"tp_size": 2}, 4), ({"cp_size": 2, "pp_size": 2}, 4), ({}, 2)],
            marks=LONG,
        ),
    ],
    ids=len,
)
def test_saved_under_one_plan_and_resumed_under_others(
    run: Run, straight: Run, plans: list[tuple[dict[str, Any], int]]
) -> None:
    *first, last = plans
    for plan, world_size in first:
        run.config["distributed"] = plan
        run.train(world_size, local_world_size=2, stop_at=2)
    run.config["distributed"] = last[0]
    run.train(last[1])
    assert [e["step"] for e in run.events("resumed")] == [2 * (n + 1) for n in range(len(first))]
    assert_same_curve(run, straight)


@pytest.mark.long
def test_a_world_that_the_plan_cannot_use(run: Run) -> None:
    run.config["distributed"] = {"tp_size": 2}
    assert all("3 workers are no multiple" in error for error in run.attempt(3))


@pytest.mark.long
def test_hsdp_wants_nodes_that_are_alike(run: Run) -> None:
    run.config["distributed"] = {"strategy": "hsdp"}
    assert all("as many workers on every node" in error for error in run.attempt(3, local_world_size=2))


@pytest.mark.long
@pytest.mark.parametrize("what", ["selective", "full"])
def test_what_is_computed_again_is_the_same(run: Run, straight: Run, what: str) -> None:
    run.config["distributed"] = {"activation_checkpointing": what}
    assert_same_curve(run.train(2), straight, rel=0)


def test_schedules() -> None:
    def rates(style: str, **more: int) -> list[float]:
        schedule = StepSchedulerConfig(
            max_steps=20,
            warmup_steps=4,
            min_lr_ratio=0.1,
            lr_decay_style=style,
            **more,  # type: ignore[arg-type]
        )
        return [round(learning_rate(step, 1.0, schedule), 6) for step in range(21)]

    for style in ("cosine", "linear", "constant", "wsd"):
        assert rates(style)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates("constant")[4:] == [1.0] * 17
    assert rates("linear")[4] == 1.0 and rates("linear")[12] == pytest.approx(0.55) and rates("linear")[20] == 0.1
    assert rates("cosine")[12] == pytest.approx(0.55) and rates("cosine")[20] == pytest.approx(0.1)
    assert rates("wsd")[:19] == [0.25, 0.5, 0.75, *[1.0] * 16] and rates("wsd")[19:] == [0.55, 0.1]
    assert rates("wsd", lr_decay_steps=8)[12:] == pytest.approx([1 - 0.9 * i / 8 for i in range(9)])


@pytest.mark.long
def test_more_workers_than_samples(run: Run, straight: Run) -> None:
    run.config["step_scheduler"]["max_steps"] = 3
    run.train(3, global_batch_size=2)
    alone = Run(run.directory / "alone", Path(run.config["data"]["text"][0]), run._workers)
    alone.config = run.config
    files.make_dir(alone.directory)
    assert_same_curve(run, alone.train(1, global_batch_size=2))
    assert run.metrics("loss") != straight.metrics("loss")


def test_stop_then_resume_with_another_number_of_workers(run: Run, straight: Run) -> None:
    run.train(2, stop_at=5)
    assert run.outcome() == {"outcome": "stopped", "step": 5}
    assert run.commits() == [3, 5]
    run.train(3)
    assert_same_curve(run, straight)
    assert [e["step"] for e in run.events("resumed")] == [5]
    assert run.outcome() == {"outcome": "finished", "step": 10}


@pytest.mark.parametrize("beside", [None, pytest.param("thread", marks=LONG), "process"])
def test_resume_at_the_same_size_is_bitwise_the_same(run: Run, straight: Run, beside: str | None) -> None:
    saves(run, beside)
    run.train(2, stop_at=5)
    run.train(2)
    assert_same_curve(run, straight, rel=0)


@pytest.mark.long
def test_a_save_in_the_background_holds_the_step_it_was_made_at(run: Run, straight: Run) -> None:
    """Training goes on while it is written: nothing of the later steps may get into it."""
    run.config["checkpoint"]["async_save"] = True
    run.train(2, held_save=1)
    assert run.commits() == [3, 6, 9, 10]
    assert run.events("commit")[0]["time"] > run.metrics("time")[4]  # it really was in the background
    for step in (6, 9, 10):
        store.delete(store.final(run.checkpoints, step))
    (run.directory / files.METRICS_FILE).unlink()
    run.train(2)
    assert run.commits() == [3, 6, 9, 10]
    assert_same_curve(run, straight, first=4, rel=0)


@pytest.mark.long
def test_only_the_newest_checkpoints_are_kept(run: Run) -> None:
    run.config["checkpoint"]["keep_last_n_checkpoints"] = 2
    run.train(1)
    assert run.commits() == [9, 10]
    assert len(list(run.checkpoints.iterdir())) == 2


@pytest.mark.long
def test_a_finished_run_has_nothing_left_to_do(run: Run) -> None:
    run.config["step_scheduler"]["max_steps"] = 3
    run.train(1).train(2)
    assert run.outcome() == {"outcome": "finished", "step": 3}
    assert list(run.metrics("loss")) == [1, 2, 3]


def test_a_worker_killed_while_saving_costs_that_save_only(run: Run, straight: Run) -> None:
    errors = run.attempt(2, kill_in_save=2)
    assert errors[1] == "died" and errors[0] not in ("", "died")
    assert run.commits() == [3]
    assert (run.checkpoints / "step-00000006.tmp-1-1").exists()
    run.train(3)
    assert_same_curve(run, straight)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [f"step-{s:08d}" for s in (3, 6, 9, 10)]


# Saves that fail.


@pytest.mark.parametrize("async_save", [False, pytest.param(True, marks=LONG)])
def test_a_full_disk_on_one_rank_costs_that_save_only(run: Run, straight: Run, async_save: bool) -> None:
    run.config["checkpoint"]["async_save"] = async_save
    run.train(2, full_in_saves=[2])
    assert run.commits() == [3, 9, 10]
    (failed,) = run.events("checkpoint_failed")
    assert failed["step"] == 6 and "No space left on device" in failed["error"]
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [f"step-{s:08d}" for s in (3, 9, 10)]
    assert_same_curve(run, straight, rel=0)


@pytest.mark.long
@pytest.mark.parametrize("async_save", [False, True])
def test_a_commit_that_fails_on_rank_0_alone_costs_that_save_only(run: Run, async_save: bool) -> None:
    run.config["checkpoint"]["async_save"] = async_save
    run.train(2, commit_fails=[1])
    assert run.commits() == [6, 9, 10]
    (failed,) = run.events("checkpoint_failed")
    assert failed["step"] == 3 and "Read-only file system" in failed["error"]


@pytest.mark.long
def test_the_last_save_is_tried_again(run: Run) -> None:
    run.config["step_scheduler"]["max_steps"] = 3
    run.train(2, full_in_saves=[1], commit_fails=[1])
    assert run.commits() == [3] and run.outcome() == {"outcome": "finished", "step": 3}
    assert ["No space" in e["error"] for e in run.events("checkpoint_failed")] == [True, False]


@pytest.mark.long
def test_the_last_save_is_not_tried_for_ever(run: Run) -> None:
    for error in run.attempt(2, stop_at=2, full_in_saves=[1, 2, 3, 4], patience=0.2):
        assert error.startswith("StateError: cannot write checkpoint") and "No space left" in error
    assert run.commits() == [] and list(run.checkpoints.iterdir()) == []
    assert run.outcome() is None


@pytest.mark.parametrize("async_save", [False, pytest.param(True, marks=LONG)])
def test_a_fenced_attempt_ends_at_once_on_all_ranks(run: Run, async_save: bool) -> None:
    run.config["checkpoint"]["async_save"] = async_save
    for error in run.attempt(2, fence_in_commit=2):
        assert error.startswith("Fenced: incarnation 1, attempt 1 may no longer commit") or "another rank" in error
    assert run.commits() == [3] and run.events("checkpoint_failed") == []
    assert max(run.metrics("loss")) < 10


def test_a_resize_waits_for_the_next_commit(run: Run, straight: Run) -> None:
    run.train(2, resize_at=4)
    assert run.outcome() == {"outcome": "stopped", "step": 6} and run.commits() == [3, 6]
    run.train(3)
    assert_same_curve(run, straight)


@pytest.mark.long
def test_a_resize_may_be_withdrawn(run: Run) -> None:
    run.train(2, resize_at=4, resize_until=6)
    assert run.outcome() == {"outcome": "finished", "step": 10}


@pytest.mark.long
@pytest.mark.parametrize("async_save", [False, True])
def test_a_resize_waits_for_a_commit_that_works(run: Run, async_save: bool) -> None:
    run.config["checkpoint"]["async_save"] = async_save
    run.train(2, resize_at=2, full_in_saves=[1])
    assert run.outcome() == {"outcome": "stopped", "step": 6} and run.commits() == [6]


# Checkpoints that do not verify.


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Saves in a process beside the worker, which the tests' workers cannot be made to fail in: real failures.


@pytest.mark.long
def test_a_process_saves_what_a_thread_does(run: Run, straight: Run) -> None:
    """Under another plan than the one that reads it, with experts' and plain tensors' shards."""
    saves(run, "process")
    run.config["distributed"] = {"tp_size": 2}
    run.train(4, stop_at=7)
    assert run.commits() == [3, 6, 7]
    store.delete(store.final(run.checkpoints, 7))  # that one was saved while the step waited
    run.config["distributed"] = {}
    run.train(3)
    assert [e["step"] for e in run.events("resumed")] == [6]
    assert_same_curve(run, straight)


@pytest.mark.long
def test_a_full_disk_costs_a_process_that_save_only(run: Run, straight: Run) -> None:
    saves(run, "process")
    run.config["step_scheduler"]["max_steps"] = 9
    with mounted(run.checkpoints, "64k"):
        errors = run.attempt(2, patience=0.2)
        assert [e["step"] for e in run.events("checkpoint_failed")][:2] == [3, 6]
        assert all("No space left" in error for error in errors) and max(run.metrics("loss")) == 9
        assert run.commits() == []


@pytest.mark.long
def test_a_process_that_is_killed_ends_the_attempt(run: Run, straight: Run) -> None:
    """On all ranks, whose own processes are told by their connections; the next attempt has new ones."""
    saves(run, "process")
    errors = run.attempt(2, kill_saver_at=7)
    assert "the process that saves beside this worker is gone" in errors[1], errors
    assert any(words in errors[0] for words in ("is gone", "another rank", "Connection")), errors
    assert 3 in run.commits() and 9 not in run.commits()
    run.train(2)
    assert_same_curve(run, straight, rel=0)
    assert run.commits() == [3, 6, 9, 10]


@pytest.mark.long
def test_a_fenced_process_does_not_commit(run: Run) -> None:
    saves(run, "process")
    for error in run.attempt(2, fence_at=7):
        assert error.startswith("Fenced: incarnation 1, attempt 1 may no longer commit") or "another rank" in error
    assert 3 in run.commits() and 9 not in run.commits()


@pytest.mark.parametrize("damage", ["flipped bit", pytest.param("torn commit", marks=LONG)])
def test_a_bad_checkpoint_is_named_set_aside_and_done_without(run: Run, straight: Run, damage: str) -> None:
    run.train(2, stop_at=7)
    newest = run.checkpoints / "step-00000007"
    if damage == "flipped bit":
        flip_a_bit(newest / "__1_0.distcp")
    else:
        (newest / "commit.json").write_text("{")
    run.train(2)
    (bad,) = run.events("checkpoint_invalid")
    file, why = ("__1_0.distcp", "sha256") if damage == "flipped bit" else ("commit.json", "torn")
    assert bad["step"] == 7 and bad["file"] == f"step-00000007/{file}" and why in bad["why"]
    assert [e["step"] for e in run.events("resumed")] == [6]
    assert len(list(run.checkpoints.glob("step-00000007.bad-*"))) == 1
    assert run.commits() == [3, 6, 9, 10]
    assert_same_curve(run, straight, rel=0)


@pytest.mark.long
def test_when_no_checkpoint_verifies_the_run_begins_anew(run: Run, straight: Run) -> None:
    run.train(2, stop_at=4)
    for commit in store.committed(run.checkpoints):
        flip_a_bit(commit.path / ".metadata")
    run.train(2)
    assert [e["step"] for e in run.events("checkpoint_invalid")] == [4, 3]
    assert run.commits() == [3, 6, 9, 10] and run.events("resumed") == []
    assert_same_curve(run, straight, rel=0)


@pytest.mark.long
def test_one_rank_alone_does_not_condemn_a_checkpoint(run: Run) -> None:
    run.train(2, stop_at=4)
    run.train(2, blind_rank=1)
    assert [e["step"] for e in run.events("resumed")] == [4]
    assert run.events("checkpoint_invalid") == []


# Numbers that are none.


@pytest.mark.parametrize("bad_gradient", [False, pytest.param(True, marks=LONG)])
def test_a_loss_that_is_no_number_ends_the_attempt_unsaved(run: Run, bad_gradient: bool) -> None:
    for error in run.attempt(2, nan_at=[3], bad_gradient=bad_gradient):
        assert error.startswith("RunError: step 3: loss") and "optimizer.lr" in error
    assert run.commits() == []
    (event,) = run.events("nonfinite")
    assert (event["step"], event["action"]) == (3, "stop")
    assert event["what"] == ("gradient" if bad_gradient else "loss")


@pytest.mark.parametrize("policy", ["skip", pytest.param("rollback", marks=LONG)])
def test_one_bad_batch_is_left_out(run: Run, straight: Run, policy: str) -> None:
    """The same either way: all steps but one, and the steps before it as if nothing had been."""
    run.config["optimizer"]["on_nonfinite"] = policy
    run.train(2, nan_at=[5])
    (event,) = run.events("nonfinite")
    assert (event["step"], event["what"], event["action"]) == (5, "loss", policy)
    assert [e["step"] for e in run.events("resumed")] == ([3] if policy == "rollback" else [])
    loss, expected = run.metrics("loss"), straight.metrics("loss")
    assert list(loss) == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert [loss[step] for step in range(1, 5)] == [expected[step] for step in range(1, 5)]
    assert loss[6] != expected[6] and loss[10] < loss[1] - 0.5
    assert run.commits() == [3, 6, 9, 10]
    assert run.outcome() == {"outcome": "finished", "step": 10}
    written = len(files.read_lines(run.directory / files.METRICS_FILE))
    assert written == 11 + (1 if policy == "rollback" else 0)  # step 4 came again; and two validations


@pytest.mark.long
def test_skip_and_rollback_come_to_the_same(run: Run) -> None:
    other = Run(run.directory / "other", Path(run.config["data"]["text"][0]), run._workers)
    files.make_dir(other.directory)
    run.config["optimizer"]["on_nonfinite"], other.config["optimizer"]["on_nonfinite"] = "skip", "rollback"
    run.train(2, nan_at=[2, 5, 6])
    other.train(2, nan_at=[2, 5, 6])  # the first one before there is a commit: back to the seed
    assert_same_curve(run, other, rel=0)
    assert [e["step"] for e in other.events("nonfinite")] == [2, 5, 6]


@pytest.mark.long
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_many_bad_steps_in_a_row_end_the_attempt(run: Run, policy: str) -> None:
    run.config["step_scheduler"].update(max_steps=20, val_every_steps=0)
    run.config["optimizer"]["on_nonfinite"] = policy
    for error in run.attempt(2, nan_at=list(range(5, 21))):
        assert error.startswith("RunError: step 15") and f"on_nonfinite: {policy}" in error
    actions = [(e["step"], e["action"]) for e in run.events("nonfinite")]
    assert actions == [*((step, policy) for step in range(5, 15)), (15, "stop")]


@pytest.mark.long
def test_random_numbers_are_those_of_the_step(run: Run) -> None:
    """A model with dropout, stopped and resumed, is bitwise the one that was not."""
    other = Run(run.directory / "other", Path(run.config["data"]["text"][0]), run._workers)
    files.make_dir(other.directory)
    run.train(2, dropout=True)
    other.train(2, dropout=True, stop_at=5).train(2, dropout=True)
    assert_same_curve(other, run, rel=0)


@pytest.mark.long
def test_progress_is_told_on_every_rank(run: Run) -> None:
    run.config["step_scheduler"]["max_steps"] = 5
    run.train(2, record_progress=True)
    for rank in range(2):
        lines = (run.directory / f"progress-{rank}.jsonl").read_text().splitlines()
        told = [tuple(json.loads(line)) for line in lines]
        assert told[0] == (0, "load")
        assert [one for one in told if one[1] in ("step", "sync")] == [
            (step, phase) for step in range(5) for phase in ("step", "sync")
        ]
        assert {(3, "save"), (5, "save"), (5, "validate")} <= set(told)


@pytest.mark.long
def test_a_window_of_steps_is_traced_on_every_rank(run: Run) -> None:
    run.config["step_scheduler"]["max_steps"] = 4
    run.config["logging"] = {"profile_steps": [2, 3]}
    run.train(2)
    for rank in (0, 1):
        with gzip.open(run.directory / "profile" / f"step-2-rank-{rank}.json.gz") as trace:
            names = {event.get("name") for event in json.load(trace)["traceEvents"]}
        assert {"aten::mm", "FSDP::all_gather"} & names
    (told,) = run.events("profiled")
    assert (told["first"], told["last"]) == (2, 3)


@pytest.mark.long
def test_a_checkpoint_of_another_batch_size_is_refused(run: Run) -> None:
    run.config["step_scheduler"]["max_steps"] = 3
    run.train(2)
    for error in run.attempt(2, global_batch_size=4):
        assert "global_batch_size: 8 → 4" in error


@pytest.mark.long
def test_bfloat16_learns_too(run: Run, straight: Run) -> None:
    run.config["distributed"] = {"dtype": "bfloat16"}
    run.train(2)
    assert run.metrics("loss") == pytest.approx(straight.metrics("loss"), rel=0.02)
    assert run.metrics("loss") != straight.metrics("loss")
