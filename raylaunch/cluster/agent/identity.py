"""Who an agent is: its node, its place in the job, its cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import hostlist

from raylaunch.host.network import node_name
from raylaunch.state.records import Head


@dataclass(frozen=True)
class NodeIdentity:
    """Who this agent is: its node, its place in the job, its cluster."""

    directory: Path
    canary: str
    node: str
    index: int
    peers: tuple[str, ...]
    local: bool
    job: str = ""
    allocation: str = ""
    """Of the base job's allocation; a requeued one has another."""
    joiner: bool = False

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> NodeIdentity:
        """From what the batch script, or the local backend, set."""
        directory, canary = Path(env["RAYLAUNCH_CLUSTER_DIR"]), env["RAYLAUNCH_CANARY"]
        if "RAYLAUNCH_LOCAL_INDEX" in env:
            index, count = int(env["RAYLAUNCH_LOCAL_INDEX"]), int(env["RAYLAUNCH_LOCAL_COUNT"])
            names = tuple(f"local{i + 1}" for i in range(count))
            return cls(
                directory, canary, f"local{index + 1}", index, names, local=True, allocation="local",
                joiner=index >= count,
            )  # fmt: skip
        nodes = tuple(hostlist.expand_hostlist(env["SLURM_JOB_NODELIST"]))
        return cls(
            directory, canary, node_name(env), int(env["SLURM_NODEID"]), nodes, local=False,
            job=env["SLURM_JOB_ID"], allocation=f"{env['SLURM_JOB_ID']}:{env.get('SLURM_RESTART_COUNT', '0')}",
            joiner="RAYLAUNCH_JOINER" in env,
        )  # fmt: skip

    @property
    def is_first(self) -> bool:
        """Whether this node begins a life of the cluster as its head."""
        return self.index == 0 and not self.joiner

    def is_over(self, head: Head) -> bool:
        """Whether this head is of another life, or of an allocation before this one."""
        return head.canary != self.canary or (not self.joiner and head.allocation != self.allocation)
