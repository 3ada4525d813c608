"""The end of a process tree."""

from __future__ import annotations

import subprocess

import psutil
import pytest

from raylaunch import processes


def test_a_tree_that_ends_while_it_is_looked_at_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(["sleep", "60"])
    children = psutil.Process.children

    def late(top: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
        child.kill()
        child.wait()
        return children(top, recursive)

    monkeypatch.setattr(psutil.Process, "children", late)
    assert processes.end_tree(child.pid) == 0


def test_a_process_is_itself_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        started = processes.start_time(child.pid)
        assert started is not None
        monkeypatch.setattr(psutil, "boot_time", lambda: 0.0)
        monkeypatch.setattr(psutil.Process, "create_time", lambda _: 30.0)
        assert processes.is_same(child.pid, started) and not processes.is_same(child.pid, started + 1)
        child.kill()
    assert processes.start_time(child.pid) is None
