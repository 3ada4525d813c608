"""The nodes that are looked at: one short job of Slurm's, or processes of this machine. One protocol: start, wait for
nodes, end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from raylaunch.cluster import up
from raylaunch.config.schema import SlurmConfig
from raylaunch.errors import BringUpError, RaylaunchError, SlurmError, SlurmUnavailable
from raylaunch.host import processes
from raylaunch.scheduler.backends import Job, SlurmBackend
from raylaunch.scheduler.slurm import batch_script

ASK_EVERY = (0.5, 5.0)
END_LIMIT = 60.0
Show = Callable[[str], None]


class StillWaiting(RaylaunchError):
    """The queue took longer than we wait."""


class Allocation(Protocol):
    """What holds the nodes."""

    def start(self) -> None:
        """Ask for them."""
        ...

    def nodes(self, patience: float, show: Show) -> tuple[str, ...]:
        """Wait for them; their names, in the order of their indices."""
        ...

    def alive(self) -> bool:
        """Whether any of them may still say something."""
        ...

    def failures(self) -> dict[str, str]:
        """Node → what it printed of why it cannot go on."""
        ...

    def complaint(self) -> str:
        """The first error in what they, or Slurm for them, have printed; "" for none."""
        ...

    def end(self, patience: float) -> str:
        """Give them back, after `patience` seconds in which they may end by themselves; what could not be, or ""."""
        ...


@dataclass
class SlurmJob:
    """One job of Slurm's."""

    slurm: SlurmConfig
    directory: Path
    canary: str
    backend: SlurmBackend = field(default_factory=SlurmBackend)
    job: str = ""
    _asked: float = 0.0
    _lives: bool = True

    def start(self) -> None:
        self.job = self.backend.slurm.submit(batch_script.render_doctor(self.slurm, self.directory, self.canary))

    def nodes(self, patience: float, show: Show) -> tuple[str, ...]:
        deadline, pause = time.monotonic() + patience, ASK_EVERY[0]
        why = "not answered for"
        while True:
            with contextlib.suppress(SlurmUnavailable):  # it may answer next time
                job = self._look()
                if job is None or not job.alive:
                    hint = "Most likely the nodes do not see the state directory: it must be shared."
                    raise BringUpError(f"job {self.job} ended at once ({job.state if job else 'gone'})", hint)
                if job.blocked:
                    text = f"job {self.job} cannot start as submitted ({job.reason}): {job.blocked}"
                    raise BringUpError(text, "It was cancelled.")
                if not job.pending and job.nodes:
                    return job.nodes
                why = (
                    f"pending ({job.reason or 'no reason yet'}{f', estimated start {job.start}' if job.start else ''})"
                )
            if time.monotonic() > deadline:
                raise StillWaiting(
                    f"no nodes within {patience:g} s: job {self.job} was {why}",
                    "Wait longer with --timeout, or ask for fewer --nodes or another --partition.",
                )
            show(f"job {self.job} is {why}")
            time.sleep(pause)
            pause = min(ASK_EVERY[1], pause * 1.3)

    def alive(self) -> bool:
        """Asked of Slurm every few seconds only."""
        if time.monotonic() - self._asked > ASK_EVERY[1]:
            self._asked = time.monotonic()
            with contextlib.suppress(SlurmUnavailable):
                job = self._look()
                self._lives = job is not None and job.alive
        return self._lives

    def failures(self) -> dict[str, str]:
        return up.failures_in(self._output)

    def complaint(self) -> str:
        return _first_error(self._output)

    @property
    def _output(self) -> Path:
        return self.directory / f"slurm-{self.job}.out"

    def end(self, patience: float) -> str:
        """Cancel the job and wait until it is gone."""
        if not self.job:
            return ""
        now = time.monotonic()
        cancel_at, deadline = now + patience, now + patience + END_LIMIT
        with contextlib.suppress(SlurmError):
            while (now := time.monotonic()) < deadline:
                if now >= cancel_at:
                    self.backend.cancel(self.directory, [self.job])
                    cancel_at = deadline
                job = self._look()
                if job is None or not job.alive:
                    return ""
                time.sleep(0.2)
        return f"job {self.job} may be there still: `scancel {self.job}`"

    def _look(self) -> Job | None:
        return self.backend.states(self.directory, [self.job]).get(self.job)


@dataclass
class LocalProcesses:
    """Processes of this machine, each a node."""

    count: int
    directory: Path
    canary: str
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        own = {"RAYLAUNCH_CLUSTER_DIR": str(self.directory), "RAYLAUNCH_CANARY": self.canary,
               "RAYLAUNCH_LOCAL_COUNT": str(self.count)}  # fmt: skip
        command = [sys.executable, "-P", "-m", "raylaunch.tools.doctor.node_check"]
        for index in range(self.count):
            env = {**os.environ, **own, "RAYLAUNCH_LOCAL_INDEX": str(index)}
            with (self.directory / "nodes.out").open("ab") as out:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
                )
            self._running.append(process)

    def nodes(self, patience: float, show: Show) -> tuple[str, ...]:
        return tuple(f"local{index + 1}" for index in range(self.count))

    def alive(self) -> bool:
        return any(process.poll() is None for process in self._running)

    def failures(self) -> dict[str, str]:
        return up.failures_in(self.directory / "nodes.out")

    def complaint(self) -> str:
        return _first_error(self.directory / "nodes.out")

    def end(self, patience: float) -> str:
        left = sum(processes.end_tree(process.pid) for process in self._running)
        for process in self._running:
            process.poll()
        return f"{left} processes do not end" if left else ""


def _first_error(output: Path) -> str:
    with contextlib.suppress(OSError):
        lines = output.read_text(errors="replace").splitlines()
        return next((line.strip()[:300] for line in lines if "error" in line.lower()), "")
    return ""
