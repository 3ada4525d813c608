"""Doing each kind of fault to a run, and undoing it.

    aim: a planned fault → what it hits now → strike: do it → a Broken, that `mend` undoes, or None

What is hit is chosen among what there is by the plan's number alone. Processes are signalled through
`remote`, which touches nothing that is not the cluster's; the rest is the sandbox's own business.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from raylaunch.errors import RaylaunchError, UsageError
from raylaunch.tools.chaos.remote import Miss, Process, Reach
from raylaunch.tools.chaos.schedule import KINDS, Planned
from raylaunch.tools.chaos.target import Victim
from raylaunch.tools.sandbox import Sandbox, daemons, slurm
from raylaunch.tools.sandbox.procs import Proc

T = TypeVar("T")
REASON = "raylaunch chaos"


@dataclass(frozen=True)
class Aim:
    """What a fault hits. `process` where it is one process."""

    kind: str
    node: str
    rank: int | None = None
    process: Process | None = None
    silent: bool = False

    def __str__(self) -> str:
        rank = f" rank {self.rank}" if self.rank is not None else ""
        return f"{self.kind}{rank}{f' on {self.node}' if self.node else ''}"


@dataclass(frozen=True)
class Broken:
    """Something that is to be mended."""

    text: str
    mend: Callable[[], None]


def check(kinds: Sequence[str], sandbox: Sandbox | None, backend: str) -> None:
    """UsageError for faults that cannot be done here."""
    root = [kind for kind in kinds if KINDS[kind].needs_root]
    if root and (sandbox is None or os.geteuid() != 0):
        why = "needs a sandbox" if sandbox is None else "needs root"
        others = ", ".join(kind for kind, found in KINDS.items() if not found.needs_root)
        raise UsageError(
            f"fault {', '.join(root)} {why}" + (f" (backend {backend})" if sandbox is None else ""),
            f"Without one there is: {others}." if sandbox is None else "Run it as root, or choose among: " + others,
        )
    if sandbox is not None and os.geteuid() != 0:
        raise UsageError("a sandbox's nodes are entered by root alone", "Run it with sudo.")


@dataclass(frozen=True)
class Faults:
    """The faults that can be done to one run."""

    victim: Victim
    reach: Reach
    sandbox: Sandbox | None

    def aim(self, planned: Planned) -> Aim:
        """What this fault would hit now; Miss when there is nothing of that kind."""
        kind, head = planned.kind, self.victim.head()
        nodes = self.victim.ready()
        if KINDS[kind].takes_node and len(nodes) - 1 < self.victim.min_nodes:
            raise Miss(f"{len(nodes)} nodes are ready, and {self.victim.min_nodes} must be left")
        match kind:
            case "worker" | "hang":
                worker = _chosen(self.victim.workers(), planned.pick, "worker")
                process = self._process(worker.node, lambda p: p.pid == worker.pid, f"rank {worker.rank}")
                return Aim(kind, worker.node, worker.rank, process)
            case "raylet":
                node = _chosen(nodes, planned.pick, "node")
                return Aim(kind, node, process=self._process(node, lambda p: p.program == "raylet", "raylet"))
            case "agent":
                node = _chosen(nodes, planned.pick, "node")
                pid = self.victim.agent(node)
                return Aim(kind, node, process=self._process(node, lambda p: p.pid == pid, "agent"))
            case "driver" | "gcs" | "dashboard":
                return Aim(kind, head, process=self._process(head, _IS[kind], kind))
            case "slurmctld":
                return Aim(kind, "")
            case "head":
                return Aim(kind, head, silent=planned.coin)
            case "node" | "drain":
                others = [node for node in nodes if node != head]
                return Aim(kind, _chosen(others, planned.pick, "node"), silent=planned.coin)
            case _:
                return Aim(kind, _chosen(nodes, planned.pick, "node"))

    def strike(self, aim: Aim) -> Broken | None:
        """Do it. What is returned has to be mended, sooner or later."""
        sandbox, node, process = self.sandbox, aim.node, aim.process
        if process is not None:
            self.reach.signal(process, signal.SIGSTOP if aim.kind == "hang" else signal.SIGKILL)
            return Broken(f"go on {aim}", lambda: self._continue(process)) if aim.kind == "hang" else None
        assert sandbox is not None, "checked before"
        match aim.kind:
            case "node" | "head":
                sandbox.kill(node, silent=aim.silent)
                return Broken(f"start {node}", lambda: sandbox.start(node))
            case "freeze":
                sandbox.freeze(node)
                return Broken(f"thaw {node}", lambda: sandbox.thaw(node))
            case "cut":
                sandbox.cut(node)
                return Broken(f"heal {node}", lambda: sandbox.heal(node))
            case "drain":
                slurm.call(sandbox.layout, *_update(node), "state=drain", f"reason={REASON}")
                return Broken(f"give {node} back", lambda: _give_back(sandbox, node))
            case "slurmd":
                return _kill_slurmd(sandbox, node)
            case _:
                return _kill_slurmctld(sandbox)

    def _process(self, node: str, wanted: Callable[[Process], bool], what: str) -> Process:
        for process in self.reach.processes(node):
            if wanted(process):
                return process
        raise Miss(f"no {what} on {node}")

    def _continue(self, process: Process) -> None:
        try:
            self.reach.signal(process, signal.SIGCONT)
        except Miss:
            return  # the recovery has ended it, as it should


_IS: dict[str, Callable[[Process], bool]] = {
    "driver": lambda p: p.has("raylaunch.training.driver"),
    "gcs": lambda p: p.program == "gcs_server",
    "dashboard": lambda p: p.has("dashboard/dashboard.py"),
}


def _chosen(among: Sequence[T], pick: float, what: str) -> T:
    if not among:
        raise Miss(f"no {what} to inject the fault into")
    return among[int(pick * len(among))]


def _update(node: str) -> list[str]:
    return ["scontrol", "update", f"nodename={node}"]


def _give_back(sandbox: Sandbox, node: str) -> None:
    slurm.call(sandbox.layout, *_update(node), "state=resume")


def _kill_slurmd(sandbox: Sandbox, node: str) -> Broken:
    """The node's first process started it with these very arguments."""
    conf = str(sandbox.layout.slurm_conf)
    ended = sandbox.exec(node, ["pkill", "-KILL", "-x", "-f", f"slurmd -D -f {conf} -N {node}"], cwd="/")
    if ended.returncode != 0:
        raise Miss(f"no slurmd on {node}")
    # Not a child of the command that enters the node: that one's end would be its own.
    start = 'setsid "$@" </dev/null >/dev/null 2>&1 &'

    def mend() -> None:
        sandbox.exec(node, ["sh", "-c", start, "sh", "slurmd", "-D", "-f", conf, "-N", node], cwd="/", check=True)

    return Broken(f"start slurmd on {node}", mend)


def _kill_slurmctld(sandbox: Sandbox) -> Broken:
    process = Proc.load(daemons.record(sandbox.layout, "slurmctld"))
    if process is None or not process.alive():
        raise Miss("no slurmctld")
    process.kill()

    def mend() -> None:
        daemons.start_slurmctld(sandbox.layout)
        daemons.wait_slurmctld(sandbox.layout, sandbox.spec)

    return Broken("start slurmctld", mend)


def mended(broken: Broken, tries: int = 3) -> str:
    """Mend it; "" when that worked, else why not."""
    for left in reversed(range(tries)):
        try:
            broken.mend()
            return ""
        except (RaylaunchError, OSError) as error:
            if not left:
                return f"{broken.text}: {error}"
            time.sleep(1.0)
    raise AssertionError("unreachable")
