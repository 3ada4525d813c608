"""Facts → a paragraph that a person can paste into a paper's appendix. Pure."""

from __future__ import annotations

import statistics
from collections import Counter

from raylaunch.observe.report import formatting, settings
from raylaunch.observe.report.gather import ReportData
from raylaunch.observe.report.summary import changed, code_rows
from raylaunch.text import plural


def appendix(facts: ReportData) -> str:
    """Plain text to paste: hardware, time, size of the training, goodput, GPU-hours, faults, software. What is not known is
    left out."""
    book, cost, config = facts.book, facts.cost, facts.config
    found = []
    first, last = formatting.day(facts.began), formatting.day(facts.until)
    span = f"on {first}" if first == last else f"from {first} to {last}"
    found.append(f"Run {facts.name} was trained {span}{_hardware(facts)}.")
    if facts.parameters:
        found.append(f"The model has {formatting.large(facts.parameters)} trainable parameters.")
    if book.steps:
        batch = settings.at(config, "step_scheduler.global_batch_size")
        length = settings.at(config, "data.seq_len")
        each = f" of {batch:,} sequences" if isinstance(batch, int) else ""
        each += f" of {length:,} tokens" if each and isinstance(length, int) and facts.tokens else ""
        total = f" ({formatting.large(facts.tokens)} tokens)" if facts.tokens else ""
        rate = f" at {formatting.amount(facts.rate[1])} {facts.rate[0]} per second in the mean" if facts.rate else ""
        found.append(f"It did {book.steps:,} steps{each}{total} in {formatting.duration(book.wall)}{rate}.")
        share = formatting.percent(book.goodput).replace(" ", "")
        found.append(f"Goodput was {share}: the share of that time that went into steps which count.")
    held = [
        f"{formatting.hours(3600 * value)} {what}"
        for value, what in ((cost.gpu_hours_held or cost.gpu_hours, "GPU-hours"), (cost.node_hours, "node-hours"))
        if value
    ]
    if held:
        by = "accounting" if cost.energy_from == "accounting" else "the meters of its nodes"
        energy = f", {formatting.energy(cost.joules)} by {by}" if cost.joules else ""
        found.append(f"It held {' ('.join(held)}{')' if len(held) > 1 else ''}{energy}.")
    if facts.survived:
        kinds = Counter(r.causes[0] if r.causes else r.kind for r in facts.survived)
        listed = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in kinds.most_common(6))
        times = [r.total or 0.0 for r in facts.survived]
        found.append(
            f"It went on after {plural(len(facts.survived), 'fault')} ({listed}), each within "
            f"{formatting.duration(max(times))} (median {formatting.duration(statistics.median(times))}); "
            f"{plural(book.steps_lost, 'step')} had to be repeated."
        )
    else:
        found.append("No fault occurred." if not facts.faults else "")
    resizes = len(facts.book.recoveries) - len(facts.faults)
    if resizes:
        found.append(f"It changed its size {'once' if resizes == 1 else f'{resizes:,} times'}.")
    software = code_rows(facts)
    if software:
        versions = ", ".join(f"{name} {value}" for name, value, _ in software if name not in {"code", "before"})
        commits = [
            f"; code at commit {value} ({remark.split(', in ')[0]})"
            for name, value, remark in software
            if name == "code"
        ]
        found.append(f"Software: {versions}{''.join(commits)}.")
    return " ".join(filter(None, found))


def _hardware(facts: ReportData) -> str:
    """` on up to 12 nodes of 8 H100 GPUs, 104 CPUs and 1.97 TiB each`."""
    if not facts.most_nodes:
        return ""
    known = [n for n in facts.nodes if n.cpus]
    has = []
    gpus = max(facts.gpus.values(), default=0)
    if gpus:
        has.append(plural(gpus, f"{facts.gpu_type} GPU".strip()))
    if known:
        cpus, memory = max(n.cpus or 0 for n in known), max(n.memory or 0 for n in known)
        has += [plural(cpus, "CPU")] + ([f"{formatting.memory(memory)} of memory"] if memory else [])
    up_to = "up to " if changed(facts) else ""
    each = f" with {', '.join(has[:-1])}{' and ' if len(has) > 1 else ''}{has[-1]} each" if has else ""
    return f" on {up_to}{plural(facts.most_nodes, 'node')}{each}"
