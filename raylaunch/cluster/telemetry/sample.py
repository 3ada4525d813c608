"""How busy this node is: CPU, memory and GPUs, of what the job was given.

Reads a few files of /proc and of the job's cgroup, and asks NVML; starts nothing. Where the job has no cgroup of its
own (the local backend, Slurm without one), the figures are the machine's. The one place that asks NVML, whose calls
may hang with a broken driver: so it runs in a thread of its own, which nobody waits for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raylaunch.cluster.telemetry.kernel import KernelLog
from raylaunch.host.resources import Resources, own_cgroup
from raylaunch.timing import LOAD_EVERY as EVERY

Load = dict[str, Any]
"""cpu, memory: 0 to 1 of what the job has here. oom_kills: so far, by the kernel, in the job's cgroup. gpus: a list
of {util, memory: 0 to 1, watts, temperature, throttled: why, ecc_errors}, of each what its driver tells. kernel: its news,
see `KernelLog`."""

_THROTTLES = {0x08: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}
"""nvml.h, nvmlClocksEventReason*: those that mean trouble. (A power cap and idleness do not.)"""
log = logging.getLogger(__name__)


class Sampler:
    """Samples of one node."""

    def __init__(self, resources: Resources, cgroup: Path | None, gpus: Gpus | None, kernel: KernelLog | None) -> None:
        self._resources, self._cgroup, self._gpus, self._kernel = resources, cgroup, gpus, kernel
        self._last = self._busy(), time.monotonic()

    @classmethod
    def here(cls, resources: Resources, job: str) -> Sampler:
        """For this process's node."""
        return cls(resources, own_cgroup(), Gpus.open(resources.gpus), KernelLog(job))

    def sample(self) -> Load:
        """The load since the sample before this one. OSError, where the kernel does not tell."""
        busy, now = self._busy(), time.monotonic()
        (before, then), self._last = self._last, (busy, now)
        cores = self._resources.cpus if self._cgroup is not None else os.cpu_count() or 1
        load: Load = {"cpu": _share((busy - before) / max(now - then, 1e-3), cores), "memory": self._memory()}
        if self._cgroup is not None and (kills := _field(self._cgroup / "memory.events", "oom_kill")) is not None:
            load["oom_kills"] = int(kills)
        if self._gpus is not None:
            load["gpus"] = self._gpus.sample()
        if self._kernel is not None and (news := self._kernel.news()):
            load["kernel"] = news
        return load

    def _busy(self) -> float:
        """Seconds of CPU so far."""
        if self._cgroup is not None and (used := _field(self._cgroup / "cpu.stat", "usage_usec")) is not None:
            return used / 1e6
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = map(int, words)
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    def _memory(self) -> float:
        if self._cgroup is not None:
            try:
                used = int((self._cgroup / "memory.current").read_text())
            except OSError:  # no memory controller there
                used = -1
            if used >= 0:
                used -= int(_field(self._cgroup / "memory.stat", "inactive_file") or 0)  # it goes when it is needed
                return _share(used, self._resources.memory)
        total = _field(Path("/proc/meminfo"), "MemTotal:") or 1.0
        return _share(total - (_field(Path("/proc/meminfo"), "MemAvailable:") or 0.0), total)


class Gpus:
    """The job's GPUs on this node, by NVML."""

    def __init__(self, nvml: Any, handles: Sequence[Any]) -> None:
        self._nvml, self._handles = nvml, handles

    @classmethod
    def open(cls, names: Sequence[str]) -> Gpus | None:
        """`names` as CUDA_VISIBLE_DEVICES has them; None where there are none, or NVML does not know them."""
        if not names:
            return None
        try:
            import pynvml as nvml

            nvml.nvmlInit()
            handles = [
                nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
                for name in names
            ]
        except Exception as error:  # noqa: BLE001  NVML's own errors share no class with a missing package
            log.warning("GPU metrics are not available error=%r", str(error))
            return None
        return cls(nvml, handles)

    def sample(self) -> list[dict[str, Any]]:
        """One entry a GPU; what its driver does not tell is left out."""
        return [self._one(handle) for handle in self._handles]

    def _one(self, handle: Any) -> dict[str, Any]:
        nvml = self._nvml

        def memory() -> float:
            found = nvml.nvmlDeviceGetMemoryInfo(handle)
            return _share(found.used, found.total)

        def throttled() -> str:
            reasons = int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
            return ", ".join(text for bit, text in _THROTTLES.items() if reasons & bit)

        ask: dict[str, Callable[[], Any]] = {
            "util": lambda: _share(nvml.nvmlDeviceGetUtilizationRates(handle).gpu, 100),
            "memory": memory,
            "watts": lambda: round(nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            "temperature": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "throttled": throttled,
            "ecc_errors": lambda: nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            ),
        }
        found = {}
        for key, read in ask.items():
            try:
                found[key] = read()
            except nvml.NVMLError:
                continue  # this GPU, or this driver, does not have it
        return found


def start(resources: Resources, job: str, tell: Callable[[Load], object]) -> None:
    """Measure every few seconds, in a thread that ends with the process; `tell` is called there."""

    def work() -> None:
        sampler: Sampler | None = None
        while True:
            try:
                sampler = sampler or Sampler.here(resources, job)
                time.sleep(EVERY)
                tell(sampler.sample())
            except OSError as error:
                log.warning("the load cannot be measured error=%r", str(error))
                time.sleep(EVERY)
            except RuntimeError:
                return  # the event loop that `tell` speaks to is closed: this process ends

    threading.Thread(target=work, name="load", daemon=True).start()


def _field(path: Path, name: str) -> float | None:
    """The number after `name` in a file of `name number` lines; None when it is not there."""
    try:
        text = path.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name:
            return float(words[1])
    return None


def _share(part: float, whole: float) -> float:
    return round(min(1.0, max(0.0, part / whole)) if whole else 0.0, 3)
