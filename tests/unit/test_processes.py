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
