"""Facts → text: the sentence and the figures at the top of a report, its rows on cost and software. Pure."""

from __future__ import annotations

from typing import Any

from raylaunch.observe.report import formatting
from raylaunch.observe.report.gather import ReportData
from raylaunch.text import plural

Pairs = list[tuple[str, str, str]]
"""(name, value, remark)."""


def steps(facts: ReportData) -> str:
    done = f"{facts.book.steps:,}"
    return f"{done} of {facts.max_steps:,}" if facts.max_steps and facts.max_steps >= facts.book.steps else done


def size(facts: ReportData) -> str:
    """The maximum size: `12 nodes, 96 workers`."""
    parts = [plural(facts.most_nodes, "node")] if facts.most_nodes else []
    parts += [plural(facts.most_workers, "worker")] if facts.most_workers else []
    return ", ".join(parts)


def sentence(facts: ReportData) -> str:
    """The outcome of the run, in one line."""
    how = {
        "finished": "Finished", "failed": "Failed", "stopped": "Stopped and saved", "interrupted": "Interrupted",
        "running": "Running", "holding": "Waiting for nodes", "queued": "Queued",
    }.get(facts.state, "Unknown state")  # fmt: skip
    took = formatting.duration(facts.axis.seconds)
    found = f"{how} {'for' if facts.live else 'after'} {took}"
    if size(facts):
        found += f" on up to {size(facts)}" if changed(facts) else f" on {size(facts)}"
    found += f". {steps(facts)} steps" if facts.book.steps else ""
    if facts.survived:
        found += f"; {plural(len(facts.survived), 'fault')} survived, {plural(facts.book.steps_lost, 'step')} repeated"
    return found + "."


def changed(facts: ReportData) -> bool:
    return len({a.workers for a in facts.history.attempts if a.steps}) > 1


def cards(facts: ReportData) -> Pairs:
    """The figures at the top."""
    book, cost = facts.book, facts.cost
    found: Pairs = []
    if book.steps:
        lost = formatting.duration(book.wall - book.parts["productive"])
        found.append(("goodput", formatting.percent(book.goodput), f"{lost} not productive"))
    found.append(("steps", f"{book.steps:,}", f"of {facts.max_steps:,}" if facts.max_steps else ""))
    if facts.loss is not None:
        val = facts.curves.last_val
        found.append(("loss", f"{facts.loss:.4g}", f"validation {val:.4g}" if val is not None else "at the last step"))
    if facts.rate is not None:
        kind, mean = facts.rate
        per = f"{formatting.amount(mean / facts.most_workers)} per worker" if facts.most_workers else ""
        found.append((f"{kind} per second", formatting.amount(mean), per))
    total = sum(r.total or 0.0 for r in facts.survived)
    mean_time = (
        f"{formatting.duration(total / len(facts.survived))} each on average" if facts.survived else "none occurred"
    )
    if len(facts.faults) > len(facts.survived):
        mean_time = f"of {len(facts.faults)}"
    found.append(("faults survived", f"{len(facts.survived):,}", mean_time))
    if cost.gpu_hours_held or cost.gpu_hours:
        held = cost.gpu_hours_held or cost.gpu_hours or 0.0
        found.append(("GPU-hours", formatting.hours(3600 * held), _money(facts) or _nodes(facts)))
    elif cost.node_hours is not None:
        found.append(("node-hours", formatting.hours(3600 * cost.node_hours), _money(facts)))
    return found


def _money(facts: ReportData) -> str:
    return formatting.money(facts.cost.money, facts.cost.currency) if facts.cost.money is not None else ""


def _nodes(facts: ReportData) -> str:
    return f"{formatting.hours(3600 * facts.cost.node_hours)} node-hours" if facts.cost.node_hours is not None else ""


def cost_rows(facts: ReportData) -> Pairs:
    """Cost and efficiency."""
    cost, unknown = facts.cost, "unknown"

    def hours(value: float | None) -> str:
        return formatting.hours(3600 * value) if value is not None else unknown

    rows: Pairs = [("node-hours", hours(cost.node_hours), "nodes in the cluster during the run")]
    no_gpus = bool(facts.gpus) and not any(facts.gpus.values())
    if no_gpus:
        rows.append(("GPU-hours", "none", "its nodes have no GPUs"))
    else:
        rows.append(("GPU-hours held", hours(cost.gpu_hours_held), "all GPUs of these nodes"))
        rows.append(("GPU-hours at work", hours(cost.gpu_hours), "workers of the attempts, one GPU each"))
    prices = [
        f"{price:g} {cost.currency} per {what}"
        for price, what in ((cost.gpu_hour, "GPU-hour"), (cost.node_hour, "node-hour"))
        if price is not None and not (no_gpus and what == "GPU-hour")
    ]
    if prices:
        rows.append(("money", _money(facts) or unknown, " and ".join(prices)))
    if cost.joules is not None:
        by = "from Slurm's accounting" if cost.energy_from == "accounting" else "from the nodes' meters"
        rows.append(("energy", formatting.energy(cost.joules), by))
    else:
        rows.append(("energy", unknown, ""))
    for name, share, remark in (
        ("CPU efficiency", cost.cpu_efficiency, "CPU time divided by allocated CPU time (sacct)"),
        ("memory efficiency", cost.memory_efficiency, "largest task divided by its node's allocation (sacct)"),
    ):
        if share is not None:
            rows.append((name, formatting.percent(share), remark))
    if cost.cpu_efficiency is None and cost.memory_efficiency is None:
        rows.append(("efficiency", unknown, cost.unknown or "it did not run in Slurm jobs"))
    return rows


def code_rows(facts: ReportData) -> Pairs:
    """Versions and the state of the code at the last submission, and earlier commits."""
    if not facts.hand_overs:
        return []
    last = facts.hand_overs[-1]
    rows: Pairs = [(str(name), str(value), "") for name, value in _dict(last.get("versions")).items()]
    git = _dict(last.get("git"))
    if git:
        dirty, changed = git.get("dirty"), git.get("changed")
        state = "clean" if dirty is False else "changes unknown"
        if dirty:
            state = f"with {plural(changed if isinstance(changed, int) else 0, 'changed file')}"
        branch = f"branch {git.get('branch')}, " if git.get("branch") else ""
        rows.append(("code", str(git.get("commit", ""))[:12], f"{branch}{state}, in {git.get('directory')}"))
    commits = list(dict.fromkeys(str(_dict(h.get("git")).get("commit", ""))[:12] for h in facts.hand_overs))
    if len(commits) > 1:
        rows.append(("earlier", ", ".join(filter(None, commits[:-1])) or "no commit", "at earlier submissions"))
    return rows


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
