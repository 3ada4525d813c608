"""The trainer over real gloo processes: the same curve at any size, saved, resumed, broken.

Three worker processes serve all cases (`trainer_worker`). A case is a Run in a fresh directory: its
attempts share checkpoints and data, as the driver's do. What is compared is what users see: the
lines of metrics.jsonl, events.jsonl, and the committed checkpoints.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raylaunch import state
from raylaunch.checkpoint import store
from raylaunch.errors import RunError
from trainers import corpus

ROOT = Path(__file__).resolve().parents[2]
CASE_SECONDS = 90.0
GLOBAL_BATCH_SIZE = 8


class Workers:
    """Three processes, ranks 0 to 2; one that dies is replaced before the next case."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("ab")
        self._processes = [self._spawn(rank) for rank in range(3)]

    def _spawn(self, rank: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "RANK": str(rank), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("trainer_worker.py"))]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=self._log)

    def run(self, case: dict[str, Any]) -> list[str]:
        """The error of each rank ("" for none, "died" when the process did)."""
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                self._processes[rank] = process = self._spawn(rank)
            assert process.stdin is not None
            process.stdin.write(json.dumps(case).encode() + b"\n")
            process.stdin.flush()
        deadline = time.monotonic() + CASE_SECONDS
        return [self._answer(process, deadline) for process in self._processes][: case["world_size"]]

    def _answer(self, process: subprocess.Popen[bytes], deadline: float) -> str:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            process.kill()
            pytest.fail(f"no answer within {CASE_SECONDS:.0f} s; see {self._log.name}")
        line = process.stdout.readline()
        if not line:
            process.wait()
            return "died"
        error: str = json.loads(line)["error"]
        return error

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    pool = Workers(tmp_path_factory.mktemp("workers") / "stderr.log")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 kB of English-like text, fewer samples than the runs read: they cross epochs."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall, {i * i % 97} to go.\n" for i in range(400)))
    return path


class Run:
    """A run directory and the attempts in it."""

    def __init__(self, directory: Path, text: Path, workers: Workers) -> None:
        self.directory, self._workers = directory, workers
        self.attempts = 0
        self.config: dict[str, dict[str, Any]] = {
            "model": {"size": "tiny"},
            "data": {"text": [str(text)], "seq_len": 32, "val_fraction": 0.1},
            "step_scheduler": {
                "max_steps": 10,
                "local_batch_size": 2,
                "ckpt_every_steps": 3,
                "val_every_steps": 5,
                "warmup_steps": 2,
            },
            "optimizer": {"lr": 3e-3},
            "checkpoint": {"keep_last_n_checkpoints": 9},
        }

    def attempt(self, world_size: int, **case: Any) -> list[str]:
        self.attempts += 1
        state.make_dir(state.attempt_dir(self.directory, self.attempts))
        return self._workers.run(
            {
                "run_dir": str(self.directory),
                "rendezvous": str(self.directory / f"rendezvous-{self.attempts}"),
                "attempt": self.attempts,
                "world_size": world_size,
                "config": self.config,
                "global_batch_size": GLOBAL_BATCH_SIZE,
                **case,
            }
        )

    def train(self, world_size: int, **case: Any) -> Run:
        """An attempt that must end well."""
        assert self.attempt(world_size, **case) == [""] * world_size
        return self

    def metrics(self, key: str) -> dict[int, float]:
        lines = state.read_lines(self.directory / state.METRICS_FILE)
        return {line["step"]: line[key] for line in lines if key in line}

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in state.read_lines(self.directory / state.EVENTS_FILE) if e["kind"] == kind]

    def outcome(self) -> Any:
        return state.read_json(state.attempt_dir(self.directory, self.attempts) / "outcome.json")

    def commits(self) -> list[int]:
        return [commit.step for commit in store.committed(self.checkpoints)]

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"


@pytest.fixture
def run(tmp_path: Path, text: Path, workers: Workers) -> Run:
    return Run(tmp_path, text, workers)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, text: Path, workers: Workers) -> Run:
    """Ten steps at two workers, without a break: what the others are compared with."""
    return Run(tmp_path_factory.mktemp("straight"), text, workers).train(2)


