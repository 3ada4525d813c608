"""The memory that a worker on a CPU has: its part of what Slurm gives the job of a node.

slurm.mem, else --mem-per-cpu in slurm.extra, else the site's default of the partition, else the whole node's
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
    """`size`: bytes of a worker, None: unknown. `why`: where that is from, for people; "" where it needs no word."""

    size: int | None
    why: str = ""


def of_worker(gpu: GpuModel, config: Config, slurm: Slurm) -> Room:
    """The GPU's own; on a CPU the worker's part of its node's."""
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
        return Room(size * cpus, f"--mem-per-cpu for {_cpus(cpus)} a node")
    here = Room(memory_limit(os.environ), "this machine's") if own.max_nodes == 1 else Room(None)
    if config.cluster.backend == "local":
        return here
    try:
        if not slurm.available():
            return here if config.cluster.backend == "auto" else Room(None)
        default = slurm.default_memory(own.partition)
        if own.exclusive or "--exclusive" in own.extra or str(own.mem) == "0":
            default = {}
        if "DefMemPerCPU" in default:
            return Room(default["DefMemPerCPU"] * MIB * cpus, f"Slurm's DefMemPerCPU for {_cpus(cpus)} a node")
        if "DefMemPerNode" in default:
            return Room(default["DefMemPerNode"] * MIB, "Slurm's DefMemPerNode")
        nodes = [p.memory for p in slurm.partitions() if (p.name == own.partition if own.partition else p.default)]
    except RaylaunchError:
        return Room(None)
    return Room(min(nodes) * MIB, "if the job has the whole node") if nodes else Room(None)


def _cpus(count: int) -> str:
    return "1 CPU" if count == 1 else f"{count} CPUs"


def _bytes(text: str) -> int:
    """Of sbatch's `4G`, `500`; 0 for what is none, and for Slurm's own 0, the whole node."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.upper())
    return int(match[1]) << 10 * " KMGT".index(match[2] or "M") if match else 0
