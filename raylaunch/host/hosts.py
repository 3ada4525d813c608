"""This node as this process may use it: name, address, CPUs, memory, GPUs, ports, temp directory.

Shared nodes are the normal case. So resources are what the job was given (cgroup, affinity,
SLURM_*), not what the machine has; ports come in leased blocks below the ephemeral range; the temp
directory belongs to one uid and one cluster. Nothing here starts or stops anything.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from raylaunch.errors import BringUpError, StateError
from raylaunch.host import locks

PORT_BLOCK = 512
PORTS_FROM, PORTS_TO = 10240, 32768  # below Linux's ephemeral range (32768-60999)
FIRST_WORKER_PORT = 32
_AF_UNIX_LIMIT = 107
# What Ray adds to the temp directory for its longest socket path, with a seven-digit pid:
_LONGEST_SOCKET = "/r/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1"
_HELD = ".held"


@dataclass(frozen=True)
class Ports:
    """One leased block: `base` is held as a lock, the rest go to the services in a fixed order."""

    base: int

    @property
    def control(self) -> int:
        return self.base + 1

    @property
    def gcs(self) -> int:
        return self.base + 2

    @property
    def dashboard(self) -> int:
        return self.base + 3

    @property
    def node_manager(self) -> int:
        return self.base + 4

    @property
    def object_manager(self) -> int:
        return self.base + 5

    @property
    def dashboard_agent(self) -> int:
        return self.base + 6

    @property
    def metrics_agent(self) -> int:
        return self.base + 7

    @property
    def runtime_env_agent(self) -> int:
        return self.base + 8

    @property
    def metrics_export(self) -> int:
        return self.base + 9

    @property
    def dashboard_metrics(self) -> int:
        return self.base + 10

    @property
    def metrics(self) -> int:
        """Ours, for Prometheus."""
        return self.base + 11

    @property
    def spare(self) -> range:
        """Ports that Ray does not get: the driver listens there for its workers."""
        return range(self.base + 12, self.base + FIRST_WORKER_PORT)

    @property
    def workers(self) -> tuple[int, int]:
        """First and last port for Ray's worker processes."""
        return self.base + FIRST_WORKER_PORT, self.base + PORT_BLOCK - 1


class PortLease:
    """A block of ports that is ours while this object is open.

    The lock is a listening socket on the block's first port, loopback only: the kernel gives it to
    one process of the machine, whatever the user, and takes it back when that process dies.
    """

    def __init__(self, ports: Ports, lock: socket.socket) -> None:
        self.ports = ports
        self._lock = lock

    def close(self) -> None:
        self._lock.close()


