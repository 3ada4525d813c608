"""A real Slurm cluster on this machine, as one object: up, use, break, mend, down.

The flow of `up`: directory and configuration → munged → (accounting) → slurmctld beside the
nodes' namespaces → cables → slurmd in each node → wait until Slurm calls all nodes idle.
Whatever fails on the way takes the sandbox down again; `down` works on any half of it.

What can be asked of the kernel (is it frozen, is it cut, is it alive) is not remembered.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylaunch.errors import SandboxError, UsageError
from raylaunch.tools.sandbox import bridge, cgroups, daemons, node, slurm, slurm_conf, teardown
from raylaunch.tools.sandbox.procs import Proc, write_atomic
from raylaunch.tools.sandbox.spec import DEFAULT_NAME, MAX_NODES, SandboxLayout, SandboxSpec

_COMMANDS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sinfo": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
_ACCOUNTING_COMMANDS = {"slurmdbd": "slurmdbd slurm-wlm-mysql-plugin", "mariadbd": "mariadb-server"}


@dataclasses.dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node as the machine and Slurm see it."""

    name: str
    address: str
    running: bool
    pid: int | None
    """Of its init, on the machine; None when it is not running."""
    frozen: bool
    cut: bool
    slurm: str
    """sinfo's state, "unknown" when slurmctld does not answer."""
    reason: str
    """Why Slurm holds it back; "" when it does not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """A sandbox at a glance."""

    name: str
    directory: str
    cpus: int
    gpus: int
    accounting: bool
    daemons: dict[str, bool]
    """Daemon → whether it lives."""
    nodes: list[NodeStatus]


def missing(accounting: bool = False) -> str:
    """Why no sandbox can be made here, with the remedy, in one line; "" when one can."""
    if os.geteuid() != 0:
        return "the sandbox makes namespaces and network links, which needs root: run it with sudo"
    commands = {**_COMMANDS, **(_ACCOUNTING_COMMANDS if accounting else {})}
    path = node.system_env()["PATH"]
    absent = {name: package for name, package in commands.items() if not shutil.which(name, path=path)}
    if absent:
        packages = sorted({p for package in absent.values() for p in package.split()})
        extra = ["slurm-wlm-basic-plugins"] if {"slurmd", "slurmctld"} & absent.keys() else []
        return f"{', '.join(absent)} missing: apt-get install -y {' '.join(packages + extra)}"
    return ""


@dataclasses.dataclass(frozen=True, slots=True)
class Sandbox:
    """A sandbox that is up. Make one with `up`, or `load` the one of that name."""

    layout: SandboxLayout
    spec: SandboxSpec

    @classmethod
    def up(
        cls,
        name: str = DEFAULT_NAME,
        nodes: int = 4,
        cpus: int = 4,
        gpus: int = 0,
        accounting: bool = False,
    ) -> Sandbox:
        """Start a cluster of `nodes` nodes; returns when Slurm would run jobs on all of them.

        Raises UsageError for sizes that make no sense, SandboxError when it cannot be made.
        """
        layout = SandboxLayout(name)
        for what, value, low, high in (
            ("--nodes", nodes, 1, MAX_NODES),
            ("--cpus", cpus, 1, 1024),
            ("--gpus", gpus, 0, 64),
        ):
            if not low <= value <= high:
                raise UsageError(f"{what} {value}: must be from {low} to {high}")
        _require_able(accounting)
        try:
            layout.dir.mkdir(mode=0o755)
        except FileExistsError:
            raise SandboxError(
                f"sandbox {name!r} already exists",
                f"use it, or first: raylaunch sandbox down --name {name}",
            ) from None
        try:
            return cls._build(layout, nodes, cpus, gpus, accounting)
        except BaseException:  # an interrupt too must not leave half a cluster behind
            teardown.down(layout)
            raise

    @classmethod
    def _build(cls, layout: SandboxLayout, nodes: int, cpus: int, gpus: int, accounting: bool) -> Sandbox:
        _make_directories(layout)
        if cgroups.ensure_mount("cgroup2", layout) is None:
            raise SandboxError("no cgroup2 file system can be mounted here", "in a container: run it --privileged")
        freezer = cgroups.ensure_mount("freezer", layout)
        with bridge.network_lock():
            spec = SandboxSpec(
                name=layout.name,
                nodes=nodes,
                cpus=cpus,
                gpus=gpus,
                accounting=accounting,
                memory=_machine_memory(),
                network=bridge.choose_network(layout),
                cgroup_proctrack=freezer is not None,
            )
            bridge.add_bridge(layout, spec)
        _write_configuration(layout, spec)
        daemons.start_munged(layout)
        if accounting:
            daemons.start_accounting(layout, spec)
            slurm.call(layout, "sacctmgr", "-i", "add", "cluster", spec.name, timeout=60)
        daemons.start_slurmctld(layout)
        node.boot(layout, spec, spec.node_names, lambda: daemons.wait_slurmctld(layout, spec))
        slurm.wait_in_service(layout, spec.node_names, resume=False, timeout=60)
        # `sacct -c` of any user opens it for writing, though it only reads; slurmctld made it 0644.
        (layout.log / "jobcomp.log").chmod(0o666)
        # Last: with this record the sandbox counts as up.
        write_atomic(layout.spec, spec.to_json())
        return cls(layout, spec)

    @classmethod
    def load(cls, name: str = DEFAULT_NAME) -> Sandbox:
        """The sandbox of that name; SandboxError when there is none."""
        layout = SandboxLayout(name)
        return cls(layout, layout.read_spec())

    @property
    def nodes(self) -> list[str]:
        return self.spec.node_names

    def env(self) -> dict[str, str]:
        """Variables that make Slurm's commands and raylaunch, of any user, use this sandbox."""
        return {"SLURM_CONF": str(self.layout.slurm_conf), "RAYLAUNCH_STATE_DIR": str(self.layout.state)}

    def command(self, node_name: str, argv: Sequence[str], cwd: str | None = None) -> list[str]:
        """The command line that runs `argv` in a node (as root), for exec or subprocess.

        It runs in `cwd` (here, by default) where the node has that directory, else in /.
        """
        self._check(node_name)
        return node.enter(self.layout, node_name, argv, cwd)

    def exec(self, node_name: str, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a command in a node and wait; `options` are those of subprocess.run."""
        options["env"] = self._env_for(options.get("env"))
        options.setdefault("check", False)
        return subprocess.run(self.command(node_name, argv, options.pop("cwd", None)), **options)

    def popen(self, node_name: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command in a node; `options` are those of subprocess.Popen.

        Killing the returned process ends the command in the node as well.
        """
        options["env"] = self._env_for(options.get("env"))
        return subprocess.Popen(self.command(node_name, argv, options.pop("cwd", None)), **options)

    def kill(self, node_name: str, silent: bool = False) -> None:
        """End all processes of a node at once.

        Its peers see their connections closed, as when a kernel still says goodbye; with
        `silent` the cable goes first and they hear nothing, as after a power loss.
        """
        self._check(node_name)
        node.kill(self.layout, self.spec, node_name, silent)

    def start(self, node_name: str, resume: bool = True) -> None:
        """Boot a killed node; returns when it is in service.

        With `resume`, it is given back if Slurm holds it back for the reboot alone; without,
        Slurm's own rules decide and this returns as soon as slurmd has registered.
        """
        self._check(node_name)
        if node.living(self.layout, node_name) is not None:
            raise SandboxError(f"{node_name} is running already", f"first: raylaunch sandbox kill {node_name}")
        node.clear(self.layout, self.spec, node_name)  # its init may have ended by itself
        node.wait_until_noticeable(self.layout, node_name)
        before = slurm.slurmd_start(self.layout, node_name)
        node.boot(self.layout, self.spec, [node_name])
        slurm.wait_registered(self.layout, node_name, before, timeout=60)
        if resume:
            slurm.wait_in_service(self.layout, [node_name], resume=True, timeout=60)

    def cut(self, node_name: str) -> None:
        """Cut the node's network: nothing comes in or out, and nobody is told."""
        self._check(node_name, running=True)
        bridge.cut(self.layout, self.spec, node_name)

    def heal(self, node_name: str) -> None:
        """Undo `cut`."""
        self._check(node_name, running=True)
        bridge.heal(self.layout, self.spec, node_name)

    def freeze(self, node_name: str) -> None:
        """Stop every process of the node, slurmd too; returns when all stand still."""
        self._check(node_name, running=True)
        cgroups.set_frozen(cgroups.group(self.layout, node_name), True)

    def thaw(self, node_name: str) -> None:
        """Undo `freeze`."""
        self._check(node_name, running=True)
        cgroups.set_frozen(cgroups.group(self.layout, node_name), False)

    def status(self) -> Status:
        """What lives, what is frozen or cut, and what Slurm thinks of each node."""
        try:
            states = slurm.node_states(self.layout, timeout=3)
        except SandboxError:  # a dead slurmctld is a thing to show, not to fail on
            states = {}
        names = ["munged", "slurmctld", *(["mariadbd", "slurmdbd"] if self.spec.accounting else [])]
        procs = {name: Proc.load(daemons.record(self.layout, name)) for name in names}
        return Status(
            name=self.spec.name,
            directory=str(self.layout.dir),
            cpus=self.spec.cpus,
            gpus=self.spec.gpus,
            accounting=self.spec.accounting,
            daemons={name: proc is not None and proc.alive() for name, proc in procs.items()},
            nodes=[self._node_status(name, *states.get(name, ("unknown", ""))) for name in self.nodes],
        )

    def down(self) -> bool:
        """Remove all of it; True if there was something. SandboxError names what is left."""
        return teardown.down(self.layout)

    def _node_status(self, name: str, state: str, reason: str) -> NodeStatus:
        proc = node.living(self.layout, name)
        return NodeStatus(
            name=name,
            address=self.spec.address(name),
            running=proc is not None,
            pid=proc.pid if proc else None,
            frozen=proc is not None and cgroups.frozen(cgroups.group(self.layout, name)),
            cut=bridge.is_cut(self.layout, self.spec, name),
            slurm=state,
            reason="" if reason == "none" else reason,
        )

    def _check(self, node_name: str, running: bool = False) -> None:
        self.spec.index(node_name)
        _require_root()
        if running and node.living(self.layout, node_name) is None:
            raise SandboxError(f"{node_name} is not running", f"raylaunch sandbox start {node_name}")

    def _env_for(self, env: Mapping[str, str] | None) -> dict[str, str]:
        return {**(os.environ if env is None else env), **self.env()}


def take_down(name: str = DEFAULT_NAME) -> bool:
    """`down` for a sandbox of which anything may be missing; False if there was nothing."""
    layout = SandboxLayout(name)
    if teardown.leftovers(layout, processes=False):
        _require_root()
    return teardown.down(layout)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise SandboxError("this changes namespaces and network links, which needs root", "run it with sudo")


def _require_able(accounting: bool) -> None:
    reason = missing(accounting)
    if reason:
        what, _, remedy = reason.partition(": ")
        raise SandboxError(what, remedy)


def _make_directories(layout: SandboxLayout) -> None:
    modes = {
        layout.dir: 0o755,
        layout.dir / "etc": 0o755,
        layout.dir / "munge": 0o755,
        layout.run: 0o755,
        layout.log: 0o755,
        layout.spool: 0o755,
        layout.spool / "slurmctld": 0o700,
        layout.state: 0o1777,
    }
    for path, mode in modes.items():
        path.mkdir(exist_ok=True)
        path.chmod(mode)  # mkdir heeds the umask, and other users must get in


def _write_configuration(layout: SandboxLayout, spec: SandboxSpec) -> None:
    etc = layout.dir / "etc"
    write_atomic(layout.slurm_conf, slurm_conf.slurm_conf(spec, layout))
    write_atomic(etc / "cgroup.conf", slurm_conf.cgroup_conf())
    write_atomic(etc / "gres.conf", slurm_conf.gres_conf(spec))
    write_atomic(etc / "hosts", slurm_conf.hosts(spec))
    write_atomic(etc / "resolv.conf", "")
    if spec.accounting:
        write_atomic(etc / "slurmdbd.conf", slurm_conf.slurmdbd_conf(spec, layout), mode=0o600)


def _machine_memory() -> int:
    """This machine's memory in MiB."""
    first = Path("/proc/meminfo").read_text().splitlines()[0]
    return int(first.split()[1]) // 1024
