"""What the sandbox itself asks of its Slurm: node states, and giving a node back."""

from __future__ import annotations

import subprocess
from collections.abc import Collection

from raylaunch.errors import SandboxError
from raylaunch.tools.sandbox.node import system_env, tail
from raylaunch.tools.sandbox.procs import wait_for
from raylaunch.tools.sandbox.spec import SandboxLayout

# Reasons that Slurm itself gives a node; any other was set by a person and is left alone.
_SLURMS_OWN_REASONS = ("Node unexpectedly rebooted", "Not responding")


def call(layout: SandboxLayout, *argv: str, timeout: float = 10) -> str:
    """Output of a Slurm command, under a time limit: clients hang while slurmctld is away."""
    env = {**system_env(), "SLURM_CONF": str(layout.slurm_conf)}
    try:
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise SandboxError(
            f"`{' '.join(argv)}` did not answer within {timeout:g} s", tail(layout.log / "slurmctld.log")
        ) from None
    if done.returncode != 0:
        raise SandboxError(f"`{' '.join(argv)}` failed", done.stderr.strip())
    return done.stdout


def node_states(layout: SandboxLayout, timeout: float = 10) -> dict[str, tuple[str, str]]:
    """Node → (state as sinfo's %T, with `*` when it does not respond; reason or "none")."""
    text = call(layout, "sinfo", "-h", "-N", "-p", "main", "-o", "%N|%T|%E", timeout=timeout)
    rows = (line.split("|", 2) for line in text.splitlines())
    return {row[0]: (row[1], row[2]) for row in rows}


def wait_in_service(layout: SandboxLayout, nodes: Collection[str], resume: bool, timeout: float) -> None:
    """Wait until Slurm would run jobs on the nodes.

    With `resume`, a node that Slurm holds back only because it rebooted or was silent is given
    back, as an administrator would.
    """
    states: dict[str, tuple[str, str]] = {}

    def ready() -> bool:
        states.update(node_states(layout))
        missing = [node for node in nodes if not _in_service(states[node][0])]
        for node in missing:
            state, reason = states[node]
            if resume and state == "down" and reason.startswith(_SLURMS_OWN_REASONS):
                call(layout, "scontrol", "update", f"nodename={node}", "state=resume")
        return not missing

    wait_for(
        f"{', '.join(nodes)} in service",
        ready,
        timeout,
        lambda: f"sinfo says {states}\n  " + tail(layout.log / "slurmctld.log"),
    )


def slurmd_start(layout: SandboxLayout, node: str) -> str:
    """When the slurmd that slurmctld knows of started, as Slurm writes it; to the second."""
    text = call(layout, "scontrol", "--oneliner", "show", "node", node)
    return text.partition("SlurmdStartTime=")[2].split(" ", 1)[0]


def wait_registered(layout: SandboxLayout, node: str, before: str, timeout: float) -> None:
    """Wait until another slurmd than the one started at `before` has reported to slurmctld."""
    wait_for(
        f"{node} registered",
        lambda: slurmd_start(layout, node) != before,
        timeout,
        lambda: tail(layout.log / f"{node}.slurmd.log"),
    )


def _in_service(state: str) -> bool:
    return state.rstrip("~#!%$@^-") in ("idle", "planned", "mixed", "allocated", "completing")
