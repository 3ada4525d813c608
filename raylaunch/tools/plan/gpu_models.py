"""What GPUs there are: how much memory a process gets of one, and how quick it is at best.

`memory` is what torch calls the total capacity (in its out-of-memory messages), a little below the name: the driver keeps
some. `flops` is the makers' dense bfloat16 figure, without sparsity, from their data sheets (V100: float16, it has no
bfloat16 of its own). Refused: a name that is not here.
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
            "AMD Instinct MI250X data sheet, 2022; one of its two dies, which is one device",
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
    """By its name, or the part of it before the dash where that is one GPU's; UsageError with the list."""
    word = name.strip().lower()
    found = [gpu for key, gpu in TABLE.items() if key == word] or [
        gpu for key, gpu in TABLE.items() if key.split("-")[0] == word
    ]
    if len(found) != 1:
        what = "is not known" if not found else f"is one of {', '.join(gpu.name for gpu in found)}"
        raise UsageError(f"--gpu {name}: {what}", f"Known: {', '.join(TABLE)}.")
    return found[0]


def asked_for(gres: str) -> GpuModel | None:
    """The one that Slurm is asked for by type (`h100:8`, `gpu:a100:4`); None where no type is named or it may be
    several."""
    for word in gres.replace(",", ":").split(":"):
        close = [gpu for key, gpu in TABLE.items() if gpu is not CPU and word.lower() in {key, key.split("-")[0]}]
        if len(close) == 1:
            return close[0]
    return None
