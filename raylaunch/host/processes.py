"""Our own process tree, and ending it: never by name, never somebody else's.

An agent is a subreaper: whatever it started, and whatever that started, stays its descendant even
when the parents in between die. So "everything that belongs to us" is a walk over our children.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from raylaunch.timing import TREE_LIMIT

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def become_subreaper() -> None:
    """Orphans among our descendants become our children (prctl(2), Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Be SIGKILLed when the parent ends, however it ends (prctl(2), Linux)."""
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between
        os._exit(1)


def start_time(pid: int) -> int | None:
    """When the process began, in clock ticks since the machine's boot (a pid alone may be somebody else's by now); None
    when it is gone. By proc(5)'s `stat`: the time of day, which psutil makes of it, moves when the clock is set."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(b")") + 2 :].split()  # the name before may hold any bytes
    return None if fields[0] in b"ZX" else int(fields[19])


def is_same(pid: int, started: int) -> bool:
    """Whether `pid` still is the process that began at `started`."""
    return start_time(pid) == started


def kill_child(process: subprocess.Popen[Any], limit: float = 1.0) -> None:
    """SIGKILL a child of ours, close our ends of its pipes and reap it; one that hangs in the kernel is left after
    `limit` seconds."""
    process.kill()
    for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
        pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(limit)


def end_tree(root: int, keep_root: bool = False, limit: float = TREE_LIMIT, spare: int = 0) -> int:
    """SIGKILL a process and all its descendants, again and again until none is left; the process
    `spare` and its descendants stay.

    Returns how many are left after `limit` seconds (0: all gone). Zombies count as gone.
    """
    deadline = time.monotonic() + limit
    while True:
        spared = {spare, *_descendants(spare)} if spare else set()
        try:
            top = psutil.Process(root)
            targets = [p for p in top.children(recursive=True) if running(p) and p.pid not in spared]
        except psutil.NoSuchProcess:  # also when it ends between the two
            return 0
        if not keep_root and running(top):
            targets.append(top)
        if not targets:
            return 0
        if time.monotonic() > deadline:
            return len(targets)
        for process in targets:
            with contextlib.suppress(psutil.Error):  # gone, or not ours to kill (sudo): the others all the same
                process.kill()
        time.sleep(0.02)  # no waitpid: some are children whose status their owner waits for


def marked(name: str, value: str) -> list[int]:
    """Our own processes whose environment has `name=value`: what an agent that was SIGKILLed left behind.

    The marker is inherited by everything that an agent starts, so this is a tree without its root.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.pid != os.getpid() and process.uids().real == os.getuid() and running(process)
            if ours and process.environ().get(name) == value:
                found.append(process.pid)
    return found


def _descendants(pid: int) -> set[int]:
    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def running(process: psutil.Process) -> bool:
    """Whether it lives; a zombie does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