def assert_same_curve(one: Run, other: Run, first: int = 1, rel: float = 1e-4) -> None:
    for key in ("loss", "grad_norm", "lr", "tokens", "val_loss"):
        expected = {step: value for step, value in other.metrics(key).items() if step >= first}
        found = {step: value for step, value in one.metrics(key).items() if step >= first}
        assert found == (expected if rel == 0 else pytest.approx(expected, rel=rel)), key
        assert expected


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


def test_more_workers_than_samples(run: Run, straight: Run) -> None:
    run.config["step_scheduler"]["max_steps"] = 3
    run.train(3, global_batch_size=2)
    alone = Run(run.directory / "alone", Path(run.config["data"]["text"][0]), run._workers)
    alone.config = run.config
    state.make_dir(alone.directory)
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


@pytest.mark.parametrize("async_save", [False, True])
def test_resume_at_the_same_size_is_bitwise_the_same(run: Run, straight: Run, async_save: bool) -> None:
    run.config["checkpoint"]["async_save"] = async_save
    run.train(2, stop_at=5)
    run.train(2)
    assert_same_curve(run, straight, rel=0)


def test_a_save_in_the_background_holds_the_step_it_was_made_at(run: Run, straight: Run) -> None:
    """Training goes on while it is written: nothing of the later steps may get into it."""
    run.config["checkpoint"]["async_save"] = True
    run.train(2, slow_save=0.2)
    assert run.commits() == [3, 6, 9, 10]
    assert run.events("commit")[0]["time"] > run.metrics("time")[4]  # it really was in the background
    for step in (6, 9, 10):
        store.delete(store.final(run.checkpoints, step))
    (run.directory / state.METRICS_FILE).unlink()
    run.train(2)
    assert run.commits() == [3, 6, 9, 10]
    assert_same_curve(run, straight, first=4, rel=0)


def test_only_the_newest_checkpoints_are_kept(run: Run) -> None:
    run.config["checkpoint"]["keep_last_n_checkpoints"] = 2
    run.train(1)
    assert run.commits() == [9, 10]
    assert len(list(run.checkpoints.iterdir())) == 2


def test_a_finished_run_has_nothing_left_to_do(run: Run) -> None:
    run.config["step_scheduler"]["max_steps"] = 3
    run.train(1).train(2)
    assert run.outcome() == {"outcome": "finished", "step": 3}
    assert list(run.metrics("loss")) == [1, 2, 3]


def test_a_worker_killed_while_saving_costs_that_save_only(run: Run, straight: Run) -> None:
    errors = run.attempt(2, kill_in_save=2)
    assert errors[1] == "died" and errors[0] not in ("", "died")
    assert run.commits() == [3]
    assert (run.checkpoints / "step-00000006.tmp-1").exists()
    run.train(3)
    assert_same_curve(run, straight)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [f"step-{s:08d}" for s in (3, 6, 9, 10)]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_on_one_rank_is_explained_on_all(run: Run, async_save: bool) -> None:
    run.config["checkpoint"]["async_save"] = async_save
    for error in run.attempt(2, full_in_save=2):
        assert error.startswith("StateError: cannot write checkpoint") and "No space left" in error
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000003"]


def test_a_loss_that_is_no_number_ends_the_attempt_unsaved(run: Run) -> None:
    run.config["optimizer"]["lr"] = 1e30
    for error in run.attempt(2):
        assert error.startswith("RunError: step") and "optimizer.lr" in error
    assert run.commits() == []


def test_a_checkpoint_of_another_batch_size_is_refused(run: Run) -> None:
    run.config["step_scheduler"]["max_steps"] = 3
    run.train(2)
    for error in run.attempt(2, global_batch_size=4):
        assert "global_batch_size: 8 → 4" in error


def test_bfloat16_learns_too(run: Run, straight: Run) -> None:
    run.config["distributed"] = {"dtype": "bfloat16"}
    run.train(2)
    assert run.metrics("loss") == pytest.approx(straight.metrics("loss"), rel=0.02)
    assert run.metrics("loss") != straight.metrics("loss")


def test_missing_text_is_an_error_on_every_rank(run: Run, tmp_path: Path) -> None:
    run.config["data"]["text"] = [str(tmp_path / "nothing")]
    for error in run.attempt(3):
        assert error.startswith("RunError") and "nothing matches" in error


