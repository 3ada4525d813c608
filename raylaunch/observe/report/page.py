"""Facts → one self-contained HTML page: no scripts, fonts or network. Its size is bounded for any run.

The data of the charts are also in tables, for screen readers and for copying.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import jinja2

from raylaunch.observe.history.recoveries import Recovery
from raylaunch.observe.report import formatting, settings, summary, svg, timeline_chart
from raylaunch.observe.report.gather import ReportData

RECOVERIES, NODES = 120, 100
"""Rows of the tables; of more, the worst are shown."""
CONFIG = 60_000
"""Characters of the configuration."""


def render(facts: ReportData) -> str:
    """The page."""
    shown = {} if facts.config is None else settings.without_secrets(facts.config)
    return _template().render(
        f=facts,
        sentence=summary.sentence(facts),
        cards=summary.cards(facts),
        timeline=timeline_chart.over_time(facts),
        ledger=_ledger(facts),
        recoveries=_recoveries(facts),
        more_recoveries=max(0, len(facts.book.recoveries) - RECOVERIES),
        nodes=facts.nodes[:NODES],
        more_nodes=max(0, len(facts.nodes) - NODES),
        load=timeline_chart.utilisation(facts),
        cost=summary.cost_rows(facts),
        code=summary.code_rows(facts),
        differences=[(key, _value(value)) for key, value in sorted(settings.differences(shown).items())],
        config=settings.text(shown)[:CONFIG] if shown else "",
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "duration": formatting.duration, "percent": formatting.percent, "when": formatting.when, "clip": formatting.clip,
    }  # fmt: skip
    return environment.from_string(resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8"))


def _value(value: Any) -> str:
    return formatting.clip(str(value), 160)


# -- the rest -------------------------------------------------------------------------------------------------


def _ledger(facts: ReportData) -> dict[str, Any]:
    """Bars and legend; parts under a thousandth of a second are omitted."""
    parts = [(name, facts.book.parts.get(name, 0.0)) for name in formatting.PARTS]
    shown = [(name, seconds) for name, seconds in parts if seconds > 1e-3]
    wall = facts.book.wall or 1.0
    rows = [
        {"part": name, "name": formatting.PARTS[name][0], "what": formatting.PARTS[name][2], "seconds": seconds, "share": seconds / wall}
        for name, seconds in shown
    ]  # fmt: skip
    told = ", ".join(f"{row['name']} {formatting.percent(float(str(row['share'])))}" for row in rows)
    other = [(name, seconds) for name, seconds in shown if name != "productive"]
    lost = sum(seconds for _, seconds in other)
    return {
        "rows": rows,
        "bar": svg.bar([_piece(name, seconds, wall) for name, seconds in shown], 34, f"Share of the time: {told}."),
        "zoom": svg.bar([_piece(name, seconds, wall) for name, seconds in other], 18, "Time that was not productive."),
        "lost": lost,
        "lost_share": lost / wall,
    }


def _piece(name: str, seconds: float, wall: float) -> tuple[float, str, str]:
    return (
        seconds,
        name,
        f"{formatting.PARTS[name][0]}: {formatting.duration(seconds)}, {formatting.percent(seconds / wall)}",
    )


def _recoveries(facts: ReportData) -> list[dict[str, Any]]:
    """The recoveries, in order of time; if there are too many, the longest ones."""
    numbered = list(enumerate(facts.book.recoveries, 1))
    if len(numbered) > RECOVERIES:
        numbered = sorted(sorted(numbered, key=lambda n: -_weight(n[1]))[:RECOVERIES])
    longest = max((one.total or 0.0 for _, one in numbered), default=0.0) or 1.0
    rows = []
    for number, one in numbered:
        phases = [(name, seconds) for name, seconds in one.phases.items() if seconds > 0]
        pieces = [
            (seconds, _phase_class(name), f"{_phase_name(name)}: {formatting.duration(seconds)}")
            for name, seconds in phases
        ]
        told = ", ".join(
            f"{_phase_name(name)} {formatting.duration(seconds)}".replace(" ", "\u00a0")
            for name, seconds in phases
            if seconds >= 0.05
        )
        rows.append(
            {
                "number": number, "kind": "resize" if one.kind == "resize" else "fault", "name": facts.named(one),
                "when": formatting.when(one.began, seconds=True), "after": formatting.duration(facts.axis.elapsed(one.began)),
                "workers": f"{one.workers[0]} → {one.workers[1]}", "lost": one.steps_lost, "took": timeline_chart.took(one),
                "share": round(100 * (one.total or 0.0) / longest, 1), "bar": svg.bar(pieces, 10, told), "phases": told,
            }
        )  # fmt: skip
    return rows


def _weight(one: Recovery) -> float:
    return float("inf") if one.total is None else one.total + (1e6 if one.kind != "resize" else 0.0)


def _phase_class(name: str) -> str:
    return {"elect": "bring_up", "retry": "stop", "start": "decide"}.get(name, name)


def _phase_name(name: str) -> str:
    return formatting.PARTS[name][0] if name in formatting.PARTS else name
