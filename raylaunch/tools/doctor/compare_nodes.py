"""What the nodes' answers mean, seen together: who is missing, who differs, who is cut off, who is slow. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from raylaunch.text import plural, size
from raylaunch.tools.doctor import gpu_status, machine_checks, pairwise
from raylaunch.tools.doctor.finding import Finding, few, ok, on, problem, warning
from raylaunch.tools.doctor.mailbox import Checked, GpuCheck, Hello, Pairs

SKEW, FAR = 0.5, 5.0
"""Seconds between clocks: worth a word, and a problem."""
DIRECTORY_TELLS = 1.0
"""Seconds that a file on the shared directory may be late: what clocks compared through it can tell."""
SLUGGISH = 0.85
"""Share of the usual speed below which a GPU is slow."""
KEEP_OUT = "Keep it out (slurm.exclude) and have"
Edge = tuple[int, int]
Names = Mapping[int, str]


def arrived(found: Mapping[int, Hello], names: Sequence[str], failures: Mapping[str, str]) -> Iterator[Finding]:
    """Who said hello, of all that the job has."""
    well = 0
    for index, name in enumerate(names):
        said = found.get(index)
        error = failures.get(name) or (said.error if said is not None else "no word from it")
        if not error:
            well += 1
        elif "not shared" in error:
            hint = "Set cluster.state_dir (or --state-dir) to a directory that all nodes and the login node share."
            yield problem("nodes.shared", error, hint, name)
        else:
            hint = "Look at that node: `raylaunch up` would fail on it as well. slurm.exclude keeps it out."
            yield problem("nodes.start", error, hint, name)
    if well:
        yield ok(
            "nodes.shared", f"{_nodes(well)} see{'s' * (well == 1)} what the login node wrote into the state directory"
        )


def proved(findings: Sequence[Finding]) -> list[Finding]:
    """The findings without doubts of the login node's that the nodes have settled: what looked node-local is shared."""
    if any(one.check == "nodes.shared" and one.status == "ok" for one in findings) and not any(
        one.check in {"nodes.shared", "nodes.start"} and one.status == "problem" for one in findings
    ):
        return [one for one in findings if one.check not in {"storage.type", "software.shared"} or one.status == "ok"]
    return list(findings)


def alike(found: Mapping[int, Hello], modules_wanted: bool, gpus_asked: int) -> Iterator[Finding]:
    """Each node by itself, and what differs between them."""
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
            hint = "Check slurm.gpus_per_node (or gres), and that node's gres.conf."
            yield problem("gpu.count", f"{len(row.gpus)} GPUs of {gpus_asked} that were asked for", hint, row.node)
    if well:
        yield ok("nodes.ground", f"temp directory, /dev/shm, limits and ports are well on {_nodes(well)}")
    yield from _differing("nodes.resources", {r.node: _resources(r) for r in rows}, "{} each", warn=False)
    yield from _differing("network.peers", {r.node: r.interface for r in rows}, "nodes meet over {}", warn=False)
    speeds = {r.node: next((i.speed for i in r.facts.interfaces if i.name == r.interface), 0) for r in rows}
    yield from _differing("network.speed", {n: f"{s / 1000:g} Gb/s" for n, s in speeds.items() if s}, "links of {}")
    ports = {r.node: machine_checks.native_ports(r.facts.adapters) for r in rows}
    counts = {node: f"{len(own)} at {machine_checks.rates(own) or 'no rate'}" for node, own in ports.items()}
    if any(ports.values()):
        yield from _differing("network.adapters", counts, "InfiniBand or RoCE ports that are active: {}")
    yield from _versions(rows)
    yield from _submits(rows)


def _versions(rows: Sequence[Hello]) -> Iterator[Finding]:
    have = {row.node: {"Python": row.facts.python, **row.facts.versions} for row in rows}
    names = dict.fromkeys(name for versions in have.values() for name in versions)
    differing = [
        finding
        for name in names
        for finding in _differing("software.versions", {n: v.get(name, "none") for n, v in have.items()}, name + " {}")
        if finding.status != "ok"
    ]
    if rows and not differing:
        yield ok("software.versions", f"the same on {_nodes(len(rows))}: {machine_checks.listed(have[rows[0].node])}")
    yield from differing


def _submits(rows: Sequence[Hello]) -> Iterator[Finding]:
    for row in rows:
        if row.submit == "":
            yield ok("nodes.submit", "compute nodes may submit jobs: the head replaces lost nodes itself")
        elif row.submit:
            hint = "Lost nodes are then replaced from the login node: `raylaunch up --watch`, or `raylaunch watch`."
            yield warning("nodes.submit", f"jobs cannot be submitted from it: {row.submit}", hint, row.node)


