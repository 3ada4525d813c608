"""What a machine's facts mean for raylaunch on it. Pure: facts in, findings out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raylaunch.text import size
from raylaunch.tools.doctor.finding import Finding, few, ok, problem, unknown, warning
from raylaunch.tools.doctor.gpu_status import GpuStatus, Smi
from raylaunch.tools.doctor.machine_facts import Interface, MachineFacts, Port
from raylaunch.tools.doctor.storage_check import GIB, LOCAL, SHARED

TEMP, TEMP_LEAST = 5 * GIB, GIB // 4
SHM, SHM_LEAST = 1 * GIB, 64 << 20
FILES, FILES_LEAST = 4096, 1024
PROCESSES = 4096


def judge(facts: MachineFacts, modules_wanted: bool = False) -> list[Finding]:
    """The machine itself: room, limits, ports, clock, tools."""
    busy = "Choose another node: too much listens on this one."
    ports = (
        problem("node.ports", facts.ports_error, busy)
        if facts.ports_error
        else ok("node.ports", "a free block of 512 ports below the ephemeral range")
    )
    return [_temp(facts), _shm(facts), *_limits(facts), ports, _clock(facts), _tools(facts, modules_wanted)]


def _temp(facts: MachineFacts) -> Finding:
    if facts.temp_error:
        hint = "Set cluster.temp_dir to a short node-local path that you may write, such as /tmp."
        return problem("node.temp", facts.temp_error, hint)
    text = f"temp directory {facts.temp}: {size(facts.temp_free)} free ({facts.temp_type or 'unknown'})"
    if facts.temp_type in SHARED:
        hint = "Set cluster.temp_dir to a node-local directory: Ray's sockets and logs go there."
        return warning("node.temp", f"{text}: it is a network file system", hint)
    if facts.temp_free < TEMP:
        hint = "Free some, or set cluster.temp_dir: Ray's logs go there, and what it spills."
        return (problem if facts.temp_free < TEMP_LEAST else warning)("node.temp", text, hint)
    return ok("node.temp", text)


def _shm(facts: MachineFacts) -> Finding:
    text = f"/dev/shm has {size(facts.shm_free)} free"
    if facts.shm_free >= SHM:
        return ok("node.shm", text)
    hint = "Ray's objects, NCCL and data loaders share it: remove what dead jobs left there, or have it enlarged."
    return (problem if facts.shm_free < SHM_LEAST else warning)("node.shm", text, hint)


def _limits(facts: MachineFacts) -> list[Finding]:
    (files, most), (processes, _) = facts.limits["nofile"], facts.limits["nproc"]
    locked = facts.limits["memlock"][0]
    findings = []
    if most is not None and most < FILES:
        hint = "Ray wants thousands: have the hard limit (ulimit -Hn) raised."
        findings.append((problem if most < FILES_LEAST else warning)("node.limits", f"at most {most} open files", hint))
    if processes is not None and processes < PROCESSES:
        hint = "Ray and torch start hundreds a worker: raise ulimit -u."
        findings.append(warning("node.limits", f"at most {processes} processes and threads", hint))
    if locked is not None and any(port.active for port in facts.adapters):
        text = f"only {size(locked)} of memory may be locked, and there is InfiniBand"
        hint = "RDMA pins memory: have memlock unlimited, for slurmd too (PropagateResourceLimitsExcept=MEMLOCK)."
        findings.append(warning("node.limits", text, hint))
    shown = {"open files": files, "processes": processes, "locked memory": size(locked) if locked is not None else None}
    text = ", ".join(f"{name} {'unlimited' if value is None else value}" for name, value in shown.items())
    return findings or [ok("node.limits", f"limits: {text}")]


def _clock(facts: MachineFacts) -> Finding:
    if facts.synchronised is None:
        return unknown("node.clock", "the kernel does not say whether the clock follows a time server")
    if facts.synchronised:
        return ok("node.clock", "the clock follows a time server")
    hint = "Have chronyd or ntpd started: Slurm refuses credentials of clocks that are minutes apart."
    return warning("node.clock", "the clock follows no time server (by its kernel)", hint)


def _tools(facts: MachineFacts, modules_wanted: bool) -> Finding:
    modules = "yes" if facts.modules else "no"
    text = f"containers: {', '.join(facts.containers) or 'none'}; environment modules: {modules}"
    if modules_wanted and not facts.modules:
        hint = "Source the modules' set-up in slurm.setup, or take slurm.modules out."
        return problem("node.tools", f"{text}, and slurm.modules asks for some", hint)
    return ok("node.tools", text)


def network(facts: MachineFacts, asked: str | None) -> list[Finding]:
    """Interfaces, the one that the config asks for, InfiniBand."""
    names = [interface.name for interface in facts.interfaces]
    listed = ", ".join(f"{i.name} {i.address}{_speed(i)}" for i in facts.interfaces) or "none but loopback"
    if asked and asked not in names:
        hint = "It must be on all nodes: compare with `raylaunch doctor --nodes 2`."
        text = f"cluster.interface {asked} is not here; there is: {listed}"
        return [warning("network.interface", text, hint), *infiniband(facts.adapters)]
    over = next((f" (over InfiniBand: cluster.interface={i.name})" for i in facts.interfaces if i.infiniband), "")
    chosen = f"; cluster.interface takes {asked}" if asked else f"; raylaunch takes the one towards its peers{over}"
    text = f"interfaces: {listed}{chosen if len(names) > 1 else ''}"
    return [ok("network.interface", text), *infiniband(facts.adapters)]


def _speed(interface: Interface) -> str:
    words = ["IPoIB"] if interface.infiniband else []
    words += [f"{interface.speed / 1000:g} Gb/s"] if interface.speed else []
    return f" ({', '.join(words)})" if words else ""


def infiniband(adapters: Sequence[Port]) -> Iterator[Finding]:
    """Which adapters NCCL will use, and those whose cable is out."""
    if not adapters:
        yield ok("network.infiniband", "no InfiniBand or RoCE here: NCCL and gloo use TCP")
    # A port of an Ethernet card that can do RoCE may well be unused; one of InfiniBand has a cable.
    dark = [port for port in adapters if not port.active and not port.ethernet]
    if dark:
        text = f"not active: {few(f'{p.device} ({p.state})' for p in dark)}"
        yield warning("network.infiniband", text, "Have the cable and the subnet manager looked at; see `ibstat`.")
    if native := native_ports(adapters):
        kind = "RoCE" if native[0].ethernet else "InfiniBand"
        text = f"NCCL uses {few(p.device for p in native)} ({kind}, {rates(native)}); NCCL_IB_HCA would choose others"
        yield ok("network.infiniband", text)


def native_ports(adapters: Sequence[Port]) -> list[Port]:
    """The active ports that NCCL takes: InfiniBand's, else RoCE's."""
    active = [port for port in adapters if port.active]
    return [port for port in active if not port.ethernet] or active


def rates(ports: Sequence[Port]) -> str:
    return ", ".join(dict.fromkeys(port.rate.partition(" (")[0].replace("/sec", "/s") for port in ports))


def software(facts: MachineFacts, smi: Smi, wants_gpus: bool, shared: bool) -> Iterator[Finding]:
    """Versions, and whether torch, its CUDA and the driver fit together."""
    have = facts.versions
    yield ok("software.versions", listed({"Python": facts.python, **have}))
    for name in ("ray", "torch"):
        if name not in have:
            hint = f"Install raylaunch with its dependencies into {facts.prefix}."
            yield problem(f"software.{name}", f"{name} is not installed beside raylaunch", hint)
    if shared and facts.prefix_type in LOCAL:
        text = f"this Python ({facts.prefix}) lies on {facts.prefix_type}, which looks node-local"
        hint = "The nodes start the same path: install raylaunch on the shared file system, unless every node has it."
        yield warning("software.shared", text, hint)
    torch = have.get("torch", "")
    if wants_gpus and torch and "cuda" not in have and torch.partition("+")[2] in {"", "cpu"}:
        text = f"torch {torch} looks like a build without CUDA, and GPUs are asked for"
        yield warning("software.cuda", text, "Install torch with CUDA: `pip install torch` from PyPI has it on Linux.")
    yield _driver(smi, have.get("cuda", ""), wants_gpus)


def listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _driver(smi: Smi, cuda: str, wants_gpus: bool) -> Finding:
    if smi.error:
        return warning("software.driver", smi.error, "`dmesg | grep -i xid` on that machine may say why.")
    if not smi.driver:
        return ok("software.driver", "no NVIDIA driver here" + " (the nodes matter: --nodes)" * wants_gpus)
    text = f"NVIDIA driver {smi.driver}, for CUDA up to {smi.cuda or '?'}"
    brought, most = (version.split(".")[0] for version in (cuda, smi.cuda))
    if brought.isdigit() and most.isdigit() and int(brought) > int(most):
        hint = f"Install a torch for CUDA {most}, or have the driver updated."
        return problem("software.driver", f"{text}, but torch brings CUDA {cuda}", hint)
    return ok("software.driver", text)


def gpus(rows: Sequence[GpuStatus]) -> Iterator[Finding]:
    """What nvidia-smi says against GPUs: a finding each that is not well."""
    for gpu in rows:
        who = f"GPU {gpu.index}"
        words = [f"{gpu.ecc} uncorrectable ECC errors"] if gpu.ecc else []
        words += [word.replace("_", " ") for word in gpu.sick]
        if words:
            hint = "Keep the node out (slurm.exclude) and have it drained: the GPU needs a reset or a repair."
            yield problem("gpu.health", f"{who} ({gpu.uuid}): {', '.join(words)}", hint)
        if gpu.slowed:
            hot = f" at {gpu.temperature} °C" if gpu.temperature else ""
            hint = "Have that node's cooling and power looked at: one slow GPU holds up all ranks."
            yield warning("gpu.throttling", f"{who} is slowed down{hot}: {', '.join(gpu.slowed)}", hint)
        if gpu.link:
            hint = "Have the card reseated: copies to and from the host take longer."
            yield warning("gpu.link", f"{who}: its PCIe link has {gpu.link} lanes", hint)