def _bindable(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a TIME_WAIT is no owner
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def lease_ports(last: Ports | None = None) -> PortLease:
    """Lease a free block of ports on this machine; any but the `last` one. Every port of it is tried by binding.

    Which one is left to chance, so that Ray starts on other ports than the Ray that died here before. The GCS's
    gRPC channel to a port that refused it waits up to two minutes before it tries again, and a raylet that comes
    back on such a port is marked dead by a health check that never reached it.
    """
    blocks = range(PORTS_FROM, PORTS_TO, PORT_BLOCK)
    for base in random.sample(blocks, len(blocks)):
        if last is not None and base == last.base:
            continue
        lock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            lock.bind(("127.0.0.1", base))
            lock.listen(1)
        except OSError:
            lock.close()
            continue
        if all(_bindable(port) for port in range(base + 1, base + PORT_BLOCK)):
            return PortLease(Ports(base), lock)
        lock.close()
    raise BringUpError(
        f"no block of {PORT_BLOCK} free ports between {PORTS_FROM} and {PORTS_TO} on {socket.gethostname()}",
        "Too many clusters or services share this node; try another node (slurm.exclude).",
    )


def temp_dir(base: str, cluster_key: str, suffix: str | None = None) -> Path:
    """Where Ray's sockets and session go on this node: one per uid and cluster; with a suffix for each local node
    and for each joiner job.

    `cluster_key` is the cluster directory's path: two state directories may hold the same name.
    Raises BringUpError when the path would be too long for a Unix socket.
    """
    digest = hashlib.sha256(cluster_key.encode()).hexdigest()[:8]
    path = Path(base) / f"rl-{os.getuid()}-{digest}{f'-{suffix}' if suffix else ''}"
    length = len(os.fsencode(str(path) + _LONGEST_SOCKET))
    if length > _AF_UNIX_LIMIT:
        raise BringUpError(
            f"the temp directory {path} is too long: Ray's socket paths would have {length} bytes of "
            f"at most {_AF_UNIX_LIMIT}",
            "Set cluster.temp_dir to a shorter node-local path, such as /tmp.",
        )
    return path


class TempDir:
    """A temp directory while an agent has it: held by a lock in it, so that whoever comes later can tell what a
    killed agent has left behind from what is in use."""

    def __init__(self, base: str, cluster_key: str, suffix: str | None) -> None:
        self.path = temp_dir(base, cluster_key, suffix)
        self._siblings = f"{temp_dir(base, cluster_key).name}-*"
        self._held: int | None = None

    def claim(self) -> None:
        """Have it, afresh (see `claim_temp_dir`); remove what dead agents of this cluster left beside it."""
        claim_temp_dir(self.path)
        self._release()
        self._held = locks.take(self.path / _HELD)
        for sibling in self.path.parent.glob(self._siblings):
            if sibling != self.path and _is_abandoned(sibling):
                shutil.rmtree(sibling, ignore_errors=True)

    def is_whole(self) -> bool:
        """Whether what Ray has in it is still there. (Not by `session_latest`: every driver that connects removes that
        link and makes it again.)"""
        return (self.path / _HELD).exists() and any((self.path / "r").glob("session_2*/sockets"))

    def remove(self) -> int:
        """Remove it; 1 if it cannot be. One that was never claimed may be somebody else's, and stays."""
        if self._held is None:
            return 0
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()
        return int(self.path.exists())

    def _release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _is_abandoned(path: Path) -> bool:
    """Whether a temp directory is ours and nobody holds it."""
    try:
        ours = not path.is_symlink() and path.lstat().st_uid == os.getuid() and (path / _HELD).exists()
    except OSError:
        return False
    return ours and not locks.is_held(path / _HELD)


def claim_temp_dir(path: Path) -> None:
    """Make the temp directory afresh, ours alone; leftovers of a dead life of the cluster go.

    Somebody else's directory of that name (a trap or a clash) is refused, never used.
    """
    try:
        owner = path.lstat()
    except FileNotFoundError:
        owner = None
    if owner is not None:
        if path.is_symlink() or owner.st_uid != os.getuid():
            raise BringUpError(
                f"{path} belongs to uid {owner.st_uid}, not to you", "Set cluster.temp_dir to another directory."
            )
        shutil.rmtree(path)
    try:
        path.mkdir(mode=0o700, parents=True)
        # Ray makes the directory that it is given open to all: it gets one behind our door.
        for part in ("r", "tmp"):
            (path / part).mkdir()
    except OSError as error:
        raise StateError(
            f"cannot make the temp directory {path}: {error.strerror}",
            "Set cluster.temp_dir to a node-local directory that you may write to.",
        ) from error


def node_name(env: Mapping[str, str]) -> str:
    """Slurm's name of this node, else the host name."""
    return env.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def interface_address(interface: str) -> str:
    """The IPv4 address of a network interface (SIOCGIFADDR); BringUpError when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, request)
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise BringUpError(
                f"network interface {interface!r} has no IPv4 address here ({error.strerror})",
                f"Set cluster.interface to one of: {names}.",
            ) from error
    return socket.inet_ntoa(answer[20:24])


def interface_of(own_address: str) -> str | None:
    """The name of the interface that has this address; "lo" for all of 127.0.0.0/8."""
    if own_address.startswith("127."):
        return "lo"
    for _, name in socket.if_nameindex():
        try:
            if interface_address(name) == own_address:
                return name
        except BringUpError:
            continue  # no IPv4 address on this one
    return None


def address(peer: str | None, interface: str | None = None) -> str:
    """This node's IPv4 address as its peers reach it.

    The named interface's; else the source address of the route to `peer` (a host name or address;
    no packet is sent); else what the host name resolves to. Never loopback unless there is no other.
    """
    if interface:
        return interface_address(interface)
    for target in (peer, socket.gethostname()):
        if not target:
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))
            except OSError:
                continue
            found = str(probe.getsockname()[0])
        if not found.startswith("127."):
            return found
    return "127.0.0.1"


@dataclass(frozen=True)
class Resources:
    """What this node's Ray may use. Bytes for memory; GPUs as CUDA_VISIBLE_DEVICES names them."""

    cpus: int
    memory: int
    object_store: int
    gpus: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def cpus(env: Mapping[str, str]) -> int:
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


def memory(env: Mapping[str, str]) -> int:
    """Bytes of memory given to this process: the tightest of cgroup, Slurm's limit and the machine."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for directory in _cgroup_paths("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += _numbers(directory / name)
    per_node, per_cpu = env.get("SLURM_MEM_PER_NODE", ""), env.get("SLURM_MEM_PER_CPU", "")
    if per_node.isdigit() and int(per_node):
        limits.append(int(per_node) << 20)
    elif per_cpu.isdigit() and int(per_cpu):
        limits.append((int(per_cpu) << 20) * cpus(env))
    return min(limit for limit in limits if limit > 0)


def gpus(env: Mapping[str, str], look: bool = True) -> tuple[str, ...]:
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


def resources(
    env: Mapping[str, str], share: int = 1, object_store: int | None = None, look_for_gpus: bool = True
) -> Resources:
    """What Ray gets on this node; `share` nodes of the local backend divide the machine among them."""
    memory_share = memory(env) // share
    shm = shutil.disk_usage("/dev/shm").free // share
    store = object_store or min(1 << 30, memory_share // 10, shm // 2)
    return Resources(
        max(1, cpus(env) // share), memory_share, max(store, 80 << 20), gpus(env, look_for_gpus) if share == 1 else ()
    )
