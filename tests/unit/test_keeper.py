"""The keeper and the moment of its fork: Slurm ends a job whenever it likes."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

KEEP = """
import os, signal, sys
from raylaunch import agent, keeper

def told():
    for pid in {pids}:
        os.kill(pid, signal.SIGTERM)

agent.main = lambda: signal.pause() or 0
os.register_at_fork({when}=told)
sys.exit(keeper.Keeper().keep())
"""


@pytest.mark.parametrize(
    ("when", "pids"),
    [
        ("before", "[os.getpid()]"),
        ("after_in_parent", "[os.getpid()]"),
        ("after_in_child", "[os.getppid(), os.getpid()]"),
    ],
)
def test_a_node_that_is_told_to_end_during_the_fork_ends(when: str, pids: str) -> None:
    """Nobody may miss it: what Slurm has to SIGKILL leaves its temp directory."""
    done = subprocess.run([sys.executable, "-c", KEEP.format(when=when, pids=pids)], timeout=120, check=False)
    assert done.returncode == 128 + signal.SIGTERM
