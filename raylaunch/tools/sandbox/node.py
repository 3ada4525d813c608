"""Nodes: start their init (init.py), end it, and run commands inside.

A node *is* its init process: PID 1 of the node's pid namespace, recorded with its start
time in run/NODE.json. When it gets SIGKILL, the kernel ends all else in the namespace.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from raylaunch.errors import SandboxError
from raylaunch.tools.sandbox import bridge, cgroups, init, slurm_conf
from raylaunch.tools.sandbox.procs import Proc, wait_for
from raylaunch.tools.sandbox.spec import SandboxLayout, SandboxSpec


class NodePlan(TypedDict):
    """What `up` tells a node's init."""

    name: str
    cgroups: list[str]
    """cgroup.procs files to join."""
    freezer: bool
    """Whether to mount the v1 freezer hierarchy for Slurm."""
    gpu_devices: list[str]
    files: dict[str, str]
    """Files to put over others: target → source."""
    network: list[str]
    command: list[str]
    env: dict[str, str]


def system_env() -> dict[str, str]:
    """This environment, with the sbin directories that daemons live in on the path."""
    path = os.environ.get("PATH", "/usr/bin:/bin")
    return {**os.environ, "PATH": f"{path}:/usr/local/sbin:/usr/sbin:/sbin"}


def boot(
    layout: SandboxLayout, spec: SandboxSpec, nodes: Sequence[str], before_go: Callable[[], None] | None = None
) -> None:
    """Start these nodes side by side; slurmd runs in each once `before_go` has returned."""
    started: dict[str, subprocess.Popen[str]] = {}
    pids: dict[str, int] = {}
    try:
        for node in nodes:
            started[node] = _start_init(layout, spec, node)
        for node, outer in started.items():
            assert outer.stdout is not None
            line = outer.stdout.readline()
            if outer.wait() != 0 or not line:
                raise SandboxError(f"{node} did not start", tail(layout.log / f"{node}.init.log"))
            pids[node] = int(line)
            Proc.of(pids[node]).save(record(layout, node))
        bridge.plug(layout, spec, pids)
        if before_go is not None:
            before_go()
        for node, outer in started.items():
            assert outer.stdin is not None
            try:
                outer.stdin.write("go\n")
                outer.stdin.flush()
            except BrokenPipeError:
                raise SandboxError(f"{node} ended while it started", tail(layout.log / f"{node}.init.log")) from None
    finally:
        for outer in started.values():
            with contextlib.suppress(BrokenPipeError):
                outer.communicate()  # closes the pipes and reaps the outer process


def record(layout: SandboxLayout, node: str) -> Path:
    return layout.run / f"{node}.json"


def living(layout: SandboxLayout, node: str) -> Proc | None:
    """The node's init, or None when the node is not running."""
    proc = Proc.load(record(layout, node))
    return proc if proc is not None and proc.alive() else None


def kill(layout: SandboxLayout, spec: SandboxSpec, node: str, silent: bool) -> None:
    """End all processes of a node at once and take its cable away."""
    proc = living(layout, node)
    if proc is None:
        raise SandboxError(f"{node} is not running", f"raylaunch sandbox start {node}")
    if silent:
        bridge.unplug(layout, spec, node)
    proc.kill()
    wait_for(f"{node} dead", lambda: not proc.alive(), 10)
    clear(layout, spec, node)
    os.utime(record(layout, node))  # when it ended, for `wait_until_noticeable`


def clear(layout: SandboxLayout, spec: SandboxSpec, node: str) -> None:
    """Remove what a dead node leaves on the machine: commands entering it, cable, cgroups."""
    bridge.unplug(layout, spec, node)
    group = cgroups.group(layout, node)
    cgroups.kill(group)
    # A group that was frozen would freeze the next init, and Slurm would take groups of jobs
    # that are no more for running steps.
    for path in (group, cgroups.freezer_group(layout, node)):
        if path is not None:
            cgroups.remove(path)


def wait_until_noticeable(layout: SandboxLayout, node: str) -> None:
    """Wait until a boot of the node is certain to be seen as one: 1 to 2 s after its death.

    Slurm compares the second of the boot, worked out from an uptime that is rounded up, with
    the second in which it last heard of the node. Of a node that is back sooner it would not
    notice the reboot and keep its jobs as running. No machine boots that fast.
    """
    ended = int(record(layout, node).stat().st_mtime)
    wait_for(f"time for {node} to boot", lambda: int(time.time()) > ended + 1, 5)


def enter(layout: SandboxLayout, node: str, argv: Sequence[str], cwd: str | None = None) -> list[str]:
    """The command line that runs `argv` inside the node, in `cwd` where the node has it."""
    proc = living(layout, node)
    if proc is None:
        raise SandboxError(f"{node} is not running", f"raylaunch sandbox start {node}")
    spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--time", "--cgroup"]
    # Joins the cgroup before the namespaces: from here on freeze and kill reach it.
    join = 'echo 0 > "$1" || exit 125; shift; exec "$@"'
    inside = 'cd "$1" 2>/dev/null || cd /; shift; exec "$@"'
    procs = str(cgroups.group(layout, node) / "cgroup.procs")
    return [
        *("sh", "-c", join, "sh", procs),
        *("nsenter", "--target", str(proc.pid), *spaces, "--"),
        # Ending nsenter must end the command too, as ending ssh's terminal does.
        *("setpriv", "--pdeathsig", "KILL", "--"),
        *("sh", "-c", inside, "sh", cwd or str(Path.cwd()), *argv),
    ]


def tail(path: Path, lines: int = 8) -> str:
    """The end of a log file, for an error's hint."""
    try:
        text = path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return f"{path} was not written"
    return f"{path}:\n  " + "\n  ".join(text.splitlines()[-lines:])


def _start_init(layout: SandboxLayout, spec: SandboxSpec, node: str) -> subprocess.Popen[str]:
    groups = [cgroups.group(layout, node)]
    freezer = cgroups.freezer_group(layout, node) if spec.cgroup_proctrack else None
    if freezer is not None:
        groups.append(freezer)
    for path in groups:
        path.mkdir(parents=True, exist_ok=True)
    spool = layout.spool / node
    spool.mkdir(mode=0o755, exist_ok=True)
    plan = NodePlan(
        name=node,
        cgroups=[str(path / "cgroup.procs") for path in groups],
        freezer=freezer is not None,
        gpu_devices=[f"{slurm_conf.GPU_DEVICE}{i}" for i in range(spec.gpus)],
        files={
            "/etc/hosts": str(layout.dir / "etc" / "hosts"),
            # No name server can be reached: an empty file makes look-ups fail at once.
            "/etc/resolv.conf": str(layout.dir / "etc" / "resolv.conf"),
        },
        network=bridge.node_setup(spec, node),
        command=["slurmd", "-D", "-f", str(layout.slurm_conf), "-N", node],
        env={
            "PATH": system_env()["PATH"],
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(layout.slurm_conf),
        },
    )
    script = str(Path(init.__file__).resolve())
    with (layout.log / f"{node}.init.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", script, layout.name, node],  # the names are for ps
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd="/",
            env=system_env(),
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(plan) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise SandboxError(f"{node} did not start", tail(layout.log / f"{node}.init.log")) from None
    return process
