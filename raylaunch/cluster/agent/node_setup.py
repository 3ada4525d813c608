"""What an agent finds on its node, and takes of it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from raylaunch.cluster.agent import self_check
from raylaunch.cluster.agent.identity import NodeIdentity
from raylaunch.config.schema import Config
from raylaunch.errors import BringUpError, RaylaunchError
from raylaunch.host.network import own_address
from raylaunch.host.ports import PortLease, Ports, lease_ports
from raylaunch.host.resources import Resources, find_resources
from raylaunch.host.temp_dir import TempDir
from raylaunch.scheduler.slurm import batch_script
from raylaunch.state.members import Members
from raylaunch.state.records import Cluster


def ports_before(here: NodeIdentity) -> Ports | None:
    """The block of the agent that was here before, as the head has it (see `lease_ports` for why not again)."""
    with contextlib.suppress(RaylaunchError, OSError):
        row = Members.read(here.directory).node(here.node)
        if row is not None and row.ports is not None:
            return Ports(row.ports[0])
    return None


@dataclass(frozen=True)
class NodeSetup:
    """What an agent finds on its node, and takes of it, before anything else."""

    token: str
    temp: TempDir
    address: str
    resources: Resources
    lease: PortLease

    @classmethod
    def prepare(cls, here: NodeIdentity, token: str, cluster: Cluster, config: Config) -> NodeSetup:
        """Blocking: it reads shared storage, resolves host names, asks nvidia-smi."""
        self_check.check_limits(here.node)
        # A joiner may be on the node of the base job, or of another joiner: each has a directory of its own.
        suffix = str(here.index + 1) if here.local else here.job if here.joiner else None
        temp = TempDir(config.cluster.temp_dir, str(here.directory), suffix)
        peer = next((n for n in here.peers if n != here.node), None)
        address = f"127.0.0.{here.index + 2}" if here.local else own_address(peer, config.cluster.interface)
        resources = node_resources(here, cluster, config)
        return cls(token, temp, address, resources, lease_ports(ports_before(here)))


def node_resources(here: NodeIdentity, cluster: Cluster, config: Config) -> Resources:
    """What Ray gets here; BringUpError when GPUs are missing."""
    # Without an own GPU request, what nvidia-smi lists on a shared node is other people's.
    asked = here.local or config.slurm.exclusive or batch_script.gpus_per_node(config.slurm) > 0
    share = len(here.peers) if here.local else 1
    found = find_resources(os.environ, share, config.cluster.object_store_memory, look_for_gpus=asked)
    gpus, workers = len(found.gpus), cluster.workers_per_node
    if gpus < workers and (gpus or (asked and not here.local and not config.slurm.exclusive)):
        raise BringUpError(
            f"{gpus} GPUs on {here.node} for {workers} workers",
            "Check the node's GPUs (nvidia-smi), slurm.gpus_per_node and slurm.ntasks_per_node.",
        )
    return found