def _resources(row: Hello) -> str:
    words = [plural(row.cpus, "CPU"), f"{size(row.memory)} of memory"]
    words += [f"{len(row.gpus)} GPUs"] if row.gpus else []
    return ", ".join([*words, f"{size(row.object_store)} for Ray's objects"])


def _differing(check: str, given: Mapping[str, str], text: str, warn: bool = True) -> Iterator[Finding]:
    """One line where all are the same; else a line for each node that is not as most are."""
    usual = next((value for value, _ in Counter(given.values()).most_common(1)), None)
    others = {node: value for node, value in given.items() if value != usual}
    if usual is not None and not (others and warn):
        yield ok(check, text.format(usual) + " (most)" * bool(others))
    for node, value in others.items():
        words = f"{text.format(value)}; most have {usual}"
        hint = "Nodes of one cluster should be alike: the slowest and the oldest counts for all."
        yield warning(check, words, hint, node) if warn else ok(check, words, node)


def clocks(found: Mapping[int, Checked], names: Names) -> Iterator[Finding]:
    """The nodes' clocks against each other: each was compared with the first one's, over the network."""
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
            text = f"its clock is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} the others'"
            hint = "Have its time service (chronyd) looked at: logs mislead, and Slurm's credentials expire."
            yield (problem if abs(seconds) > FAR else warning)("nodes.clock", text, hint, names[index])


def login_clock(written: float, read_at: Iterable[float], said: Mapping[float, float]) -> Finding:
    """The login node's clock against theirs, through the shared directory: what it wrote at `written` was read at
    `read_at`, and what they wrote at a key of `said` was seen at its value. None of it may lie in the future."""
    behind = max((wrote - seen for wrote, seen in said.items()), default=0.0)
    ahead = max((written - read for read in read_at), default=0.0)
    for seconds, word in ((behind, "behind"), (ahead, "ahead of")):
        if seconds > DIRECTORY_TELLS:
            text = f"the login node's clock is at least {seconds:.0f} s {word} the nodes'"
            return warning("nodes.login_clock", text, "Have its time service (chronyd) looked at.")
    return ok(
        "nodes.login_clock", f"the login node's clock is theirs, to the {DIRECTORY_TELLS:g} s that files can tell"
    )


def cut_off(edges: Mapping[Edge, str]) -> tuple[dict[int, str], dict[Edge, str]]:
    """(from, to) → error or "": the nodes most of whose connections fail, with an error of theirs, and the failures
    that are left when those are set aside."""
    left = dict(edges)
    bad: dict[int, str] = {}
    while True:
        tried = Counter(node for edge in left for node in edge)
        failed = Counter(node for edge, error in left.items() if error for node in edge)
        worst = [node for node, count in failed.most_common() if 2 * count > tried[node]]
        if len(tried) <= 2 or not worst:  # of two nobody can say which
            return bad, {edge: error for edge, error in left.items() if error}
        bad[worst[0]] = next(error for edge, error in left.items() if error and worst[0] in edge)
        left = {edge: error for edge, error in left.items() if worst[0] not in edge}


def reachable(found: Mapping[int, Checked], names: Names) -> tuple[list[Finding], set[int], set[Edge]]:
    """What the connections between nodes say, who cannot be reached, and the pairs (low, high) that do not meet."""
    edges = {(i, j): one.error for i, row in found.items() for j, one in row.reached.items()}
    bad, others = cut_off(edges)
    hint = "Check that node's network and firewall, or name the right interface with cluster.interface."
    check = "network.reach"
    findings = [
        problem(check, f"it and its peers do not reach each other: {e}", hint, names[i]) for i, e in bad.items()
    ]
    findings += [problem(check, f"it does not reach {names[j]}: {e}", hint, names[i]) for (i, j), e in others.items()]
    if edges and not findings:
        slowest = max(one.seconds for row in found.values() for one in row.reached.values())
        findings = [ok(check, f"{len(edges)} connections between nodes work, {slowest * 1000:.1f} ms there and back at most")]  # fmt: skip
    return findings, set(bad), {(min(edge), max(edge)) for edge in others}


def torch_errors(found: Mapping[int, Checked], names: Names) -> Iterator[Finding]:
    hint = "Try `python -c 'import torch'` on that node, with what slurm.modules and slurm.setup load."
    for index, row in sorted(found.items()):
        if row.torch:
            yield problem("software.torch", f"torch cannot be used: {row.torch}", hint, names[index])


