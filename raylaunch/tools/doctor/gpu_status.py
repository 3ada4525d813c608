"""GPU status of this machine, from one nvidia-smi call with a time limit. The format of its XML has been stable since
the drivers of 2015; unknown elements are ignored. This module does not use the GPUs itself (`benchmarks` does)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from pydantic import BaseModel

from raylaunch.host.processes import kill_child

LIMIT = 30.0
"""Seconds. Without the persistence daemon, the driver initialises every GPU first: 10 s on large nodes."""
_SLOWED = ("hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown")
_SICK = ("remapped_row_pending", "remapped_row_failure", "pending_retirement", "gpu_reset_required",
         "channel_repair_pending", "unrepairable_memory")  # fmt: skip


class GpuStatus(BaseModel):
    """One GPU."""

    index: int
    uuid: str
    name: str
    temperature: int | None = None
    ecc: int = 0
    """Uncorrectable errors since the driver was loaded."""
    slowed: tuple[str, ...] = ()
    """Reasons for reduced clocks: thermal or hardware, not the power cap."""
    sick: tuple[str, ...] = ()
    """Pending resets and repairs."""
    link: str = ""
    """If its PCIe link is narrower than possible: 8x of 16x."""


class Smi(BaseModel):
    """Result of nvidia-smi; `error`: why there is none. Without a driver, both are empty."""

    driver: str = ""
    cuda: str = ""
    """The newest CUDA version that this driver supports."""
    gpus: tuple[GpuStatus, ...] = ()
    error: str = ""


def ask(limit: float = LIMIT) -> Smi:
    """Run nvidia-smi; it is killed if the driver hangs for `limit` seconds."""
    if shutil.which("nvidia-smi") is None:
        return Smi()
    process = subprocess.Popen(
        ["nvidia-smi", "-q", "-x"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        kill_child(process)
        return Smi(error=f"nvidia-smi did not answer within {limit:g} s")
    if process.returncode != 0:
        return Smi(error=" ".join(out.split())[:300] or f"nvidia-smi exited with code {process.returncode}")
    return parse(out)


def parse(text: str) -> Smi:
    """`nvidia-smi -q -x` → Smi. Pure."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return Smi(error=f"nvidia-smi printed invalid XML: {' '.join(text.split())[:200]}")
    rows = tuple(_gpu(number, node) for number, node in enumerate(root.iter("gpu")))
    return Smi(driver=_text(root, "driver_version"), cuda=_text(root, "cuda_version"), gpus=rows)


def ours(rows: Iterable[GpuStatus], visible: Sequence[str]) -> list[GpuStatus]:
    """The GPUs in CUDA_VISIBLE_DEVICES, by index or UUID; all if it contains other names (MIG)."""
    listed = list(rows)
    found = [row for row in listed if str(row.index) in visible or any(v and row.uuid.startswith(v) for v in visible)]
    return found or listed


def _gpu(number: int, node: ElementTree.Element) -> GpuStatus:
    width, full = _text(node, ".//current_link_width"), _text(node, ".//max_link_width")
    answers = {child.tag: (child.text or "").strip() for child in node.iter()}
    sick = [tag for tag in _SICK if answers.get(tag) == "Yes"]
    action = answers.get("gpu_recovery_action", "None")
    return GpuStatus(
        index=number,
        uuid=_text(node, "uuid"),
        name=_text(node, "product_name"),
        temperature=_number(_text(node, "temperature/gpu_temp")) or None,
        ecc=_uncorrectable(node),
        slowed=tuple(reason for reason in _SLOWED if _active(answers, reason)),
        sick=(*sick, *([f"recovery action: {action}"] if action not in {"None", "N/A", ""} else [])),
        link=f"{width} of {full}" if _number(width) < _number(full) else "",
    )


def _active(answers: dict[str, str], reason: str) -> bool:
    # Drivers before 535 use clocks_throttle_reason.
    return any(answers.get(f"clocks_{kind}_reason_{reason}") == "Active" for kind in ("event", "throttle"))


def _uncorrectable(node: ElementTree.Element) -> int:
    """Uncorrected volatile ECC errors: *_uncorrectable* since Ampere, the total of double_bit before."""
    volatile = node.find("ecc_errors/volatile")
    if volatile is None:
        return 0
    new = sum(_number(child.text or "") for child in volatile.iter() if "uncorrectable" in child.tag)
    return new + _number(_text(volatile, "double_bit/total"))


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()


def _number(text: str) -> int:
    """`81559 MiB` → 81559; 0 for N/A."""
    match = re.match(r"-?\d+", text)
    return int(match[0]) if match else 0
