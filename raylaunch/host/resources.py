"""CPUs, memory and GPUs that this process may use: by its job, its cgroup, its machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    """What this node's Ray may use. Bytes for memory; GPUs as CUDA_VISIBLE_DEVICES names them."""

    cpus: int
    memory: int
    object_store: int
    gpus: tuple[str, ...]


def count_cpus(env: Mapping[str, str]) -> int:
    """CPUs given to this process.

    A binding (affinity narrower than the machine) is the truth. Without one, Slurm's number counts,
    then a cgroup quota, then the machine.
    """
    machine, bound = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    if bound < machine:
        return bound
    given = env.get("SLURM_CPUS_PER_TASK") or env.get("SLURM_CPUS_ON_NODE") or ""
    if given.isdigit():
        return int(given)
    return min(machine, _cgroup_cpus() or machine)


def _cgroup_paths(controller: str) -> list[Path]:
    """This process's directories of a cgroup controller, innermost first (v1 and v2)."""
    root = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            base = root / controller
        elif not controllers and (root / "cgroup.controllers").exists():
            base = root
        else:
            continue
        inner = base / path.lstrip("/")
        return [inner, *(p for p in inner.parents if p.is_relative_to(base))]
    return []


def own_cgroup() -> Path | None:
    """This process's cgroup (v2) where it is one of Slurm's, who made it for the job alone; else None."""
    try:
        found = _cgroup_paths("cpu")
    except OSError:
        return None
    own = found[0] if found else Path("/")
    is_slurms = any(part.startswith("job_") for part in own.parts) and (own / "cpu.stat").exists()
    return own if is_slurms else None


def _numbers(path: Path) -> list[int]:
    try:
        return [int(word) for word in path.read_text().split() if word.lstrip("-").isdigit()]
    except OSError:
        return []


def _cgroup_cpus() -> int | None:
    for directory in _cgroup_paths("cpu"):
        v2 = _numbers(directory / "cpu.max")
        quota, period = _numbers(directory / "cpu.cfs_quota_us"), _numbers(directory / "cpu.cfs_period_us")
        if len(v2) == 2 or (quota and period and quota[0] > 0):
            allowed, per = v2 if len(v2) == 2 else (quota[0], period[0])
            return max(1, allowed // per)
    return None


def memory_limit(env: Mapping[str, str]) -> int:
    """Bytes of memory given to this process: the tightest of cgroup, Slurm's limit and the machine."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for directory in _cgroup_paths("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += _numbers(directory / name)
    per_node, per_cpu = env.get("SLURM_MEM_PER_NODE", ""), env.get("SLURM_MEM_PER_CPU", "")
    if per_node.isdigit() and int(per_node):
        limits.append(int(per_node) << 20)
    elif per_cpu.isdigit() and int(per_cpu):
        limits.append((int(per_cpu) << 20) * count_cpus(env))
    return min(limit for limit in limits if limit > 0)


def visible_gpus(env: Mapping[str, str], look: bool = True) -> tuple[str, ...]:
    """GPUs given to this process: CUDA_VISIBLE_DEVICES where it is set, else (if we may `look`) what
    nvidia-smi lists."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name for name in visible.split(",") if name and name not in {"-1", "NoDevFiles"})
    if not look or shutil.which("nvidia-smi") is None:
        return ()
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(listing.stdout.split())


def find_resources(
    env: Mapping[str, str], share: int = 1, object_store: int | None = None, look_for_gpus: bool = True
) -> Resources:
    """What Ray gets on this node; `share` nodes of the local backend divide the machine among them."""
    memory_share = memory_limit(env) // share
    shm = shutil.disk_usage("/dev/shm").free // share
    store = object_store or min(1 << 30, memory_share // 10, shm // 2)
    return Resources(
        max(1, count_cpus(env) // share),
        memory_share,
        max(store, 80 << 20),
        visible_gpus(env, look_for_gpus) if share == 1 else (),
    )
