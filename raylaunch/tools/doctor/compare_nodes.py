"""Compare the results of all nodes: missing, different, unreachable and slow ones. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from raylaunch.text import plural, size
from raylaunch.tools.doctor import gpu_status, machine_checks, pairwise
from raylaunch.tools.doctor.finding import Finding, few, ok, on, problem, warning
from raylaunch.tools.doctor.mailbox import Checked, GpuCheck, Hello, Pairs

SKEW, FAR = 0.5, 5.0
"""Seconds between clocks: limits for a warning and for a problem."""
DIRECTORY_TELLS = 1.0
"""Seconds that a file in the shared directory may be late: the accuracy of clocks compared through it."""
SLUGGISH = 0.85
"""Fraction of the median speed below which a GPU is slow."""
KEEP_OUT = "Exclude the node (slurm.exclude) and ask your administrators to check"
Edge = tuple[int, int]
Names = Mapping[int, str]


def arrived(found: Mapping[int, Hello], names: Sequence[str], failures: Mapping[str, str]) -> Iterator[Finding]:
    """Which nodes of the job started, and which did not."""
    well = 0
    for index, name in enumerate(names):
        said = found.get(index)
        error = failures.get(name) or (said.error if said is not None else "no response")
        if not error:
            well += 1
        elif "not shared" in error:
            hint = "Set cluster.state_dir (or --state-dir) to a directory that all nodes and the login node share."
            yield problem("nodes.shared", error, hint, name)
        else:
            hint = "Check the node: `raylaunch up` would fail on it, too. slurm.exclude excludes it."
            yield problem("nodes.start", error, hint, name)
    if well:
        yield ok("nodes.shared", f"the state directory is shared with {_nodes(well)}")


def proved(findings: Sequence[Finding]) -> list[Finding]:
    """Drop findings of the login node that the nodes have disproved: a directory that looked node-local is shared."""
    if any(one.check == "nodes.shared" and one.status == "ok" for one in findings) and not any(
        one.check in {"nodes.shared", "nodes.start"} and one.status == "problem" for one in findings
    ):
        return [one for one in findings if one.check not in {"storage.type", "software.shared"} or one.status == "ok"]
    return list(findings)


def alike(found: Mapping[int, Hello], modules_wanted: bool, gpus_asked: int) -> Iterator[Finding]:
    """Findings of each node, and differences between the nodes."""
    rows = [found[index] for index in sorted(found)]
    well = len(rows)
    for row in rows:
        own = on(
            row.node, [*machine_checks.judge(row.facts, modules_wanted), *machine_checks.infiniband(row.facts.adapters)]
        )
        bad = [one for one in own if one.status in {"warning", "problem"}]
        well -= any(one.check in {"nodes.temp", "nodes.shm", "nodes.limits", "nodes.ports"} for one in bad)
        yield from bad
        if len(row.gpus) < gpus_asked:
            hint = "Check slurm.gpus_per_node (or slurm.gres) and gres.conf of the node."
            yield problem(
                "gpu.count", f"only {len(row.gpus)} of {gpus_asked} requested GPUs are visible", hint, row.node
            )
    if well:
        yield ok("nodes.ground", f"temp directory, /dev/shm, limits and ports are OK on {_nodes(well)}")
    yield from _differing("nodes.resources", {r.node: _resources(r) for r in rows}, "{} per node", warn=False)
    yield from _differing(
        "network.peers", {r.node: r.interface for r in rows}, "interface between nodes: {}", warn=False
    )
    speeds = {r.node: next((i.speed for i in r.facts.interfaces if i.name == r.interface), 0) for r in rows}
    yield from _differing("network.speed", {n: f"{s / 1000:g} Gb/s" for n, s in speeds.items() if s}, "link speed: {}")
    ports = {r.node: machine_checks.native_ports(r.facts.adapters) for r in rows}
    counts = {node: f"{len(own)} at {machine_checks.rates(own) or 'unknown rate'}" for node, own in ports.items()}
    if any(ports.values()):
        yield from _differing("network.adapters", counts, "active InfiniBand or RoCE ports: {}")
    yield from _versions(rows)
    yield from _submits(rows)


def _versions(rows: Sequence[Hello]) -> Iterator[Finding]:
    have = {row.node: {"Python": row.facts.python, **row.facts.versions} for row in rows}
    names = dict.fromkeys(name for versions in have.values() for name in versions)
    differing = [
        finding
        for name in names
        for finding in _differing(
            "software.versions", {n: v.get(name, "not installed") for n, v in have.items()}, name + " {}"
        )
        if finding.status != "ok"
    ]
    if rows and not differing:
        yield ok(
            "software.versions", f"same versions on {_nodes(len(rows))}: {machine_checks.listed(have[rows[0].node])}"
        )
    yield from differing


def _submits(rows: Sequence[Hello]) -> Iterator[Finding]:
    for row in rows:
        if row.submit == "":
            yield ok("nodes.submit", "compute nodes can submit jobs, so the head replaces lost nodes")
        elif row.submit:
            hint = "To replace lost nodes, run `raylaunch up --watch` or `raylaunch watch` on the login node."
            yield warning("nodes.submit", f"cannot submit jobs: {row.submit}", hint, row.node)


def _resources(row: Hello) -> str:
    words = [plural(row.cpus, "CPU"), f"{size(row.memory)} memory"]
    words += [plural(len(row.gpus), "GPU")] if row.gpus else []
    return ", ".join([*words, f"{size(row.object_store)} object store"])


def _differing(check: str, given: Mapping[str, str], text: str, warn: bool = True) -> Iterator[Finding]:
    """One finding if all values are equal; otherwise also one for each node that differs from most nodes."""
    usual = next((value for value, _ in Counter(given.values()).most_common(1)), None)
    others = {node: value for node, value in given.items() if value != usual}
    if usual is not None and not (others and warn):
        yield ok(check, text.format(usual) + " (most nodes)" * bool(others))
    for node, value in others.items():
        words = f"{text.format(value)}; most nodes have {usual}"
        hint = "Use identical nodes and software versions: the slowest node limits the whole run."
        yield warning(check, words, hint, node) if warn else ok(check, words, node)


def clocks(found: Mapping[int, Checked], names: Names) -> Iterator[Finding]:
    """Differences between the nodes' clocks. Each was compared with the first node's over the network."""
    first = min(names, default=0)
    ahead = {i: row.reached[first].ahead for i, row in found.items() if first in row.reached and not row.reached[first].error}  # fmt: skip
    if not ahead:
        return
    ahead[first] = 0.0
    usual = statistics.median(ahead.values())
    off = {index: usual - value for index, value in ahead.items()}
    if (worst := max(map(abs, off.values()))) <= SKEW:
        yield ok("nodes.clock", f"clocks agree within {max(worst * 1000, 0.1):.1f} ms (measured over the network)")
    for index, seconds in sorted(off.items()):
        if abs(seconds) > SKEW:
            text = f"clock is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} the other nodes"
            hint = "Ask your administrators to check chronyd: log times are wrong, and Slurm credentials expire."
            yield (problem if abs(seconds) > FAR else warning)("nodes.clock", text, hint, names[index])


def login_clock(written: float, read_at: Iterable[float], said: Mapping[float, float]) -> Finding:
    """Compare the login node's clock with the nodes' through the shared directory. The nodes read at `read_at` a file
    that it wrote at `written`; it saw at the values of `said` files that they wrote at the keys. A file from the future
    shows that the clocks differ."""
    behind = max((wrote - seen for wrote, seen in said.items()), default=0.0)
    ahead = max((written - read for read in read_at), default=0.0)
    for seconds, word in ((behind, "behind"), (ahead, "ahead of")):
        if seconds > DIRECTORY_TELLS:
            text = f"clock of the login node is at least {seconds:.0f} s {word} the compute nodes"
            return warning("nodes.login_clock", text, "Ask your administrators to check its time service (chronyd).")
    text = f"clocks of login node and compute nodes agree within {DIRECTORY_TELLS:g} s (measured through files)"
    return ok("nodes.login_clock", text)


def cut_off(edges: Mapping[Edge, str]) -> tuple[dict[int, str], dict[Edge, str]]:
    """(from, to) → error or "". Returns the nodes for which most connections fail, each with one of its errors, and the
    remaining failures between other nodes."""
    left = dict(edges)
    bad: dict[int, str] = {}
    while True:
        tried = Counter(node for edge in left for node in edge)
        failed = Counter(node for edge, error in left.items() if error for node in edge)
        worst = [node for node, count in failed.most_common() if 2 * count > tried[node]]
        if len(tried) <= 2 or not worst:  # of two nodes, the faulty one cannot be identified
            return bad, {edge: error for edge, error in left.items() if error}
        bad[worst[0]] = next(error for edge, error in left.items() if error and worst[0] in edge)
        left = {edge: error for edge, error in left.items() if worst[0] not in edge}


def reachable(found: Mapping[int, Checked], names: Names) -> tuple[list[Finding], set[int], set[Edge]]:
    """Findings about connections, the unreachable nodes, and the pairs (low, high) that cannot connect."""
    edges = {(i, j): one.error for i, row in found.items() for j, one in row.reached.items()}
    bad, others = cut_off(edges)
    hint = "Check the node's network and firewall, or select an interface with cluster.interface."
    check = "network.reach"
    findings = [
        problem(check, f"connections to and from other nodes fail: {e}", hint, names[i]) for i, e in bad.items()
    ]
    findings += [problem(check, f"cannot connect to {names[j]}: {e}", hint, names[i]) for (i, j), e in others.items()]
    if edges and not findings:
        slowest = max(one.seconds for row in found.values() for one in row.reached.values())
        text = f"{len(edges)} connections between nodes work, round trip at most {slowest * 1000:.1f} ms"
        findings = [ok(check, text)]
    return findings, set(bad), {(min(edge), max(edge)) for edge in others}


def torch_errors(found: Mapping[int, Checked], names: Names) -> Iterator[Finding]:
    hint = "Run `python -c 'import torch'` on the node, after slurm.modules and slurm.setup."
    for index, row in sorted(found.items()):
        if row.torch:
            yield problem("software.torch", f"torch cannot be used: {row.torch}", hint, names[index])


def gpu_checks(found: Mapping[int, Checked], hellos: Mapping[int, Hello]) -> list[Finding]:
    """Findings about GPUs: their tests, nvidia-smi, and GPUs that are visible on two nodes."""
    rows = {hellos[i].node: (row, gpu_status.ours(row.smi.gpus, hellos[i].gpus)) for i, row in sorted(found.items()) if hellos[i].gpus}  # fmt: skip
    findings: list[Finding] = []
    owners: dict[str, list[str]] = {}
    for node, (row, listed) in rows.items():
        own = list(machine_checks.gpus(listed))
        if row.smi.error:
            own.append(problem("gpu.driver", row.smi.error, f"{KEEP_OUT} its driver."))
        findings += on(node, [*own, *(finding for gpu in row.gpus for finding in _gpu(gpu))])
        for one in listed:
            owners.setdefault(one.uuid, []).append(node)
    hint = "A GPU must belong to one node. Ask your administrators to check gres.conf."
    findings += [problem("gpu.unique", f"GPU {u} is visible on {few(ns)}", hint) for u, ns in owners.items() if len(ns) > 1]  # fmt: skip
    rates = [(node, gpu.local, gpu.flops) for node, (row, _) in rows.items() for gpu in row.gpus if gpu.flops]
    usual = statistics.median([rate for *_, rate in rates]) if rates else 0.0
    hint = "Check whether it is throttled or shared: one slow GPU slows down all ranks."
    findings += [
        warning("gpu.speed", f"GPU {local} is slow: {_tera(rate)}, the median is {_tera(usual)}", hint, node)
        for node, local, rate in rates
        if rate < SLUGGISH * usual
    ]
    if rates and not findings:
        text = f"{plural(len(rates), 'GPU')} passed the memory test; median speed {_tera(usual)} (bf16)"
        findings.append(ok("gpu.check", text))
    models = {
        node: few(f"{n} {name}" for name, n in Counter(gpu.name for gpu in row.gpus).items())
        for node, (row, _) in rows.items()
        if not any(gpu.error for gpu in row.gpus)
    }
    drivers = {node: row.smi.driver for node, (row, _) in rows.items() if row.smi.driver}
    alike = [*_differing("gpu.model", models, "{}"), *_differing("gpu.driver", drivers, "NVIDIA driver {}")]
    return [*findings, *alike]


def _gpu(gpu: GpuCheck) -> Iterator[Finding]:
    if gpu.error:
        hint = f"{KEEP_OUT} the GPU. For details, run `nvidia-smi` and `dmesg` on the node."
        yield problem("gpu.check", f"GPU {gpu.local}: {gpu.error}", hint)
    elif gpu.taken > max(gpu.memory // 20, 2 << 30):  # the driver itself uses some
        text = f"GPU {gpu.local}: {size(gpu.taken)} of its memory is already in use"
        yield warning("gpu.taken", text, "Another process uses it. To find the process, run `nvidia-smi` on the node.")


def bandwidth(found: Mapping[int, Pairs], names: Names, backend: str) -> Iterator[Finding]:
    """Slow nodes and paths, from the measured pairs."""
    measured: dict[tuple[str, str], float | None] = {}
    errors: dict[tuple[str, str], str] = {}
    for one in (result for row in found.values() for result in row.results):  # both nodes report a pair, some twice
        pair = (names[one.a], names[one.b])
        measured[pair] = max(filter(None, (measured.get(pair), one.rate)), default=None)
        if one.error:
            errors.setdefault(pair, one.error)
    for index, row in found.items():
        if row.error:
            yield problem("bandwidth.node", f"measurement aborted: {row.error}", "Run the check again.", names[index])
    seen = pairwise.analyse(measured, backend)
    more = "For details, set NCCL_DEBUG=INFO in slurm.env."
    if not seen.own:
        words = [f"{a} and {b}: {error}" for (a, b), error in errors.items()] or ["no pair finished"]
        hint = f"Check cluster.interface and the firewall between nodes. {more}"
        yield problem("bandwidth.pairs", f"all-reduce failed for all pairs of nodes ({words[0]})", hint)
        return
    count = sum(rate is not None for rate in measured.values())
    how = f"{backend} all-reduce, {plural(count, 'pair')} measured"
    yield ok("bandwidth.pairs", f"{_rate(seen.usual)} between two nodes ({how})")
    for node, rate in seen.slow.items():
        text = f"slow with every partner: at most {_rate(rate)}, {rate / seen.usual:.0%} of the median"
        hint = f"{KEEP_OUT} its cable, adapter and link speed."
        yield (problem if rate < pairwise.LIMITS[backend][1] * seen.usual else warning)(
            "bandwidth.slow", text, hint, node
        )
    for node in seen.dead:
        error = next((error for pair, error in errors.items() if node in pair), "")
        yield problem(
            "bandwidth.slow", f"all-reduce failed with every partner: {error}", f"{KEEP_OUT} its network. {more}", node
        )
    if slow := [f"{a}-{b} {_rate(rate)}" for (a, b), rate in seen.paths.items() if rate is not None]:
        text = f"slow pairs, although both nodes are fast with others: {few(slow)}"
        hint = "The cause may be a switch or other traffic on the path. Run the check again."
        yield warning("bandwidth.paths", text, hint)
    if broken := [f"{a}-{b} ({errors.get((a, b), '')})" for (a, b), rate in seen.paths.items() if rate is None]:
        text = f"all-reduce failed for pairs, although both nodes work with others: {few(broken)}"
        hint = "Run the check again. If it fails again, report the pair to your administrators."
        yield problem("bandwidth.paths", text, hint)


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s" if rate < 1e10 else f"{rate / 1e9:.0f} GB/s"


def _tera(rate: float) -> str:
    return f"{rate / 1e12:.0f} TFLOP/s"


def _nodes(count: int) -> str:
    return f"{count} node{'s' * (count != 1)}"
