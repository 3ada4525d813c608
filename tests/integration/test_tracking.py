"""A run's metrics in the trackers that people use: all of them, once, whatever dies."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import RunError
from raylaunch.host import sidecar
from raylaunch.observe.trackers.uploader import MEMORY
from raylaunch.state import event_log, files, records, runs
from raylaunch.tools.sandbox.procs import wait_for

PATIENCE = 120.0


@pytest.fixture(autouse=True)
def _files_for_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of its stores that needs no server and no database."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def a_run(directory: Path, **sections: Any) -> Path:
    directory.mkdir()
    config = Config.model_validate(sections)
    files.write_text(directory / records.CONFIG_FILE, loader.dump(config))
    return directory


def report(run: Path, steps: Iterable[int], attempt: int = 1) -> None:
    with (run / files.METRICS_FILE).open("a") as out:
        for step in steps:
            loss = f"{10 * attempt + step / 100}"
            out.write(
                f'{{"step": {step}, "loss": {loss}, "note": "text", "attempt": {attempt}, "time": {1e9 + step}}}\n'
            )


def begin(run: Path) -> subprocess.Popen[bytes]:
    return sidecar.start(sidecar.TRACKERS, run)


def passed_on(run: Path, name: str) -> int:
    return int((files.read_json(run / MEMORY) or {}).get(name, {}).get("offset", 0))


def until_passed_on(run: Path, *names: str) -> None:
    size = (run / files.METRICS_FILE).stat().st_size
    wait_for(f"{names} have it all", lambda: all(passed_on(run, name) == size for name in names), PATIENCE)


def tensorboard(run: Path) -> dict[int, float]:
    events = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


def test_a_killed_process_is_gone_on_from(tmp_path: Path) -> None:
    """And what is done again after a fault replaces what was."""
    run = a_run(
        tmp_path / "run",
        logging={"tensorboard": True},
        mlflow={"experiment": "tests", "tracking_uri": f"file:{tmp_path}/mlflow"},
    )
    report(run, range(1, 11))
    first = begin(run)
    until_passed_on(run, "tensorboard", "mlflow")
    with first:  # closes its stdin
        first.send_signal(signal.SIGKILL)
    report(run, range(8, 21), attempt=2)
    sidecar.end(begin(run))
    found = tensorboard(run)
    assert list(found) == list(range(1, 21))
    assert found[7] == pytest.approx(10.07) and found[8] == pytest.approx(20.08)

    from mlflow import MlflowClient

    client = MlflowClient(f"file:{tmp_path}/mlflow")
    experiment = client.get_experiment_by_name("tests")
    (one,) = client.search_runs([experiment.experiment_id])
    rows = client.get_metric_history(one.info.run_id, "loss")
    assert {row.step for row in rows} == set(range(1, 21)) and one.info.run_name == "run"
    assert one.data.params["model.dim"] == "128" and not any("slurm" in key for key in one.data.params)


@pytest.mark.long
def test_wandb_offline_is_one_run(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", wandb={"project": "tests", "mode": "offline"})
    report(run, range(1, 4))
    sidecar.end(begin(run))
    report(run, range(4, 7), attempt=2)
    sidecar.end(begin(run))
    sessions = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(sessions) == 2 and len({path.stem for path in sessions}) == 1  # two sessions of one id
    told = [path.read_bytes() for path in sessions]  # its own format, with the numbers as text
    for step in range(1, 7):
        loss = f"{10 * (1 + step // 4) + step / 100}".encode()
        assert [loss in text for text in told] == [step < 4, step >= 4]


@pytest.mark.long
def test_a_tracker_that_fails_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = a_run(
        tmp_path / "run",
        logging={"tensorboard": True},
        mlflow={"experiment": "tests", "tracking_uri": f"file:{tmp_path}/file/not-a-directory"},
    )
    report(run, range(1, 4))
    sidecar.end(begin(run))
    assert list(tensorboard(run)) == [1, 2, 3] and passed_on(run, "mlflow") == 0
    (told,) = [row for row in event_log.read_all(run) if row["kind"] == "tracking_failed"]
    assert told["tracker"] == "mlflow"


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.model_validate({"wandb": {"project": "tests"}})
    runs.check_trackers(config)
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RunError) as raised:
        runs.check_trackers(config)
    assert "raylaunch[wandb]" in str(raised.value.hint)


def test_no_tracker_is_turned_on_by_default() -> None:
    assert not Config().trackers
