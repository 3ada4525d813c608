"""`raylaunch data` as people run it: in parallel, cut off, looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from raylaunch.data import dataset
from raylaunch.tools.sandbox.procs import wait_for

PATIENCE = 120.0
RAYLAUNCH = Path(sys.executable).parent / "raylaunch"


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RAYLAUNCH, "data", *map(str, args)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files, each of them a shard."""
    directory = tmp_path_factory.mktemp("inputs")
    for number in range(8):
        rows = (json.dumps({"text": f"document {number} {row} " * 20}) for row in range(4000))
        (directory / f"{number}.jsonl").write_text("\n".join(rows))
    return directory


def test_cut_off_it_goes_on_and_is_the_same(inputs: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run("prepare", inputs, "--out", whole, "--workers", 2)
    assert done.returncode == 0 and "32,000 documents" in done.stdout, done.stderr

    process = subprocess.Popen([RAYLAUNCH, "data", "prepare", inputs, "--out", cut, "--workers", "1"])
    workers = psutil.Process(process.pid)
    wait_for("two shards", lambda: len(list(cut.glob("shard-*.json"))) >= 2, PATIENCE)
    children = workers.children(recursive=True)
    process.kill()
    process.wait()
    wait_for("no workers", lambda: not any(child.is_running() for child in children), PATIENCE)
    assert not (cut / dataset.MANIFEST).exists()
    assert run("inspect", cut).returncode == 1
    kept = {path.name: path.stat().st_mtime_ns for path in cut.glob("shard-*.json")}
    assert len(kept) < 8

    assert run("prepare", inputs, "--out", cut).returncode == 0
    assert dataset.read(cut) == dataset.read(whole)
    assert {name: (cut / name).stat().st_mtime_ns for name in kept} == kept
    assert not [path for path in cut.iterdir() if path.name.endswith(".tmp")]
    shown = json.loads(run("inspect", cut, "--json", "--verify").stdout)
    assert shown["documents"] == 32000 and shown["damaged"] == [] and len(shown["samples"]) == 3


@pytest.mark.long
def test_bad_input_says_what_to_do(inputs: Path, tmp_path: Path) -> None:
    for args, code, words in [
        (("prepare", inputs), 2, "--out"),
        (("prepare", inputs, "--out", tmp_path / "a", "--format", "pdf"), 2, "pdf"),
        (("prepare", inputs, "--out", tmp_path / "a", "--column", "body"), 1, "there are: text"),
        (("prepare", tmp_path / "none", "--out", tmp_path / "a"), 1, "nothing matches"),
        (("prepare", inputs, "--out", tmp_path / "a", "--tokenizer", tmp_path / "none.json"), 2, "no tokenizer"),
        (("prepare", inputs, "--out", inputs), 2, "has other things in it"),
        (("inspect", tmp_path), 1, "holds no prepared dataset"),
    ]:
        done = run(*args)
        assert (done.returncode, words in done.stderr) == (code, True), (args, done)
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_where_one_may_not_write(inputs: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    done = run("prepare", inputs, "--out", tmp_path / "a")
    assert done.returncode == 1 and "Permission denied" in done.stderr
