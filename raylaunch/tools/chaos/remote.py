"""Reaching into a run's nodes: who runs there, and a signal to one of them.

A sandbox's nodes are entered; a cluster of one's own by `srun --overlap` into its own job; local nodes
are here. In each node `probe` looks, and signals nothing that does not carry the cluster's marker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raylaunch.errors import RaylaunchError, SandboxError
from raylaunch.scheduler.slurm.client import run
from raylaunch.scheduler.slurm.environment import clean_env
from raylaunch.state.members import Members
from raylaunch.state.records import Cluster
from raylaunch.tools.chaos import probe
from raylaunch.tools.sandbox import Sandbox
from raylaunch.tools.sandbox.spec import BASE, PREFIX

PROBE = (sys.executable, "-I", "-S", str(Path(probe.__file__).resolve()))
PATIENCE = 30.0


class Miss(RaylaunchError):
    """What was to be hit is not there (any more), or out of reach."""


class RunInNode(Protocol):
    """Runs a command in a node: (node, argv) → its output; Miss when that fails."""

    def __call__(self, node: str, argv: Sequence[str]) -> str: ...


@dataclass(frozen=True)
class Process:
    """A process of the cluster, in its node's own counting."""

    node: str
    pid: int
    start: int
    argv: tuple[str, ...]

    @property
    def program(self) -> str:
        return Path(self.argv[0]).name if self.argv else ""

    def has(self, word: str) -> bool:
        """Whether one of its arguments contains this."""
        return any(word in argument for argument in self.argv)


@dataclass(frozen=True)
class Reach:
    """Into the nodes of one cluster."""

    canary: str
    run: RunInNode

    def processes(self, node: str) -> list[Process]:
        """The cluster's processes in this node."""
        rows: list[dict[str, Any]] = json.loads(self.run(node, [*PROBE, "list", self.canary]) or "[]")
        return [Process(node, int(r["pid"]), int(r["start"]), tuple(r["argv"])) for r in rows]

    def signal(self, process: Process, number: int) -> None:
        """Send it; Miss when it is gone."""
        words = [str(word) for word in (process.pid, process.start, int(number))]
        self.run(process.node, [*PROBE, "signal", self.canary, *words])


def of_cluster(directory: Path, cluster: Cluster, sandbox: Sandbox | None) -> Reach:
    """The way into this cluster's nodes."""
    if sandbox is not None:
        return Reach(cluster.canary, lambda node, argv: _in_sandbox(sandbox, node, argv))
    if cluster.backend == "local":
        return Reach(cluster.canary, lambda node, argv: _finished(node, argv, os.environ))
    return Reach(cluster.canary, lambda node, argv: _in_job(directory, cluster, node, argv))


def _in_sandbox(sandbox: Sandbox, node: str, argv: Sequence[str]) -> str:
    try:
        return _finished(node, sandbox.command(node, argv, cwd="/"), {**os.environ, **sandbox.env()})
    except SandboxError as error:
        raise Miss(error.message) from error


def _in_job(directory: Path, cluster: Cluster, node: str, argv: Sequence[str]) -> str:
    """By a step of our own beside the agents' in the job that has the node."""
    row = Members.read(directory).node(node)
    job = (row.job if row is not None else "") or cluster.jobs[0]
    options = ["--overlap", "--nodes=1", "--ntasks=1", "--quiet", "--mem=0", "--gres=none", "--input=none"]
    return _finished(node, ["srun", f"--jobid={job}", *options, f"--nodelist={node}", *argv], clean_env(os.environ))


def _finished(node: str, command: Sequence[str], env: Mapping[str, str]) -> str:
    try:
        done = run(command, PATIENCE, None, env)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise Miss(f"{node} cannot be reached: {error}") from error
    if done.returncode != 0:
        raise Miss(f"{node}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def sandbox_of(state_dir: Path, env: Mapping[str, str]) -> Sandbox | None:
    """The sandbox that this shell or this state directory belongs to; None on a real cluster."""
    for path in (Path(env.get("SLURM_CONF", "")), state_dir.absolute()):
        parts = path.parts
        depth = len(BASE.parts)
        if parts[:depth] == BASE.parts and len(parts) > depth and parts[depth].startswith(PREFIX):
            return Sandbox.load(parts[depth].removeprefix(PREFIX))
    return None
