"""The memory of a worker on a CPU: its share of the job's memory on a node.

slurm.mem, else --mem-per-cpu in slurm.extra, else the default of the partition or site, else the memory of the node
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from raylaunch.config.schema import Config
from raylaunch.errors import RaylaunchError
from raylaunch.host.resources import memory_limit
from raylaunch.scheduler.slurm import batch_script
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.tools.plan.gpu_models import CPU, GpuModel

MIB = 1 << 20


@dataclass(frozen=True)
class Room:
    """`size`: bytes of a worker, None: unknown. `why`: the source of `size`, for people; "" if obvious."""

    size: int | None
    why: str = ""


def of_worker(gpu: GpuModel, config: Config, slurm: Slurm) -> Room:
    """The memory of the GPU; on a CPU, the worker's share of its node."""
    if gpu is not CPU:
        return Room(gpu.memory)
    workers = batch_script.workers_per_node(config.slurm)
    node = _of_node(config, slurm)
    return node if node.size is None else Room(node.size // workers, node.why)


def _of_node(config: Config, slurm: Slurm) -> Room:
    own = config.slurm
    cpus = batch_script.workers_per_node(own) * (own.cpus_per_task or 1)
    if size := _bytes(str(own.mem or "")):
        return Room(size, "slurm.mem")
    match = re.search(r"--mem-per-cpu[= ](\S+)", " ".join(own.extra))
    if match is not None and (size := _bytes(match[1])):
        return Room(size * cpus, f"--mem-per-cpu for {_cpus(cpus)} per node")
    here = Room(memory_limit(os.environ), "this machine") if own.max_nodes == 1 else Room(None)
    if config.cluster.backend == "local":
        return here
    try:
        if not slurm.available():
            return here if config.cluster.backend == "auto" else Room(None)
        default = slurm.default_memory(own.partition)
        if own.exclusive or "--exclusive" in own.extra or str(own.mem) == "0":
            default = {}
        if "DefMemPerCPU" in default:
            return Room(default["DefMemPerCPU"] * MIB * cpus, f"Slurm's DefMemPerCPU for {_cpus(cpus)} per node")
        if "DefMemPerNode" in default:
            return Room(default["DefMemPerNode"] * MIB, "Slurm's DefMemPerNode")
        nodes = [p.memory for p in slurm.partitions() if (p.name == own.partition if own.partition else p.default)]
    except RaylaunchError:
        return Room(None)
    return Room(min(nodes) * MIB, "if the job uses whole nodes") if nodes else Room(None)


def _cpus(count: int) -> str:
    return "1 CPU" if count == 1 else f"{count} CPUs"


def _bytes(text: str) -> int:
    """Bytes of a size such as `4G` or `500` (MiB); 0 if invalid, and for Slurm's 0, which means the whole node."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.upper())
    return int(match[1]) << 10 * " KMGT".index(match[2] or "M") if match else 0
