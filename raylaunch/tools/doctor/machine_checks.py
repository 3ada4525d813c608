"""Judge the facts of a machine: can raylaunch run on it? Pure: facts in, findings out."""

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
    """The machine itself: free space, limits, ports, clock, tools."""
    busy = "Choose another node: too many ports of this one are in use."
    ports = (
        problem("node.ports", facts.ports_error, busy)
        if facts.ports_error
        else ok("node.ports", "512 contiguous free ports below the ephemeral range")
    )
    return [_temp(facts), _shm(facts), *_limits(facts), ports, _clock(facts), _tools(facts, modules_wanted)]


def _temp(facts: MachineFacts) -> Finding:
    if facts.temp_error:
        hint = "Set cluster.temp_dir to a short, writable, node-local path, such as /tmp."
        return problem("node.temp", facts.temp_error, hint)
    text = f"temp directory {facts.temp}: {size(facts.temp_free)} free ({facts.temp_type or 'unknown'})"
    if facts.temp_type in SHARED:
        hint = "Set cluster.temp_dir to a node-local directory: Ray stores its sockets and logs there."
        return warning("node.temp", f"{text}; this is a network file system", hint)
    if facts.temp_free < TEMP:
        hint = "Free some space, or set cluster.temp_dir: Ray writes logs and spilled objects there."
        return (problem if facts.temp_free < TEMP_LEAST else warning)("node.temp", text, hint)
    return ok("node.temp", text)


def _shm(facts: MachineFacts) -> Finding:
    text = f"/dev/shm has {size(facts.shm_free)} free"
    if facts.shm_free >= SHM:
        return ok("node.shm", text)
    hint = "Ray, NCCL and data loaders need it. Remove files of dead jobs, or ask your administrators to enlarge it."
    return (problem if facts.shm_free < SHM_LEAST else warning)("node.shm", text, hint)


def _limits(facts: MachineFacts) -> list[Finding]:
    (files, most), (processes, _) = facts.limits["nofile"], facts.limits["nproc"]
    locked = facts.limits["memlock"][0]
    findings = []
    if most is not None and most < FILES:
        hint = "Ray needs thousands. Ask your administrators to raise the hard limit (ulimit -Hn)."
        text = f"the limit of open files is {most}"
        findings.append((problem if most < FILES_LEAST else warning)("node.limits", text, hint))
    if processes is not None and processes < PROCESSES:
        hint = "Ray and torch start hundreds per worker. Raise the limit with `ulimit -u`."
        findings.append(warning("node.limits", f"the limit of processes and threads is {processes}", hint))
    if locked is not None and any(port.active for port in facts.adapters):
        text = f"the limit of locked memory is {size(locked)}, but InfiniBand or RoCE is active"
        hint = (
            "RDMA locks memory. Ask your administrators to set memlock to unlimited, for slurmd too "
            "(PropagateResourceLimitsExcept=MEMLOCK)."
        )
        findings.append(warning("node.limits", text, hint))
    shown = {"open files": files, "processes": processes, "locked memory": size(locked) if locked is not None else None}
    text = ", ".join(f"{name} {'unlimited' if value is None else value}" for name, value in shown.items())
    return findings or [ok("node.limits", f"limits: {text}")]


def _clock(facts: MachineFacts) -> Finding:
    if facts.synchronised is None:
        return unknown("node.clock", "the kernel does not report whether the clock is synchronised")
    if facts.synchronised:
        return ok("node.clock", "the clock is synchronised with a time server")
    hint = "Ask your administrators to start chronyd or ntpd: Slurm rejects credentials if clocks differ by minutes."
    return warning("node.clock", "the clock is not synchronised with a time server (adjtimex)", hint)


def _tools(facts: MachineFacts, modules_wanted: bool) -> Finding:
    modules = "yes" if facts.modules else "no"
    text = f"containers: {', '.join(facts.containers) or 'none'}; environment modules: {modules}"
    if modules_wanted and not facts.modules:
        hint = "Source the init script of environment modules in slurm.setup, or remove slurm.modules."
        return problem("node.tools", f"{text}, but slurm.modules is set", hint)
    return ok("node.tools", text)


def network(facts: MachineFacts, asked: str | None) -> list[Finding]:
    """Interfaces, the configured one, InfiniBand."""
    names = [interface.name for interface in facts.interfaces]
    listed = ", ".join(f"{i.name} {i.address}{_speed(i)}" for i in facts.interfaces) or "only loopback"
    if asked and asked not in names:
        hint = "It must exist on all nodes. Check this with `raylaunch doctor --nodes 2`."
        text = f"cluster.interface {asked} does not exist on this machine. Available: {listed}"
        return [warning("network.interface", text, hint), *infiniband(facts.adapters)]
    over = next((f" (for InfiniBand, set cluster.interface={i.name})" for i in facts.interfaces if i.infiniband), "")
    chosen = f"; cluster.interface is {asked}" if asked else f"; raylaunch uses the route to the other nodes{over}"
    text = f"interfaces: {listed}{chosen if len(names) > 1 else ''}"
    return [ok("network.interface", text), *infiniband(facts.adapters)]


