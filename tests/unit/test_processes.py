"""The end of a process tree."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import psutil
import pytest
from waiting import until

from raylaunch.host import processes
from raylaunch.tools.sandbox.procs import Proc


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


def test_a_process_may_have_any_name(tmp_path: Path) -> None:
    """Linux keeps its first 15 bytes, which may end inside a letter."""
    program = tmp_path / ("é" * 9)
    shutil.copy(str(shutil.which("sleep")), program)
    with subprocess.Popen([program, "60"]) as child:
        assert processes.start_time(child.pid) is not None
        child.kill()


def test_a_process_that_is_not_ours_to_kill_saves_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `sudo` started, say."""
    shell = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 61 & wait"])
    until(lambda: len(psutil.Process(shell.pid).children()) == 2)
    children = psutil.Process(shell.pid).children()
    kill = psutil.Process.kill

    def refuse(process: psutil.Process) -> None:
        if process == children[0]:
            raise psutil.AccessDenied(process.pid)
        kill(process)

    with monkeypatch.context() as patch:
        patch.setattr(psutil.Process, "kill", refuse)
        assert processes.end_tree(shell.pid, keep_root=True, limit=0.1) == 1
    assert processes.running(children[0]) and not processes.running(children[1])
    children[0].kill()
    shell.wait()


def test_a_pid_that_is_a_thread_s_by_now_is_left_alone() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    assert thread.native_id is not None
    Proc(thread.native_id, start=1).kill()
    end.set()
    thread.join()
