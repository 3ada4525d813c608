"""Processes, each known by pid and start time, and waiting for a condition with a limit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from raylaunch.errors import SandboxError
from raylaunch.host.processes import is_same, start_time


@dataclasses.dataclass(frozen=True, slots=True)
class Proc:
    """One process: pids are used again, a pid with its start time is not."""

    pid: int
    start: int
    """Start time in clock ticks since boot, as the machine's own namespace sees it."""

    @classmethod
    def of(cls, pid: int) -> Proc:
        """The process that has this pid now; ProcessLookupError if there is none."""
        start = start_time(pid)
        if start is None:
            raise ProcessLookupError(f"no process {pid}")
        return cls(pid, start)

    def alive(self) -> bool:
        """Whether it still runs; a zombie that nobody has reaped yet does not."""
        return is_same(self.pid, self.start)

    def kill(self) -> None:
        """SIGKILL to this process and no other: the pidfd pins it while its start is compared."""
        if not self.alive():  # its pid may be a thread's by now, which has no pidfd
            return
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive():
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        except ProcessLookupError:
            return  # it ended between the two lines above
        finally:
            os.close(fd)

    def save(self, path: Path) -> None:
        write_atomic(path, json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Proc | None:
        """The process recorded there, dead or alive; None without a record."""
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None


def write_atomic(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file that is never seen half-written, whatever the umask."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.chmod(mode)
    scratch.replace(path)


def wait_for(what: str, ready: Callable[[], bool], timeout: float, hint: Callable[[], str] = str) -> None:
    """Poll until `ready()`; SandboxError "what: not within …" with the hint's text otherwise."""
    deadline = time.monotonic() + timeout
    pause = 0.002
    while not ready():
        if time.monotonic() > deadline:
            raise SandboxError(f"{what}: not within {timeout:g} s", hint())
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
