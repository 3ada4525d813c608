"""The live view on a real terminal: its keys, its end, and the terminal afterwards."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from raylaunch.state import event_log, files, records
from raylaunch.state.head_state import HeadState
from raylaunch.state.records import Cluster

BINARY = Path(sys.executable).with_name("raylaunch")


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """A cluster that has ended."""
    directory = files.make_dir(tmp_path / "clusters" / "c")
    Cluster("c", "local", 1, "canary", 0.0, 1, 2, 1).write(directory / records.CLUSTER_FILE)
    HeadState("canary", wanted=2).write(directory / records.DUTIES_FILE)
    event_log.write(directory, "node_lost", node="n1", reason="pulled the plug")
    files.write_json(directory / records.ENDED_FILE, {"canary": "canary", "reason": "down"})
    return tmp_path


class Terminal:
    """A command on a terminal of 60 columns and 12 lines."""

    def __init__(self, *words: str) -> None:
        self.fd, there = pty.openpty()
        termios.tcsetwinsize(self.fd, (12, 60))
        self.before = termios.tcgetattr(self.fd)
        self.process = subprocess.Popen(
            [BINARY, *words], stdin=there, stdout=there, stderr=there, start_new_session=True, env={**os.environ, "TERM": "xterm"}
        )  # fmt: skip
        os.close(there)

    def until(self, words: str, limit: float = 120.0) -> None:
        """Read on until it shows them."""
        shown, deadline = "", time.monotonic() + limit
        while words not in shown:
            assert time.monotonic() < deadline, f"not within {limit:g} s: {words!r} in {shown[-2000:]!r}"
            if select.select([self.fd], [], [], 0.5)[0]:
                shown += os.read(self.fd, 1 << 16).decode(errors="replace")

    def press(self, key: str) -> None:
        os.write(self.fd, key.encode())


def test_keys_choose_what_is_shown_and_q_leaves_the_terminal_as_it_was(state_dir: Path) -> None:
    terminal = Terminal("watch", "c", "--state-dir", str(state_dir), "--every", "0.3")
    try:
        terminal.until("down: down")
        terminal.until("pulled the plug")
        terminal.press("n")
        terminal.until("state")  # the title of the table of nodes
        terminal.press("l")
        terminal.until("no logs yet")
        terminal.press("q")
        terminal.until("\x1b[?1049l")  # the alternate screen is left
        assert terminal.process.wait(20) == 0
        assert termios.tcgetattr(terminal.fd) == terminal.before
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.fd)


def test_without_a_terminal_it_is_printed_once(state_dir: Path) -> None:
    done = subprocess.run(
        [BINARY, "watch", "c", "--state-dir", str(state_dir)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[:2] == ["c  down: down", "no run"] and "pulled the plug" in done.stdout
    refused = subprocess.run(
        [BINARY, "watch", "x", "--state-dir", str(state_dir)], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 2 and "no run or cluster x" in refused.stderr and "Traceback" not in refused.stderr
