"""Facts → Markdown, readable also as plain text. Pure."""

from __future__ import annotations

from raylaunch.observe.report import formatting
from raylaunch.observe.report.gather import ReportData
from raylaunch.observe.report.summary import cards, code_rows, cost_rows, sentence
from raylaunch.observe.report.timeline_chart import took

MOST = 200
"""Rows of a table."""


def markdown(facts: ReportData) -> str:
    """The report as Markdown, readable also as plain text."""
    book = facts.book
    out = [f"# {facts.name}", "", sentence(facts), ""]
    if facts.reason:
        out += [f"> {_cell(formatting.clip(facts.reason, 300))}", ""]
    out += _table(["figure", "", ""], [[*row] for row in cards(facts)])
    out += ["## Where the time went", ""]
    out += _table(
        ["part", "time", "share", ""],
        [
            [
                formatting.PARTS[name][0],
                formatting.duration(seconds),
                formatting.percent(seconds / (book.wall or 1.0)),
                formatting.PARTS[name][2],
            ]
            for name in formatting.PARTS
            if (seconds := book.parts.get(name, 0.0)) > 1e-3
        ],
    )
    if book.recoveries:
        out += ["## Faults and resizes", ""]
        rows = [
            [
                str(number), formatting.when(r.began, seconds=True), facts.named(r), f"{r.workers[0]} → {r.workers[1]}",
                str(r.steps_lost), took(r),
            ]
            for number, r in enumerate(book.recoveries, 1)
        ]  # fmt: skip
        out += _table(["#", "time", "event", "workers", "steps repeated", "duration"], rows[:MOST])
        out += [f"and {len(rows) - MOST} more", ""] if len(rows) > MOST else []
    told = [n for n in facts.nodes if any(n.trouble)]
    if told:
        out += ["## Nodes with problems", ""]
        out += _table(
            ["node", "lost", "strikes", "drained", "last reason"],
            [
                [
                    n.name,
                    str(n.lost),
                    f"{n.strikes}{' (excluded)' * n.excluded}",
                    str(n.drained),
                    formatting.clip(n.reason, 80),
                ]
                for n in told[:MOST]
            ],
        )
    out += ["## Cost", "", *_table(["", "", ""], [[*row] for row in cost_rows(facts)])]
    if facts.hand_overs:
        out += ["## Software", "", *_table(["", "", ""], [[*row] for row in code_rows(facts)])]
    if facts.unknown:
        out += ["## Missing information", "", *(f"- {line}" for line in facts.unknown), ""]
    return "\n".join(out)


def _table(titles: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    return [*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows), ""]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
