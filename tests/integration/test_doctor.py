"""`raylaunch doctor` on this machine: three nodes that are processes, real gloo between them; nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

BINARY = Path(sys.executable).with_name("raylaunch")


def doctor(state: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [BINARY, "doctor", "--backend", "local", "--state-dir", state, *words], timeout=250,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        env={**os.environ, "XDG_CONFIG_HOME": str(state.parent / "none")},
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr
    return done


def nodes_of(state: Path) -> list[int]:
    """Living processes of node checks in this state directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAYLAUNCH_CLUSTER_DIR", "").startswith(str(state)):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_three_nodes_are_checked_and_measured(tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = doctor(state, "--nodes", "3", "--json")
    findings: list[dict[str, Any]] = json.loads(done.stdout)
    problems = [one for one in findings if one["status"] == "problem"]
    assert done.returncode == bool(problems), done.stderr
    # On a busy machine one of three processes may really be slow.
    assert all(one["check"] == "bandwidth.slow" for one in problems), problems
    assert all(one.keys() == {"check", "status", "text", "hint", "node"} for one in findings)
    text = {one["check"]: one["text"] for one in findings if one["status"] == "ok"}
    assert "shared with 3 nodes" in text["nodes.shared"] and "clocks agree" in text["nodes.clock"]
    assert "OK on 3 nodes" in text["nodes.ground"] and "6 connections" in text["network.reach"]
    assert "GB/s" in text["bandwidth.pairs"] and "3 pairs measured" in text["bandwidth.pairs"]
    assert not (state / "doctor").exists() and not nodes_of(state)


@pytest.mark.long
def test_a_problem_is_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = doctor(tmp_path / "file", "--set", f"cluster.temp_dir=/tmp/{'x' * 90}")
    said = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert "cannot write to" in said and "Not a directory" in said and "--state-dir" in said
    assert "is too long" in said and "cluster.temp_dir" in said and "2 problems" in said