def test_too_little_text_is_an_error_on_every_rank(run: Run) -> None:
    run.config["data"]["seq_len"] = 100_000
    for error in run.attempt(2):
        assert error.startswith("RunError") and "data.seq_len" in error


# The corpus alone: no workers, no torch.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    (root / "b").mkdir(parents=True)
    (root / "b" / "two.txt").write_bytes(b"second")
    (root / "a.txt").write_bytes(b"first")
    (root / "c.md").write_bytes(b"third")
    (root / "empty.txt").touch()
    (root / ".hidden").write_bytes(b"never")
    return root


def read_tokens(built: corpus.Store) -> list[int]:
    import pyarrow as pa

    with pa.memory_map(str(built.path)) as source:
        return [t for batch in pa.ipc.open_file(source).read_all().column("tokens").chunks for t in batch.to_pylist()]


def test_documents_are_separated_and_in_order_of_their_names(folder: Path, tmp_path: Path) -> None:
    built = corpus.build(tmp_path / "data", [str(folder)], attempt=1)
    expected = [*b"first", 256, *b"second", 256, *b"third", 256]
    assert read_tokens(built) == expected and built.tokens == len(expected)
    assert corpus.find(tmp_path / "data", [str(folder)]) == built
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["manifest.json", "tokens.arrow"]
    manifest = state.read_json(tmp_path / "data" / "manifest.json")
    assert [Path(d["path"]).name for d in manifest["documents"]] == ["a.txt", "two.txt", "c.md"]


def test_globs_and_entries_that_overlap(folder: Path) -> None:
    files = corpus.list_files([str(folder / "*.md"), str(folder / "**" / "*.txt"), str(folder)])
    assert [p.name for p in files] == ["c.md", "a.txt", "two.txt", "empty.txt"]


def test_a_store_of_many_batches_reads_as_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers import data

    monkeypatch.setattr(corpus, "BATCH_TOKENS", 4)
    monkeypatch.setattr(data, "BATCH_TOKENS", 4)
    built = corpus.build(tmp_path / "data", [str(folder)], attempt=1)
    tokens, whole = data.Tokens(built.path, built.tokens), read_tokens(built)
    for start in range(built.tokens):
        for length in range(1, built.tokens - start + 1):
            assert tokens.read(start, length).tolist() == whole[start : start + length]


def test_the_standard_library_has_its_sources_and_no_tests() -> None:
    names = {path.name for path in corpus.list_files(["stdlib:"])}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any("site-packages" in path.parts for path in corpus.list_files(["stdlib:"]))


def test_a_damaged_or_foreign_store_is_refused(folder: Path, tmp_path: Path) -> None:
    directory, text = tmp_path / "data", [str(folder)]
    built = corpus.build(directory, text, attempt=1)
    with pytest.raises(RunError, match="was built from"):
        corpus.find(directory, ["stdlib:"])
    with built.path.open("ab") as out:
        out.write(b"x")
    with pytest.raises(RunError, match="damaged"):
        corpus.find(directory, text)


def test_the_others_hear_of_an_error_or_of_silence(tmp_path: Path) -> None:
    text = [str(tmp_path / "nothing")]
    with pytest.raises(RunError, match="no sign of life"):
        corpus.prepare(tmp_path / "data", text, rank=1, attempt=1, silence=0.0)
    with pytest.raises(RunError, match="nothing matches"):
        corpus.prepare(tmp_path / "data", text, rank=0, attempt=1, silence=0.0)
    with pytest.raises(RunError, match=r"rank 0: .*nothing matches"):
        corpus.prepare(tmp_path / "data", text, rank=1, attempt=1, silence=9.0)


def test_text_that_may_not_be_read_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_READ_BYTES", 1)
        patch.setattr(corpus, "_chunks", lambda *_: iter(()))
        with pytest.raises(RunError, match="empty"):
            corpus.build(tmp_path / "data", [str(folder)], attempt=1)
    files = corpus.list_files([str(folder)])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(RunError, match=r"cannot read .*a\.txt: Permission denied"):
            list(corpus._chunks(files, [], lambda: None))
