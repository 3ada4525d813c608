"""The weights of a run for others: whole or not there; bounded, ended on demand, told, and asked for again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raylaunch.config import loader, user_code
from raylaunch.config.schema import CheckpointConfig, Config
from raylaunch.errors import RaylaunchError, UsageError
from raylaunch.observe import follow_run
from raylaunch.state import event_log, export_files, files, records, runs
from raylaunch.state.export_files import target
from raylaunch.state.head_state import HeadState
from raylaunch.state.records import Cluster
from raylaunch.training import consolidate, export

Event = tuple[str, dict[str, Any]]


def exporter(monkeypatch: pytest.MonkeyPatch, work: Callable[..., list[Path]] | None) -> None:
    monkeypatch.setattr(
        user_code, "module", lambda trainer: SimpleNamespace(export=work, __name__="m", __file__="m.py")
    )


def writes(config: Config, checkpoint: Path, to: Path, dtype: str, **more: bool) -> list[Path]:
    to.mkdir()
    (to / "model.safetensors").write_text(f"{checkpoint} {dtype} {more}")
    return [to / "model.safetensors"]


def test_an_export_is_renamed_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter(monkeypatch, writes)
    to = tmp_path / "new" / "model"
    assert export.write(Config(), Path("step-7"), to, "bfloat16", ema=True) == [to / "model.safetensors"]
    assert (to / "model.safetensors").read_text() == "step-7 bfloat16 {'ema': True}"
    assert [p.name for p in to.parent.iterdir()] == ["model"]
    with pytest.raises(UsageError, match="already exists"):
        export.write(Config(), Path("step-7"), to)


def test_a_broken_export_leaves_nothing_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(config: Config, checkpoint: Path, to: Path, dtype: str) -> list[Path]:
        writes(config, checkpoint, to, dtype)
        raise KeyboardInterrupt

    exporter(monkeypatch, breaks)
    with pytest.raises(KeyboardInterrupt):
        export.write(Config(), Path("step-7"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".model.part-1").mkdir()  # of one that was killed
    exporter(monkeypatch, writes)
    assert export.write(Config(), Path("step-7"), tmp_path / "model")


def test_a_trainer_without_export_and_a_run_without_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter(monkeypatch, None)
    with pytest.raises(RaylaunchError, match="has no export"):
        export.write(Config(), Path("step-7"), tmp_path / "model")
    with pytest.raises(RaylaunchError, match="run r has no checkpoint"):
        export.latest("r", tmp_path / "none")


class Process:
    """An export that takes `looks` looks, and then has this exit code."""

    pid = os.getpid()

    def __init__(self, looks: float, code: int = 0, deaf: bool = False) -> None:
        self.looks, self.code, self.deaf = looks, code, deaf
        self.returncode: int | None = None
        self.told: list[str] = []

    def poll(self) -> int | None:
        if self.returncode is None and self.looks <= 0:
            self.returncode = self.code
        self.looks -= 1
        return self.returncode

    def terminate(self) -> None:
        self.told.append("term")
        self.returncode = None if self.deaf else -15

    def kill(self) -> None:
        self.told.append("kill")
        self.returncode = self.returncode or -9

    def wait(self, limit: float | None = None) -> int:
        if self.returncode is None:
            raise subprocess.TimeoutExpired("export", limit or 0)
        return self.returncode


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Event]]:
    """Consolidate with this process; its events."""
    monkeypatch.setattr(consolidate, "LOOK_EVERY", 0)

    def work(process: Process, over: Callable[[], str | None] = lambda: None, **config: Any) -> list[Event]:
        monkeypatch.setattr(consolidate, "_start", lambda *_: process)
        events: list[Event] = []
        consolidate.consolidate(
            tmp_path / "r", Config(**config), lambda event: events.append((event.kind, event.values())), over
        )
        return events

    files.make_dir(tmp_path / "r")
    return work


def test_an_export_that_succeeds_is_told(run: Callable[..., list[Event]], tmp_path: Path) -> None:
    to = str(tmp_path / "r" / "model")
    assert run(Process(3)) == [("exporting", {"to": to}), ("exported", {"to": to})]


def test_one_that_fails_is_told_with_its_last_line_and_the_command_that_tries_again(
    run: Callable[..., list[Event]], tmp_path: Path
) -> None:
    (tmp_path / "r" / "export.log").write_text("export needs safetensors (pip install it)\n\n")
    scratch = files.make_dir(export_files.scratch_of(target(tmp_path / "r"), Process.pid))
    kind, told = run(Process(1, code=1), optimizer={"ema": 0.9})[-1]
    assert kind == "export_failed" and told["reason"] == "exit code 1: export needs safetensors (pip install it)"
    assert told["hint"] == f"raylaunch checkpoints r export latest --to {tmp_path / 'r' / 'model'} --ema"
    assert told["log"].endswith("export.log") and not scratch.exists()


@pytest.mark.parametrize("deaf", [False, True])
def test_a_stop_ends_it(run: Callable[..., list[Event]], deaf: bool) -> None:
    process, answers = Process(float("inf"), deaf=deaf), iter([None, None, "raylaunch down"])
    kind, told = run(process, lambda: next(answers))[-1]
    assert kind == "export_failed" and told["reason"] == "ended before it was done: raylaunch down"
    assert process.told == ["term", "kill"] and process.returncode is not None


def test_its_time_is_limited(run: Callable[..., list[Event]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolidate, "LIMIT", -1.0)
    process = Process(float("inf"))
    kind, told = run(process)[-1]
    assert kind == "export_failed" and "not done within" in told["reason"] and process.told == ["term", "kill"]


def test_what_is_there_is_not_replaced(run: Callable[..., list[Event]], tmp_path: Path) -> None:
    files.make_dir(target(tmp_path / "r"))
    ((kind, told),) = run(Process(0))
    assert kind == "export_failed" and "already exists" in told["reason"]


def test_a_place_that_cannot_be_looked_at_is_told(
    run: Callable[..., list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(_: Path) -> bool:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "exists", stale)
    ((kind, told),) = run(Process(0))
    assert kind == "export_failed" and "Stale file handle" in told["reason"]


def test_one_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    events: list[str] = []
    consolidate.consolidate(tmp_path / "gone", Config(), lambda event: events.append(event.kind), lambda: None)
    assert events == ["exporting", "export_failed"]  # its log cannot be opened


def test_one_whose_driver_was_lost_is_told_by_the_head(tmp_path: Path) -> None:
    run = files.make_dir(tmp_path / "r")
    (run / records.CONFIG_FILE).write_text(loader.dump(Config()))

    def told() -> list[dict[str, Any]]:
        export_files.record_interrupted(run)
        return event_log.read(run, "export_failed")

    assert not told()  # nothing was to be exported
    event_log.write(run, "exporting")
    scratch = files.make_dir(export_files.scratch_of(target(run), 1))
    (failed,) = told()
    assert not scratch.exists()
    assert "driver was lost" in failed["reason"] and failed["hint"].startswith("raylaunch checkpoints r export")
    assert len(told()) == 1  # once
    event_log.write(run, "exporting")
    event_log.write(run, "exported")
    assert len(told()) == 1


def test_one_whose_driver_was_lost_before_it_exported_is_told(tmp_path: Path) -> None:
    run = files.make_dir(tmp_path / "r")

    def told(save: bool, *kinds: str) -> int:
        config = Config(checkpoint=CheckpointConfig(save_consolidated=save))
        (run / records.CONFIG_FILE).write_text(loader.dump(config))
        (run / files.EVENTS_FILE).unlink(missing_ok=True)
        for kind in kinds:
            event_log.write(run, kind)
        for _ in range(2):
            export_files.record_interrupted(run)
        return len(event_log.read(run, "export_failed"))

    assert told(True, "finished") == told(True, "finished", "exporting", "exported", "queued", "finished") == 1
    assert not told(False, "finished") and not told(True, "finished", "exporting", "exported")
    assert not told(True, "finished", "queued", "stopped")


def test_who_watches_a_run_waits_for_its_weights(tmp_path: Path) -> None:
    cluster = files.make_dir(files.cluster_dir(tmp_path, "main"))
    record = Cluster("main", "local", 1, "c", 0.0, 1, 1, 1, ("7",))
    record.write(cluster / records.CLUSTER_FILE)
    files.write_text(cluster / records.CONFIG_FILE, loader.dump(Config()))
    run = files.run_dir(tmp_path, "r")
    config = Config(checkpoint=CheckpointConfig(save_consolidated=True))
    with runs.prepared(run, config, "main") as made:
        made.save(run, state="finished")

    def waits(running: str, *kinds: str) -> bool:
        HeadState("c", running=running).write(cluster / records.DUTIES_FILE)
        for kind in kinds:
            event_log.write(run, kind)
        return follow_run._exports(run, cluster)

    assert waits("r") and waits("r", "finished", "exporting")
    assert not waits("", "thread_died")  # its driver is gone
    assert not waits("r", "exported") and not waits("r", "queued", "finished", "export_failed")
    files.write_text(run / records.CONFIG_FILE, loader.dump(Config()))
    assert not waits("r", "queued", "finished")
