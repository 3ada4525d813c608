"""Facts → the output of `raylaunch report --json`; docs/report.md describes its keys. Pure."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from raylaunch.observe.report import settings
from raylaunch.observe.report.curves import Series
from raylaunch.observe.report.gather import ReportData


def as_dict(facts: ReportData) -> dict[str, Any]:
    """Plain values; no NaN, no secrets."""
    book, cost, curves = facts.book, asdict(facts.cost), facts.curves
    joules = cost.pop("joules")
    shown = None if facts.config is None else settings.without_secrets(facts.config)
    found = {
        "run": facts.name,
        "state": facts.state,
        "reason": facts.reason,
        "cluster": facts.cluster,
        "directory": str(facts.directory),
        "began": facts.began,
        "until": facts.until,
        "live": facts.live,
        "seconds": facts.axis.seconds,
        "made": facts.made,
        "training": {
            "steps": book.steps,
            "max_steps": facts.max_steps,
            "loss": facts.loss,
            "val_loss": curves.last_val,
            "nonfinite": curves.nonfinite,
            "tokens": facts.tokens,
            "rate": None if facts.rate is None else {"unit": facts.rate[0], "per_second": facts.rate[1]},
            "step_seconds": book.step_seconds,
            "parameters": facts.parameters,
        },
        "goodput": book.goodput if book.steps else None,
        "ledger": {"wall": book.wall, "parts": book.parts, "saves": book.saves, "save_stall": book.save_stall},
        "steps_lost": book.steps_lost,
        "recoveries": [{"name": facts.named(r), **asdict(r)} for r in book.recoveries],
        "attempts": [
            {
                "attempt": a.number, "incarnation": a.run_incarnation, "workers": a.workers, "nodes": list(a.nodes),
                "began": a.started, "ended": a.ended, "how": a.how, "from_step": a.from_step,
            }
            for a in facts.history.attempts
        ],
        "nodes": [asdict(n) for n in facts.nodes],
        "curves": {name: _series(one) for name, one in curves.series.items() if one.buckets},
        "utilisation": {name: {"mean": one.mean, "most": one.most, "curve": _series(one)} for name, one in facts.load.items()},
        "cost": {**cost, "energy_kwh": joules / 3.6e6 if joules is not None else None},
        "code": facts.hand_overs,
        "config": shown,
        "unknown": facts.unknown,
    }  # fmt: skip
    plain: dict[str, Any] = _plain(found)
    return plain


def _series(one: Series) -> list[dict[str, float]]:
    """At most some hundred points: time of its first value, mean, minimum, maximum."""
    return [
        {"time": b.time, "step": b.step, "mean": round(b.mean, 6), "low": b.low, "high": b.high} for b in one.in_order()
    ]


def _plain(value: Any) -> Any:
    """Without values that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
