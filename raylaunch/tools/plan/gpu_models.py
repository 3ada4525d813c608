"""GPU models: memory available to a process, and peak speed.

`memory` is the total capacity in torch's out-of-memory messages. It is less than the nominal size, because the driver
reserves some. `flops` is the vendors' dense bfloat16 figure, without sparsity, from their data sheets (V100: float16,
since it does not support bfloat16). Unknown names are rejected.
"""

from __future__ import annotations

from dataclasses import dataclass

from raylaunch.errors import UsageError

GIB = 1 << 30


@dataclass(frozen=True)
class GpuModel:
    """`memory` in bytes; `flops` in 1/s. None: it depends on the machine."""

    name: str
    memory: int | None
    flops: float | None
    source: str


def _gpu(name: str, gib: float, teraflops: float, source: str) -> GpuModel:
    return GpuModel(name, int(gib * GIB), teraflops * 1e12, source)


CPU = GpuModel("cpu", None, None, "this machine")
TABLE = {
    gpu.name: gpu
    for gpu in (
        _gpu("v100-32gb", 31.73, 125.0, "NVIDIA V100 data sheet, 2020"),
        _gpu("a10-24gb", 22.05, 125.0, "NVIDIA A10 data sheet, 2021"),
        _gpu("l4-24gb", 22.03, 121.0, "NVIDIA L4 data sheet, 2023"),
        _gpu("a100-40gb", 39.39, 312.0, "NVIDIA A100 data sheet, 2021"),
        _gpu("l40s-48gb", 44.39, 362.0, "NVIDIA L40S data sheet, 2023"),
        _gpu(
            "mi250x-64gb",
            63.98,
            191.5,
            "AMD Instinct MI250X data sheet, 2022; one of its two dies (one device)",
        ),
        _gpu("a100-80gb", 79.15, 312.0, "NVIDIA A100 data sheet, 2021"),
        _gpu("h100-80gb", 79.10, 989.4, "NVIDIA H100 SXM data sheet, 2023"),
        _gpu("gh200-96gb", 94.50, 989.4, "NVIDIA GH200 data sheet, 2023"),
        _gpu("h200-141gb", 139.80, 989.4, "NVIDIA H200 data sheet, 2024"),
        _gpu("b200-192gb", 178.35, 2250.0, "NVIDIA Blackwell data sheet, 2024"),
        _gpu("mi300x-192gb", 191.69, 1307.4, "AMD Instinct MI300X data sheet, 2023"),
        _gpu("mi325x-256gb", 255.69, 1307.4, "AMD Instinct MI325X data sheet, 2024"),
        CPU,
    )
}


def find(name: str) -> GpuModel:
    """Find a GPU by its name, or by the part before the dash if unambiguous; UsageError lists the names."""
    word = name.strip().lower()
    found = [gpu for key, gpu in TABLE.items() if key == word] or [
        gpu for key, gpu in TABLE.items() if key.split("-")[0] == word
    ]
    if len(found) != 1:
        what = f"ambiguous, one of {', '.join(gpu.name for gpu in found)}" if found else "unknown GPU model"
        raise UsageError(f"--gpu {name}: {what}", f"Available: {', '.join(TABLE)}.")
    return found[0]


def asked_for(gres: str) -> GpuModel | None:
    """The GPU type in a Slurm request (`h100:8`, `gpu:a100:4`); None if it has no type, or an ambiguous one."""
    for word in gres.replace(",", ":").split(":"):
        close = [gpu for key, gpu in TABLE.items() if gpu is not CPU and word.lower() in {key, key.split("-")[0]}]
        if len(close) == 1:
            return close[0]
    return None
