"""Facts of one machine, login node or compute node: temp directory, shared memory, limits, ports, network, clock,
containers, versions. They come from /sys and /proc; no command is run. `machine_checks` judges them. Neither torch nor
Ray is imported."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from raylaunch import __version__
from raylaunch.errors import BringUpError, RaylaunchError
from raylaunch.host.network import interface_address
from raylaunch.host.ports import lease_ports
from raylaunch.host.temp_dir import temp_dir_path
from raylaunch.tools.doctor import storage_check

RUNTIMES = ("apptainer", "singularity", "enroot", "podman", "docker", "charliecloud")
_LIMITS = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC, "memlock": resource.RLIMIT_MEMLOCK}
_NOT_TO_PEERS = ("docker", "veth", "virbr", "cni", "podman", "br-", "flannel", "cali")


class Interface(BaseModel):
    """A network interface with an IPv4 address that may lead to other machines."""

    name: str
    address: str
    speed: int = 0
    """Mb/s; 0: unknown."""
    infiniband: bool = False


class Port(BaseModel):
    """A port of an InfiniBand or RoCE adapter."""

    device: str
    port: int
    active: bool
    state: str
    rate: str
    """As the kernel reports it: "400 Gb/sec (4X NDR)"."""
    ethernet: bool
    interfaces: tuple[str, ...]


class MachineFacts(BaseModel):
    """One machine."""

    temp: str
    temp_type: str = ""
    temp_free: int = 0
    temp_error: str = ""
    shm_free: int = 0
    limits: dict[str, tuple[int | None, int | None]]
    """nofile, nproc, memlock (bytes) → soft and hard limit; None: no limit."""
    ports_error: str = ""
    interfaces: tuple[Interface, ...] = ()
    adapters: tuple[Port, ...] = ()
    synchronised: bool | None = None
    """State of the clock according to the kernel; None: unknown."""
    containers: tuple[str, ...] = ()
    modules: bool = False
    python: str
    prefix: str
    prefix_type: str = ""
    versions: dict[str, str]
    """raylaunch, ray, torch, nccl, cuda (torch's runtime), if installed."""


def gather(temp_base: str, key: str, env: Mapping[str, str], suffix: str | None = None) -> MachineFacts:
    """Collect the facts of this machine; `key` and `suffix` as for `temp_dir_path`."""
    temp, temp_error = _temp(temp_base, key, suffix)
    shm = 0
    with contextlib.suppress(OSError):
        shm = shutil.disk_usage("/dev/shm").free
    free = 0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(temp_base).free
    return MachineFacts(
        temp=temp,
        temp_type=storage_check.here(Path(temp_base))[0],
        temp_free=free,
        temp_error=temp_error,
        shm_free=shm,
        limits={name: limit(name) for name in _LIMITS},
        ports_error=_ports(),
        interfaces=_interfaces(),
        adapters=_adapters(),
        synchronised=synchronised(),
        containers=tuple(name for name in RUNTIMES if shutil.which("ch-run" if name == "charliecloud" else name)),
        modules=any(env.get(name) for name in ("LMOD_CMD", "MODULESHOME", "BASH_FUNC_module%%")),
        python=platform.python_version(),
        prefix=sys.prefix,
        prefix_type=storage_check.here(Path(sys.prefix))[0],
        versions=versions(),
    )


def _temp(base: str, key: str, suffix: str | None) -> tuple[str, str]:
    """(the cluster's temp directory, why it cannot be used)."""
    try:
        path = temp_dir_path(base, key, suffix)
    except RaylaunchError as error:
        return base, error.message
    if not os.access(base, os.W_OK | os.X_OK):
        return str(path), f"{base} does not exist or is not writable"
    return str(path), ""


def limit(name: str) -> tuple[int | None, int | None]:
    """Soft and hard limit of this process; None: no limit."""
    soft, hard = resource.getrlimit(_LIMITS[name])
    return (None if soft == resource.RLIM_INFINITY else soft), (None if hard == resource.RLIM_INFINITY else hard)


def _ports() -> str:
    try:
        lease_ports().close()
    except BringUpError as error:
        return error.message
    return ""


def _line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # drivers also fail like this for a link that is down
        return ""


def _interfaces(root: Path = Path("/sys/class/net")) -> tuple[Interface, ...]:
    found = []
    for _, name in socket.if_nameindex():
        if name == "lo" or name.startswith(_NOT_TO_PEERS) or (root / name / "bridge").exists():
            continue
        try:
            address = interface_address(name)
        except BringUpError:
            continue
        speed = _line(root / name / "speed")
        kind = _line(root / name / "type")  # ARPHRD_INFINIBAND is 32
        found.append(Interface(name=name, address=address, speed=int(speed) if speed.isdigit() else 0,
                               infiniband=kind == "32"))  # fmt: skip
    return tuple(found)


def _adapters(root: Path = Path("/sys/class/infiniband")) -> tuple[Port, ...]:
    found = []
    for port in sorted(root.glob("*/ports/*")):
        device = port.parents[1]
        state = _line(port / "state").partition(": ")[2]  # "4: ACTIVE"
        found.append(Port(
            device=device.name, port=int(port.name) if port.name.isdigit() else 0, active=state == "ACTIVE", state=state,
            rate=_line(port / "rate"), ethernet=_line(port / "link_layer") == "Ethernet",
            interfaces=tuple(sorted(p.name for p in device.glob("device/net/*"))),
        ))  # fmt: skip
    return tuple(found)


def synchronised() -> bool | None:
    """Whether the kernel's clock is synchronised (adjtimex(2), STA_UNSYNC); None if unknown."""
    # struct timex of 64-bit Linux begins: modes, offset, freq, maxerror, esterror, status.
    answer = (ctypes.c_long * 32)()
    try:
        if ctypes.CDLL(None).adjtimex(ctypes.byref(answer)) < 0:
            return None
    except (OSError, AttributeError):
        return None
    return not ctypes.c_int(answer[5]).value & 0x40


def versions() -> dict[str, str]:
    """Versions of the relevant packages, from their metadata; nothing is imported."""
    names = {"ray": ("ray",), "torch": ("torch",), "nccl": ("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
             "cuda": ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12")}  # fmt: skip
    found = {"raylaunch": __version__}
    for what, packages in names.items():
        for package in packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.setdefault(what, importlib.metadata.version(package))
    return found
