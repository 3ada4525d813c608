"""What a campaign found, as a record and as a table. Pure but for the reading of the run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raylaunch.config import loader
from raylaunch.errors import RaylaunchError
from raylaunch.observe.history import goodput, step_audit
from raylaunch.observe.history.recoveries import PHASES, Recovery
from raylaunch.state import event_log, files, records
from raylaunch.tools.chaos.campaign import FaultOutcome


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def of(run_dir: Path, outcomes: Sequence[FaultOutcome], began: float, ended: float, seed: int) -> dict[str, Any]:
    """The campaign's record: what `--json` writes."""
    book = goodput.of_run(run_dir, window=(began, ended))
    answered = {seq: r for r in book.recoveries for seq in r.injected}
    steps = step_audit.verify_steps(
        files.read_lines(run_dir / files.METRICS_FILE), event_log.read_all(run_dir), _every(run_dir)
    )
    rows = [_row(kind, [o for o in outcomes if o.kind == kind], answered) for kind in _kinds(outcomes)]
    done = [r for r in book.recoveries if r.total is not None and r.kind != "resize"]
    return {
        "run": run_dir.name,
        "seed": seed,
        "began": began,
        "ended": ended,
        "faults": rows,
        "all": _row("all", list(outcomes), answered),
        "goodput": book.goodput,
        "wall": book.wall,
        "parts": book.parts,
        "phases": {p: statistics.mean(r.phases.get(p, 0.0) for r in done) for p in PHASES} if done else {},
        "resizes": len([r for r in book.recoveries if r.kind == "resize"]),
        "steps": steps.as_dict(),
        "outcomes": [asdict(o) for o in outcomes],
        "recoveries": [asdict(r) for r in book.recoveries],
    }


def _every(run_dir: Path) -> int:
    try:
        return loader.load_resolved(run_dir / records.CONFIG_FILE).logging.log_every_steps
    except (RaylaunchError, OSError):  # of another version: then each step is expected
        return 1


def _kinds(outcomes: Sequence[FaultOutcome]) -> list[str]:
    return list(dict.fromkeys(o.kind for o in outcomes if not o.skipped))


def _row(kind: str, outcomes: Sequence[FaultOutcome], answered: dict[int, Recovery]) -> dict[str, Any]:
    real = [o for o in outcomes if not o.skipped]
    own = [answered[o.seq] for o in real if o.seq in answered]
    totals = [r.total for r in own if r.total is not None]
    detected = [r.detect for r in own if r.detect is not None]
    return {
        "kind": kind,
        "count": len(real),
        "recovered": sum(o.recovered for o in real),
        "restarted": sum(o.restarted for o in real),
        "detect_median": statistics.median(detected) if detected else None,
        "recovery_median": statistics.median(totals) if totals else None,
        "recovery_p95": percentile(totals, 0.95) if totals else None,
        "recovery_worst": max(totals, default=None),
        "steps_lost": sum(r.steps_lost for r in own),
    }


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    heads = ("fault", "count", "recovered", "restarts", "detect", "median", "p95", "worst", "steps lost")
    keys = ("kind", "count", "recovered", "restarted", "detect_median", "recovery_median", "recovery_p95",
            "recovery_worst", "steps_lost")  # fmt: skip
    rows = [heads, *(tuple(_cell(row[key]) for key in keys) for row in [*record["faults"], record["all"]])]
    lines = columns(rows)
    phases = ", ".join(f"{name} {value:.2f}" for name, value in record["phases"].items() if value >= 0.005)
    parts = sorted(record["parts"].items(), key=lambda item: -item[1])
    shares = ", ".join(
        f"{name} {value / record['wall']:.1%}" for name, value in parts if value > 0.0005 * record["wall"]
    )
    steps = record["steps"]
    exactly = "each exactly once" if steps["ok"] else "NOT EXACT"
    skipped = [o for o in record["outcomes"] if o["skipped"]]
    lines += [
        "",
        f"goodput {record['goodput']:.1%} of {record['wall']:.0f} s: {shares}" if record["wall"] else "no time passed",
        f"a recovery, on average: {phases or '-'} s",
        f"steps 1 to {steps['steps']}: {exactly}; lost {len(steps['missing'])}, repeated "
        f"{len(steps['repeated']) + len(steps['twice'])}, not logged {len(steps['unlogged'])}, stale {steps['stale']}",
        *(f"left out: {o['seq']} {o['kind']}: {o['skipped']}" for o in skipped),
        *(f"FAILED: {o['seq']} {o['kind']} {o['target']}: {o['why']}" for o in record["outcomes"] if o["why"]),
    ]
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.2f} s" if isinstance(value, float) else str(value)
