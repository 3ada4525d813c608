"""The end of a node whose head has a fault of its own: nothing of the node stays, and the fault is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CLOSE = """
import asyncio, sys
from raylaunch.host.ports import lease_ports
from raylaunch.host.temp_dir import TempDir
from raylaunch.cluster.agent.agent import Agent
from raylaunch.cluster.membership.control_channel import ControlServer

class Broken:
    exit_code = 0
    async def close(self, reason): raise KeyError("a fault of ours")
    def write_end(self, reason, left): print("told", reason, self.exit_code, left)

agent = Agent.__new__(Agent)
agent.duties, agent.link, agent.again, agent.reason, agent.error = Broken(), None, False, "down", None
agent.temp, agent.lease = TempDir(sys.argv[1], "here", None), lease_ports()
agent.members = ControlServer("token", lambda: "sees")
agent.temp.claim()
assert agent.temp.path.exists()
asyncio.run(agent.close())
"""


def test_a_head_that_fails_at_its_end_leaves_nothing(tmp_path: Path) -> None:
    """In a process of its own, for the end kills all that its process started."""
    base = tmp_path / "t"
    base.mkdir()
    command = [sys.executable, "-c", CLOSE, "t"]  # relative: short enough for the sockets that Ray would make
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "told down 1 0\n"), done.stderr
    assert not list(base.iterdir())