def gpu_checks(found: Mapping[int, Checked], hellos: Mapping[int, Hello]) -> list[Finding]:
    """GPUs: what they did, what nvidia-smi says of them, and whether each is there once."""
    rows = {hellos[i].node: (row, gpu_status.ours(row.smi.gpus, hellos[i].gpus)) for i, row in sorted(found.items()) if hellos[i].gpus}  # fmt: skip
    findings: list[Finding] = []
    owners: dict[str, list[str]] = {}
    for node, (row, listed) in rows.items():
        own = list(machine_checks.gpus(listed))
        if row.smi.error:
            own.append(problem("gpu.driver", row.smi.error, f"{KEEP_OUT} its driver looked at."))
        findings += on(node, [*own, *(finding for gpu in row.gpus for finding in _gpu(gpu))])
        for one in listed:
            owners.setdefault(one.uuid, []).append(node)
    hint = "Two nodes cannot have one GPU: ask your administrators about gres.conf."
    findings += [problem("gpu.unique", f"GPU {u} is seen by {few(ns)}", hint) for u, ns in owners.items() if len(ns) > 1]  # fmt: skip
    rates = [(node, gpu.local, gpu.flops) for node, (row, _) in rows.items() for gpu in row.gpus if gpu.flops]
    usual = statistics.median([rate for *_, rate in rates]) if rates else 0.0
    hint = "See whether it is throttled or shared: one slow GPU holds up all ranks."
    findings += [
        warning("gpu.speed", f"GPU {local} multiplies at {_tera(rate)}, the usual one at {_tera(usual)}", hint, node)
        for node, local, rate in rates
        if rate < SLUGGISH * usual
    ]
    if rates and not findings:
        text = f"{len(rates)} GPUs hold what is written to them, and multiply at {_tera(usual)} (bf16)"
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
        hint = f"{KEEP_OUT} it looked at: `nvidia-smi` and `dmesg` there tell more."
        yield problem("gpu.check", f"GPU {gpu.local}: {gpu.error}", hint)
    elif gpu.taken > max(gpu.memory // 20, 2 << 30):  # the driver itself takes some
        text = f"GPU {gpu.local}: {size(gpu.taken)} of its memory were taken before we came"
        yield warning("gpu.taken", text, "Somebody else's process is on it: `nvidia-smi` names it.")


def bandwidth(found: Mapping[int, Pairs], names: Names, backend: str) -> Iterator[Finding]:
    """Who is slow, by the pairs that were measured."""
    measured: dict[tuple[str, str], float | None] = {}
    errors: dict[tuple[str, str], str] = {}
    for one in (result for row in found.values() for result in row.results):  # both ends tell, and some twice
        pair = (names[one.a], names[one.b])
        measured[pair] = max(filter(None, (measured.get(pair), one.rate)), default=None)
        if one.error:
            errors.setdefault(pair, one.error)
    for index, row in found.items():
        if row.error:
            yield problem("bandwidth.node", f"its measurement broke off: {row.error}", "Measure again.", names[index])
    seen = pairwise.analyse(measured, backend)
    more = "NCCL_DEBUG=INFO in slurm.env tells more."
    if not seen.own:
        words = [f"{a} and {b}: {error}" for (a, b), error in errors.items()] or ["no pair came to an end"]
        hint = f"Check cluster.interface and the firewall between nodes; {more}"
        yield problem("bandwidth.pairs", f"no all-reduce between two nodes worked ({words[0]})", hint)
        return
    count = sum(rate is not None for rate in measured.values())
    yield ok("bandwidth.pairs", f"{_rate(seen.usual)} between two nodes ({backend} all-reduce, {count} pairs measured)")
    for node, rate in seen.slow.items():
        text = f"slow with every partner: {_rate(rate)} at best, {rate / seen.usual:.0%} of the usual"
        hint = f"{KEEP_OUT} its cable, adapter and link speed looked at."
        yield (problem if rate < pairwise.LIMITS[backend][1] * seen.usual else warning)(
            "bandwidth.slow", text, hint, node
        )
    for node in seen.dead:
        error = next((error for pair, error in errors.items() if node in pair), "")
        yield problem(
            "bandwidth.slow", f"no all-reduce with it worked: {error}", f"{KEEP_OUT} it looked at; {more}", node
        )
    if slow := [f"{a}-{b} {_rate(rate)}" for (a, b), rate in seen.paths.items() if rate is not None]:
        text = f"slow, though both ends are quick with others: {few(slow)}"
        yield warning("bandwidth.paths", text, "The way between them: a switch, or others' traffic. Measure again.")
    if broken := [f"{a}-{b} ({errors.get((a, b), '')})" for (a, b), rate in seen.paths.items() if rate is None]:
        text = f"all-reduce failed, though both ends work with others: {few(broken)}"
        yield problem("bandwidth.paths", text, "Measure again; if it stays, tell your administrators the pair.")


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s" if rate < 1e10 else f"{rate / 1e9:.0f} GB/s"


def _tera(rate: float) -> str:
    return f"{rate / 1e12:.0f} TFLOP/s"


def _nodes(count: int) -> str:
    return f"{count} node{'s' * (count != 1)}"
