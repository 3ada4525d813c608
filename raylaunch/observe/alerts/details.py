"""Details that the rows of an alert do not contain: the cost of a recovery, why a run failed, its result.

Reads the run directory, which may take a moment: the caller limits the time, and sends the alert without details if
this fails.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from raylaunch.observe.alerts.alert import Alert, lasting
from raylaunch.observe.history import goodput
from raylaunch.observe.why import run
from raylaunch.text import plural


def complete(alert: Alert, run_dir: Path) -> Alert:
    """The alert with the details that it asks for."""
    match alert.ask:
        case "recovery":
            return _recovery(alert, run_dir)
        case "verdict":
            return _verdict(alert, run_dir)
        case "result":
            return _result(alert, run_dir)
    return alert


def _recovery(alert: Alert, run_dir: Path) -> Alert:
    found = [r for r in goodput.of_run(run_dir, whole=False).recoveries if r.kind != "resize" and r.total is not None]
    if not found:
        return alert
    last = found[-1]
    before, after = last.workers
    size = f"with {after} workers" + (f" ({before} before)" if before != after else "")
    facts = {"seconds": last.total, "steps_lost": last.steps_lost, "node": last.node, "causes": list(last.causes)}
    return replace(
        alert, facts={**alert.facts, **facts},
        text=f"recovered: {lasting(last.total or 0.0)} and {plural(last.steps_lost, 'step')} lost; "
        f"continued from step {last.to_step} {size}\n{', '.join(last.causes)}: {alert.facts.get('cause', '')}",
    )  # fmt: skip


def _verdict(alert: Alert, run_dir: Path) -> Alert:
    failed = run.last_failure(run_dir)
    if failed is None:
        return alert
    found = run.explain(run_dir, failed)
    where = f", rank {found.rank}" if found.rank is not None else ""
    where += f" on {found.host}" if found.host is not None else ""
    facts = {"kind": found.kind, "cause": found.cause, "rank": found.rank, "host": found.host,
             "confidence": found.confidence, "action": found.action}  # fmt: skip
    return replace(
        alert, facts={**alert.facts, "verdict": facts},
        text=f"{alert.text}\n{found.kind}: {found.cause}{where} (confidence {found.confidence:.0%})\n{found.action}",
    )  # fmt: skip


def _result(alert: Alert, run_dir: Path) -> Alert:
    whole = goodput.of_run(run_dir, whole=False)
    faults = [r for r in whole.recoveries if r.kind != "resize"]
    loss = alert.facts.get("loss")
    parts = [f"loss {loss:.4f}"] if isinstance(loss, float) else []
    parts += [
        f"{lasting(whole.wall)} in total",
        f"{plural(len(faults), 'fault')} and {plural(whole.steps_lost, 'step')} lost",
    ]
    parts += [f"goodput {whole.goodput:.0%}"] if whole.steps else []
    facts = {"seconds": round(whole.wall, 1), "faults": len(faults), "goodput": round(whole.goodput, 4)}
    return replace(alert, facts={**alert.facts, **facts}, text=f"{alert.text}\n{', '.join(parts)}")
