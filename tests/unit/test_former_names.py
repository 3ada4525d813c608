"""What was called otherwise still works: in users' code, in configs, and for processes that outlive an upgrade."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import raylaunch
from raylaunch.config import former_names, loader
from raylaunch.config.schema import TrainerConfig
from raylaunch.config.user_code import _full_name
from raylaunch.errors import ConfigError
from raylaunch.state import files, records
from raylaunch.state.runs import Run
from raylaunch.training.worker.main import WorkerSpec

LIGHT = [name for name in former_names.NAMES if ".trainers." not in name and not name.endswith((".loop", ".raystart"))]
"""Without those that import torch or Ray."""


@pytest.mark.parametrize("name", LIGHT)
def test_a_former_name_is_the_module_itself(name: str) -> None:
    now = importlib.import_module(former_names.NAMES[name])
    assert importlib.import_module(name) is now
    assert now.__name__ == now.__spec__.name == former_names.NAMES[name]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", sorted(former_names.NAMES))
def test_each_leads_to_a_module(name: str) -> None:
    assert importlib.util.find_spec(former_names.NAMES[name]) is not None


def test_what_a_driver_pickles_by_a_former_name_is_found() -> None:
    """It is handed to workers that start after the upgrade."""
    from raylaunch.training.worker.heartbeat import DriverAddress
    from raylaunch.training.worker.main import WorkerSpec

    assert importlib.import_module("raylaunch.worker").Spec is WorkerSpec
    assert importlib.import_module("raylaunch.pulse").Place is DriverAddress


def test_a_process_can_be_started_by_a_former_name() -> None:
    command = [sys.executable, "-P", "-m"]
    said = [
        subprocess.run([*command, name], capture_output=True, text=True, check=False).stderr.splitlines()[-1]
        for name in ("raylaunch.metrics.serve", "raylaunch.observe.prometheus.exporter")
    ]
    assert said == ["IndexError: list index out of range"] * 2


def test_a_config_may_use_a_former_name_of_a_trainer() -> None:
    assert TrainerConfig(function="trainers.hf:train").entry == "trainers.hf:train"
    assert _full_name("trainers.hf") == "raylaunch.trainers.safetensors_io"
    assert _full_name("trainers.nobodys") == "trainers.nobodys"


def test_the_schema_is_where_it_was() -> None:
    from raylaunch import config
    from raylaunch.config.schema import Config

    assert config.Config is Config
    with pytest.raises(AttributeError):
        _ = config.nothing


def test_what_is_public_is_there() -> None:
    """Loop and Batch bring torch: by their source alone."""
    loop = importlib.util.find_spec("raylaunch.trainers.loop")
    assert loop is not None and loop.origin is not None
    for name in raylaunch.__all__:
        if raylaunch._HOMES.get(name) == "trainers.loop":
            assert f"\nclass {name}" in Path(loop.origin).read_text()
        else:
            assert getattr(raylaunch, name).__name__ == name
    assert set(raylaunch.__all__) <= set(dir(raylaunch))
    with pytest.raises(AttributeError):
        _ = raylaunch.nothing


def test_every_error_is_public() -> None:
    from raylaunch import errors

    ours = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert ours <= set(raylaunch.__all__)


@pytest.mark.parametrize(("former", "now"), sorted(former_names.KEYS.items()))
def test_a_former_key_is_read_and_its_new_name_told(tmp_path: Path, former: str, now: str) -> None:
    section, _, key = former.partition(".")
    path, told = tmp_path / "c.yaml", []
    path.write_text(f"{section}:\n  {key}: 7\n")
    config = loader.load(path, user_file=None, tell=told.append)
    assert getattr(getattr(config, section), now) == 7
    assert told == [f"{path}:2: {former} is {section}.{now} now"]
    assert getattr(getattr(loader.load_resolved(path), section), now) == 7
    path.write_text(f"{section}: {{{key}: 7}}\n")
    newer = loader.load(path, [f"{section}.{now}=8"], user_file=None)
    assert getattr(getattr(newer, section), now) == 8, "layers still win by their order"


def test_records_of_before_are_read(tmp_path: Path) -> None:
    """Of clusters and runs that live over the upgrade."""
    head = {"canary": "c", "incarnation": 2, "node": "n1", "hostname": "n1", "address": "a", "control_port": 1, "gcs": "",
            "dashboard_port": 1, "time": 0.0, "life": "7:1"}  # fmt: skip
    files.write_json(tmp_path / records.HEAD_FILE, head)
    now = records.Head.read(tmp_path)
    assert now is not None and (now.job, now.restarts) == ("7", 1)
    assert now.values()["life"] == "7:1", "agents of before the upgrade follow a head of after it"
    run = {"name": "r", "state": "running", "cluster": "c", "created": 0.0, "base": 12}
    files.write_json(tmp_path / records.RUN_FILE, run)
    found = Run.read(tmp_path)
    assert found is not None and found.incarnation_offset == 12
    assert found.values()["base"] == 12, "a driver of before the upgrade is not fenced by those before it"


def test_a_driver_of_before_starts_workers_of_after() -> None:
    spec = WorkerSpec.__new__(WorkerSpec)
    spec.__setstate__({"run_dir": Path("r"), "attempt": 3, "incarnation": 5, "global_batch_size": 8, "pulse": None})
    assert (spec.attempt, spec.run_incarnation) == (3, 5) and pickle.loads(pickle.dumps(spec)) == spec


def test_both_names_of_a_key_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("elastic:\n  restart_backoff: 1\n  backoff: 2\n")
    with pytest.raises(ConfigError, match=r"c.yaml:3: elastic.backoff: the former name of elastic.restart_backoff"):
        loader.load(path, user_file=None)