def _speed(interface: Interface) -> str:
    words = ["IPoIB"] if interface.infiniband else []
    words += [f"{interface.speed / 1000:g} Gb/s"] if interface.speed else []
    return f" ({', '.join(words)})" if words else ""


def infiniband(adapters: Sequence[Port]) -> Iterator[Finding]:
    """The adapters that NCCL will use, and those without a link."""
    if not adapters:
        yield ok("network.infiniband", "InfiniBand and RoCE are not available: NCCL and gloo use TCP")
    # An Ethernet port with RoCE may be unused on purpose; an InfiniBand port normally has a cable.
    dark = [port for port in adapters if not port.active and not port.ethernet]
    if dark:
        text = f"inactive InfiniBand ports: {few(f'{p.device} ({p.state})' for p in dark)}"
        yield warning(
            "network.infiniband",
            text,
            "Ask your administrators to check the cable and the subnet manager; see `ibstat`.",
        )
    if native := native_ports(adapters):
        kind = "RoCE" if native[0].ethernet else "InfiniBand"
        text = f"NCCL uses {few(p.device for p in native)} ({kind}, {rates(native)}); set NCCL_IB_HCA to select others"
        yield ok("network.infiniband", text)


def native_ports(adapters: Sequence[Port]) -> list[Port]:
    """The active ports that NCCL uses: InfiniBand, otherwise RoCE."""
    active = [port for port in adapters if port.active]
    return [port for port in active if not port.ethernet] or active


def rates(ports: Sequence[Port]) -> str:
    return ", ".join(dict.fromkeys(port.rate.partition(" (")[0].replace("/sec", "/s") for port in ports))


def software(facts: MachineFacts, smi: Smi, wants_gpus: bool, shared: bool) -> Iterator[Finding]:
    """Versions, and whether torch, its CUDA version and the driver are compatible."""
    have = facts.versions
    yield ok("software.versions", listed({"Python": facts.python, **have}))
    for name in ("ray", "torch"):
        if name not in have:
            hint = f"Install raylaunch with its dependencies in {facts.prefix}."
            yield problem(f"software.{name}", f"{name} is not installed in the environment of raylaunch", hint)
    if shared and facts.prefix_type in LOCAL:
        text = f"this Python ({facts.prefix}) is on {facts.prefix_type}, which looks node-local"
        hint = "All nodes use this path. Install raylaunch on a shared file system, or at this path on every node."
        yield warning("software.shared", text, hint)
    torch = have.get("torch", "")
    if wants_gpus and torch and "cuda" not in have and torch.partition("+")[2] in {"", "cpu"}:
        text = f"torch {torch} seems to be built without CUDA, but GPUs are requested"
        yield warning("software.cuda", text, "Install torch with CUDA. On Linux, `pip install torch` includes it.")
    yield _driver(smi, have.get("cuda", ""), wants_gpus)


def listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _driver(smi: Smi, cuda: str, wants_gpus: bool) -> Finding:
    if smi.error:
        return warning("software.driver", smi.error, "To find the cause, run `dmesg | grep -i xid` on this machine.")
    if not smi.driver:
        return ok(
            "software.driver", "no NVIDIA driver on this machine" + " (to check the nodes, use --nodes)" * wants_gpus
        )
    text = f"NVIDIA driver {smi.driver}, supports CUDA up to {smi.cuda or '?'}"
    brought, most = (version.split(".")[0] for version in (cuda, smi.cuda))
    if brought.isdigit() and most.isdigit() and int(brought) > int(most):
        hint = f"Install torch for CUDA {most}, or ask your administrators to update the driver."
        return problem("software.driver", f"{text}, but torch needs CUDA {cuda}", hint)
    return ok("software.driver", text)


def gpus(rows: Sequence[GpuStatus]) -> Iterator[Finding]:
    """Findings about GPUs with trouble, according to nvidia-smi."""
    for gpu in rows:
        who = f"GPU {gpu.index}"
        words = [f"{gpu.ecc} uncorrectable ECC errors"] if gpu.ecc else []
        words += [word.replace("_", " ") for word in gpu.sick]
        if words:
            hint = (
                "Exclude the node (slurm.exclude) and ask your administrators to drain it: the GPU needs a reset or a "
                "repair."
            )
            yield problem("gpu.health", f"{who} ({gpu.uuid}): {', '.join(words)}", hint)
        if gpu.slowed:
            hot = f" at {gpu.temperature} °C" if gpu.temperature else ""
            hint = "Ask your administrators to check cooling and power: one slow GPU slows down all ranks."
            yield warning("gpu.throttling", f"{who} is throttled{hot}: {', '.join(gpu.slowed)}", hint)
        if gpu.link:
            hint = "Copies to and from the host are slower. Ask your administrators to reseat the card."
            yield warning("gpu.link", f"{who}: the PCIe link uses {gpu.link} lanes", hint)
