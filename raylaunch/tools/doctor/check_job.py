"""The nodes to check: a short Slurm job, or processes on this machine. Both follow one protocol: start, wait for nodes,
end."""

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
    """The job did not start in time."""


class Allocation(Protocol):
    """The allocation of nodes."""

    def start(self) -> None:
        """Request the nodes."""
        ...

    def nodes(self, patience: float, show: Show) -> tuple[str, ...]:
        """Wait for the nodes; returns their names, in the order of their indices."""
        ...

    def alive(self) -> bool:
        """Whether any node may still respond."""
        ...

    def failures(self) -> dict[str, str]:
        """Node → the error that it printed before it stopped."""
        ...

    def complaint(self) -> str:
        """The first error in the output of the nodes or of Slurm; "" if there is none."""
        ...

    def end(self, patience: float) -> str:
        """Release the nodes; they get `patience` seconds to end by themselves. Returns what is left running, or ""."""
        ...


@dataclass
class SlurmJob:
    """A Slurm job."""

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
        why = "in an unknown state (Slurm does not respond)"
        while True:
            with contextlib.suppress(SlurmUnavailable):  # it may answer next time
                job = self._look()
                if job is None or not job.alive:
                    hint = "Most likely, the nodes cannot access the state directory. It must be shared."
                    state = job.state if job else "no longer known to Slurm"
                    raise BringUpError(f"job {self.job} ended immediately ({state})", hint)
                if job.blocked:
                    text = f"job {self.job} cannot start as submitted ({job.reason}): {job.blocked}"
                    raise BringUpError(text, "The job was cancelled. Change the request and try again.")
                if not job.pending and job.nodes:
                    return job.nodes
                start = f", estimated start {job.start}" if job.start else ""
                why = f"pending ({job.reason or 'no reason given'}{start})"
            if time.monotonic() > deadline:
                raise StillWaiting(
                    f"job {self.job} did not start within {patience:g} s; it is {why}",
                    "Increase --timeout, or request fewer --nodes or another --partition.",
                )
            show(f"job {self.job} is {why}")
            time.sleep(pause)
            pause = min(ASK_EVERY[1], pause * 1.3)

    def alive(self) -> bool:
        """Queries Slurm every few seconds only."""
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
        return f"job {self.job} may still exist; cancel it with `scancel {self.job}`"

    def _look(self) -> Job | None:
        return self.backend.states(self.directory, [self.job]).get(self.job)


@dataclass
class LocalProcesses:
    """Processes on this machine, one per node."""

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
        return f"{left} processes of the check did not exit" if left else ""


def _first_error(output: Path) -> str:
    with contextlib.suppress(OSError):
        lines = output.read_text(errors="replace").splitlines()
        return next((line.strip()[:300] for line in lines if "error" in line.lower()), "")
    return ""
