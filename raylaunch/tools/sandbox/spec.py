"""Names, paths and addresses of one sandbox: everything follows from its name and its `SandboxSpec`.

What `down` has to find (directory, cgroups, network links) depends on the name alone, so a
sandbox whose `up` was killed half-way can be removed without any record of how far it got.
What only a living sandbox needs (size, subnet, ports) is the `SandboxSpec`, kept in sandbox.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from raylaunch.errors import SandboxError, UsageError

BASE = Path("/var/tmp")  # shared by all nodes; /tmp is private to each
PREFIX = "raylaunch-sandbox-"
DEFAULT_NAME = "sandbox"
MAX_NODES = 200
CONTROLLER = "controller"  # the host name under which slurmctld and slurmdbd run

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SandboxSpec:
    """What a sandbox is made of; written once by `up`, as sandbox.json."""

    name: str
    nodes: int
    """How many nodes: node1 … nodeN."""
    cpus: int
    """CPUs that Slurm believes each node has (the machine may have fewer)."""
    gpus: int
    """Stand-in GPUs per node: device nodes that Slurm counts and hands out."""
    accounting: bool
    """Whether slurmdbd and MariaDB run."""
    memory: int
    """Memory per node in MiB, as Slurm believes it."""
    network: int
    """Third byte of the subnet 10.213.x.0/24; ports follow from it."""
    cgroup_proctrack: bool
    """Whether Slurm tracks a job's processes by freezer cgroup (else by process tree)."""

    @property
    def node_names(self) -> list[str]:
        return [f"node{i}" for i in range(1, self.nodes + 1)]

    @property
    def gateway(self) -> str:
        """Address of the bridge: slurmctld, and clients on the machine itself."""
        return f"10.213.{self.network}.1"

    @property
    def ctld_port(self) -> int:
        return 21000 + self.network

    @property
    def dbd_port(self) -> int:
        return 21300 + self.network

    def address(self, node: str) -> str:
        """Address of a node: node1 is 10.213.x.11."""
        return f"10.213.{self.network}.{10 + self.index(node)}"

    def index(self, node: str) -> int:
        """Number of a node, from 1; raises UsageError for a node that is not there."""
        if node not in self.node_names:
            raise UsageError(
                f"sandbox {self.name!r} has no node {node!r}",
                f"its nodes are {', '.join(self.node_names)}",
            )
        return self.node_names.index(node) + 1

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> SandboxSpec:
        return cls(**json.loads(text))


@dataclasses.dataclass(frozen=True, slots=True)
class SandboxLayout:
    """Where a sandbox of that name keeps its things."""

    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"{self.name!r} is not a valid sandbox name",
                "use lower-case letters, digits and '-', at most 32, e.g. --name test-1",
            )

    @property
    def dir(self) -> Path:
        return BASE / f"{PREFIX}{self.name}"

    @property
    def spec(self) -> Path:
        return self.dir / "sandbox.json"

    @property
    def slurm_conf(self) -> Path:
        return self.dir / "etc" / "slurm.conf"

    @property
    def state(self) -> Path:
        """For raylaunch itself (RAYLAUNCH_STATE_DIR); any user may write there."""
        return self.dir / "state"

    @property
    def log(self) -> Path:
        return self.dir / "log"

    @property
    def spool(self) -> Path:
        return self.dir / "spool"

    @property
    def run(self) -> Path:
        return self.dir / "run"

    @property
    def munge_socket(self) -> Path:
        return self.dir / "munge" / "munge.socket"

    @property
    def munge_key(self) -> Path:
        return self.dir / "etc" / "munge.key"

    @property
    def database(self) -> Path:
        return self.dir / "mariadb"

    @property
    def database_socket(self) -> Path:
        return self.database / "mariadb.socket"  # in there, because only root may enter

    @property
    def cgroup(self) -> str:
        """Name of the sandbox's cgroup, at the root of the hierarchy."""
        return f"{PREFIX}{self.name}"

    @property
    def link_prefix(self) -> str:
        """Start of its network links' names: interface names hold 15 bytes, so a digest."""
        return "rl" + hashlib.sha256(self.name.encode()).hexdigest()[:8]

    @property
    def bridge(self) -> str:
        return f"{self.link_prefix}br"

    def veth(self, index: int) -> str:
        """The bridge's end of a node's cable."""
        return f"{self.link_prefix}n{index}"

    def read_spec(self) -> SandboxSpec:
        """The record of a sandbox that is up; SandboxError when there is none."""
        try:
            if self.dir.stat().st_uid != 0:  # anyone may make directories there; root kills by its records
                raise SandboxError(f"{self.dir} does not belong to root", "choose another --name")
            return SandboxSpec.from_json(self.spec.read_text())
        except FileNotFoundError:
            if self.dir.exists():
                raise SandboxError(
                    f"sandbox {self.name!r} is incomplete: its `up` did not finish",
                    f"raylaunch sandbox down --name {self.name}",
                ) from None
            others = existing()
            raise SandboxError(
                f"no sandbox is named {self.name!r}",
                f"Available: {', '.join(others)} (choose with --name)."
                if others
                else f"raylaunch sandbox up --name {self.name}",
            ) from None
        except (TypeError, ValueError) as error:
            raise SandboxError(
                f"{self.spec} is not understood ({error}): another version of raylaunch made it",
                f"raylaunch sandbox down --name {self.name}",
            ) from None


def existing() -> list[str]:
    """Names of the sandboxes that have a directory on this machine."""
    return sorted(path.name.removeprefix(PREFIX) for path in BASE.glob(f"{PREFIX}*") if path.is_dir())
