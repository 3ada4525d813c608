"""The course of a run over time, as charts that share one axis: Facts → SVG. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from raylaunch.observe.history import node_hours
from raylaunch.observe.history.recoveries import Recovery
from raylaunch.observe.report import formatting, svg
from raylaunch.observe.report.axis import WIDTH
from raylaunch.observe.report.curves import Bucket
from raylaunch.observe.report.gather import ReportData
from raylaunch.observe.report.svg import Mark, Panel
from raylaunch.text import plural

COLUMNS = 500
"""Of the ribbon."""
HITS, DOTS, TOLD = 100, 80, 8
NEAR = 30.0
"""Marks closer than this, in units of the axis, share a number."""


def over_time(facts: ReportData) -> Markup:
    """Loss, throughput, workers and the use of time, with faults and resizes."""
    series = facts.curves.series
    panels = []
    loss, val = series["loss"].in_order(), series["val_loss"].in_order()
    if loss:
        high = [b.high for b in (*loss, *val)]
        to = svg.scale([*high, *(b.low for b in (*loss, *val))], 190, may_log=True)
        drawn = svg.curve(loss, to, "c-loss") + (svg.dots if len(val) <= DOTS else svg.curve)(val, to, "c-val")
        last = f"{facts.loss:.4g}" if facts.loss is not None else "NaN or infinite at the end"
        last += f", validation {facts.curves.last_val:.4g}" if val else ""
        panels.append(Panel("loss" + ", log scale" * to.log, 190, drawn, _ticks(to), "c-loss", last))
    rate = facts.rate
    if rate is not None:
        own = series[f"{rate[0]}_per_s"].in_order()
        to = svg.scale([b.high for b in own], 90, from_zero=True)
        note = f"mean {formatting.amount(rate[1])}"
        panels.append(
            Panel(f"{rate[0]} per second", 90, svg.curve(own, to, "c-rate", area=True), _ticks(to), "c-rate", note)
        )
    levels = _levels(facts)
    if levels:
        most = max(value for _, _, value in levels)
        to = svg.Scale(0.0, most * 1.12, 60)
        drawn = svg.steps([level for level in levels if level[2]], to, "c-workers")
        panels.append(Panel("workers", 60, drawn, [(to.y(most), f"{most:g}")], "c-workers", _sizes(facts)))
    parts = _ribbon(facts)
    if parts:
        panels.append(Panel("where the time went", 14, svg.ribbon(parts, 14), class_="c-plain"))
    label = f"Loss, throughput, workers and the use of time of run {facts.name}, with its faults and recoveries."
    return svg.timeline(panels, facts.axis, _marks(facts), _hits(facts, loss), label)


def _ticks(to: svg.Scale) -> list[tuple[float, str]]:
    return [(to.y(value), formatting.amount(round(value, 12))) for value in to.ticks() if to.y(value) > 12]


def _levels(facts: ReportData) -> list[tuple[float, float, float]]:
    """(from x, to x, workers)."""
    times = node_hours.spans(facts.history.attempts, facts.until)
    return [(facts.axis.x(start), facts.axis.x(end), float(a.workers)) for a, (start, end) in times]


def _sizes(facts: ReportData) -> str:
    sizes = [a.workers for a in facts.history.attempts if a.steps]
    return "" if not sizes else f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def _ribbon(facts: ReportData) -> list[tuple[float, float, str]]:
    """The main part of each column's time; equal neighbours are joined."""
    columns: list[dict[str, float]] = [{} for _ in range(COLUMNS)]
    width = WIDTH / COLUMNS
    for stretch in facts.stretches:
        low, high = facts.axis.x(stretch.start), facts.axis.x(stretch.end)
        if stretch.label == "idle" or high <= low:
            continue
        for index in range(int(low / width), min(COLUMNS - 1, int(high / width)) + 1):
            part = min(high, (index + 1) * width) - max(low, index * width)
            columns[index][stretch.label] = columns[index].get(stretch.label, 0.0) + part
    found: list[tuple[float, float, str]] = []
    for index, column in enumerate(columns):
        if not column:
            continue
        label = max(column, key=lambda name: column[name])
        if found and found[-1][2] == label and abs(found[-1][1] - index * width) < 1e-6:
            found[-1] = (found[-1][0], (index + 1) * width, label)
        else:
            found.append((index * width, (index + 1) * width, label))
    return found


