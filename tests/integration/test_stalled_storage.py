"""Shared storage that stalls under a living cluster: no node is lost, no head is elected, nothing is counted as a fault."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import disk_at, wait_for

from raylaunch import timing
from raylaunch.state import event_log, files, records

STALL = 3 * timing.PING_LIMIT
FAULTS = {
    "node_lost",
    "node_restarting",
    "node_failed",
    "node_strike",
    "election",
    "fenced",
    "driver_lost",
    "ending",
    "ended",
}
PATIENCE = float(os.environ.get("RAYLAUNCH_TEST_PATIENCE", "120"))
TOOLS = ("fsfreeze", "mkfs.ext4", "mount")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, TOOLS)),
    reason=f"a disk that can be frozen needs root and {', '.join(TOOLS)}",
)


def raylaunch(disk: Path, *words: str) -> str:
    done = subprocess.run(
        [Path(sys.executable).with_name("raylaunch"), *words], capture_output=True, text=True, timeout=2 * PATIENCE,
        env={**os.environ, "RAYLAUNCH_STATE_DIR": str(disk / "state"), "XDG_CONFIG_HOME": str(disk / "none")},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def members(cluster: Path) -> dict[str, tuple[str, str, int]]:
    """Node → its state, its role, its agent's pid."""
    rows: list[dict[str, Any]] = json.loads((cluster / records.MEMBERS_FILE).read_text())["nodes"]
    return {row["name"]: (row["state"], row["role"], row["pid"]) for row in rows}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own under the state directory of a cluster of two nodes."""
    with disk_at(tmp_path / "disk", 64) as path:
        try:
            raylaunch(path, "up", "--backend", "local", "--nodes", "2", "--name", "two")
            yield path
        finally:
            raylaunch(path, "down", "--all")


@contextlib.contextmanager
def frozen(disk: Path) -> Iterator[None]:
    """What writes to the disk waits; reading goes on."""
    subprocess.run(["fsfreeze", "--freeze", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(disk)], check=True)


def have_ray_print(agent: int, text: bytes) -> None:
    """Print as the Ray of this agent would: into the pipe that its agent reads."""
    children = psutil.Process(agent).children()
    (ray,) = [child.pid for child in children if "raylaunch.cluster.agent.ray_start" in child.cmdline()]
    pipe = os.open(f"/proc/{ray}/fd/1", os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(pipe, text)
    finally:
        os.close(pipe)


def test_storage_that_stalls_costs_no_node(disk: Path) -> None:
    cluster = files.cluster_dir(disk / "state", "two")
    before, count = members(cluster), len(event_log.read_all(cluster))
    assert [now for now, _, _ in before.values()] == ["ready", "ready"]
    with frozen(disk):
        since = time.monotonic()
        for name, (_, _, agent) in before.items():
            have_ray_print(agent, f"printed by {name} meanwhile\n".encode())
        wait_for("a stall that is longer than any silence", lambda: time.monotonic() - since > STALL, 10 * STALL)
    for name in before:
        log = cluster / records.LOGS / f"{name}-ray.log"
        text = f"printed by {name} meanwhile"
        wait_for(f"what {name} printed", lambda log=log, text=text: text in log.read_text(errors="replace"), PATIENCE)
    # The head writes its events in order: with this one there, all that it had to say of the stall is, too.
    raylaunch(disk, "scale", "two", "2")
    wait_for("the head's next event", lambda: bool(event_log.read(cluster, "scaled")), PATIENCE)
    events = event_log.read_all(cluster)[count:]
    assert [event for event in events if event["kind"] in FAULTS] == []
    assert members(cluster) == before