def _marks(facts: ReportData) -> list[Mark]:
    """One line each; those that are too close share one, with their numbers as a range."""
    found: list[tuple[int, Mark]] = []
    last = -1e9
    for number, one in enumerate(facts.book.recoveries, 1):
        x = facts.axis.x(one.began)
        end = facts.axis.x(one.began + one.total) if one.total is not None else x
        kind = "resize" if one.kind == "resize" else "fault"
        told = f"{number}. {facts.named(one)}: {took(one)}, {plural(one.steps_lost, 'step')} repeated"
        if found and x - last < 1.0 and found[-1][1].class_ == kind:  # not distinguishable
            first, mark = found[-1]
            label = f"{first}-{number}" if mark.label else ""
            found[-1] = first, Mark(mark.x, max(mark.until, end), label, _joined(mark.text, told), kind)
            continue
        label = str(number) if not found or x - last >= NEAR else ""
        found.append((number, Mark(x, end, label, told, kind)))
        last = x
    return [mark for _, mark in found]


def _joined(before: str, text: str) -> str:
    """At most TOLD lines."""
    rows = [*before.split("\n"), text]
    return "\n".join(rows if len(rows) <= TOLD else [*rows[:TOLD], "…"])


def took(one: Recovery) -> str:
    if one.total is not None:
        return formatting.duration(one.total)
    return "the run ended" if one.final else "no step since"


def _hits(facts: ReportData, loss: Sequence[Bucket]) -> list[tuple[float, float, str]]:
    """Columns for the mouse pointer, with their values."""
    width = WIDTH / HITS
    found = []
    rate = facts.rate
    rates = facts.curves.series[f"{rate[0]}_per_s"].in_order() if rate else []
    for index in range(HITS):
        low, high = index * width, (index + 1) * width
        own = [b for b in loss if low <= b.x < high]
        said = []
        if own:
            moment = own[-1].time
            least, most = min(b.low for b in own), max(b.high for b in own)
            said = [f"step {own[-1].step:,}", f"loss {own[-1].last:.4g}"]
            said += [f"({least:.4g} to {most:.4g})"] if f"{least:.4g}" != f"{most:.4g}" else []
            passed = [b for b in rates if low <= b.x < high]
            if passed and rate:
                said.append(
                    f"{formatting.amount(sum(b.total for b in passed) / sum(b.count for b in passed))} {rate[0]}/s"
                )
            after = formatting.duration(facts.axis.elapsed(moment))
            found.append((low, high, f"{formatting.when(moment, seconds=True)}, after {after}\n{'  '.join(said)}"))
    return found


def utilisation(facts: ReportData) -> Markup | None:
    """One panel per known quantity."""
    panels = []
    for name, title, unit in (
        ("gpu", "GPU", "%"), ("gpu_memory", "GPU memory", "%"), ("cpu", "CPU", "%"), ("memory", "memory", "%"),
        ("watts", "power", "W"), ("temperature", "hottest GPU", "°C"),
    ):  # fmt: skip
        series = facts.load.get(name)
        if series is None or series.mean is None or series.most is None:
            continue
        own = series.in_order()
        if unit == "%":
            to = svg.Scale(0.0, 1.0, 44)
            ticks, note = [(to.y(0.5), "50 %")], f"mean {formatting.percent(series.mean)}"
        else:
            to = svg.scale([b.high for b in own], 44, from_zero=True)
            ticks = [(to.y(value), formatting.amount(value, unit)) for value in to.ticks()[1:2]]
            what = formatting.amount(series.most, unit)
            note = (
                f"maximum {what}"
                if name == "temperature"
                else f"mean {formatting.amount(series.mean, unit)}, maximum {what}"
            )
        panels.append(Panel(title, 44, svg.curve(own, to, f"c-{name}", area=True), ticks, f"c-{name}", note))
    if not panels:
        return None
    label = f"Utilisation of the cluster during run {facts.name}: means over its nodes."
    return svg.timeline(panels, facts.axis, _marks(facts), [], label, numbers=False)
