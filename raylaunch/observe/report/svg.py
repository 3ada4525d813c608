"""Small charts as inline SVG strings: curves over a shared time axis, bars. Pure.

Curves are nested <svg> elements that are stretched to the width of the page (preserveAspectRatio none, strokes that do
not scale); texts and marks are positioned in per cent. Therefore one chart fits a wide screen and a phone, and the size
of its text does not change. Colours are CSS classes of the page. All values are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from raylaunch.observe.report.axis import WIDTH, Axis
from raylaunch.observe.report.curves import BUCKETS, Bucket

TOP, GAP, BOTTOM = 26, 14, 24
"""Pixels: above the first panel (marks have their numbers there), between two, below the last one (times)."""
_TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000,
          864000, 1728000, 4320000, 8640000]  # fmt: skip


def tag(name: str, *inside: Markup | str, **attributes: object) -> Markup:
    """An element. Underscores in the names of attributes are dashes; `class_` is class."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    body = Markup("").join(escape(one) for one in inside)
    return Markup(f"<{name}{words}>{body}</{name}>") if body else Markup(f"<{name}{words}/>")


def hover(text: str) -> Markup:
    """The text shown at the mouse pointer."""
    return Markup(f"<title>{escape(text)}</title>")


# -- scales ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Values → pixels from the top of a panel of this height."""

    low: float
    high: float
    height: float
    log: bool = False

    def y(self, value: float) -> float:
        low, high, value = (self._bent(v) for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.height * (1.0 - min(1.0, max(0.0, share))), 1)

    def _bent(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.log else value

    def ticks(self) -> list[float]:
        """Two to five round values."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(decades) <= 4 else (1,)
            return [
                f * 10.0**e
                for e in decades[:: 1 + len(decades) // 6]
                for f in factors
                if self.low <= f * 10.0**e <= self.high
            ]
        step = nice((self.high - self.low) / 3.0)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, first + 6) if self.low <= n * step <= self.high * (1 + 1e-9)]


def scale(values: Sequence[float], height: float, from_zero: bool = False, may_log: bool = False) -> Scale:
    """A scale for all values, with a small margin."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if may_log and low > 0 and high / low > 3:
        room = (high / low) ** 0.06
        return Scale(low / room, high * room, height, log=True)
    if from_zero:
        low, high = min(0.0, low), high if high > 0 else 1.0
        return Scale(low, high * 1.08, height)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, height)


def nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    if step <= 0 or not math.isfinite(step):
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= step * (1 - 1e-9))


def time_ticks(seconds: float, about: int = 11) -> list[tuple[float, str]]:
    """(elapsed seconds, text)."""
    step = next((s for s in _TIMES if seconds / s <= about), nice(seconds / about / 86400.0) * 86400.0)
    return [(n * step, time_text(n * step, step)) for n in range(int(seconds / step) + 1)]


def time_text(elapsed: float, step: float) -> str:
    if elapsed == 0:
        return "0"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if step >= size:
            value = elapsed / size
            return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
    return f"{elapsed:.0f} s"


# -- panels ---------------------------------------------------------------------------------------------


@dataclass
class Panel:
    """One chart on the time axis: its title, its drawing (in WIDTH by height), its ticks."""

    title: str
    height: int
    drawing: Markup
    ticks: list[tuple[float, str]] = field(default_factory=list)
    """(pixels from the panel's top, text)."""
    class_: str = ""
    note: str = ""
    """Next to the title."""


@dataclass
class Mark:
    """An event: a line through all panels, and a band if it lasted long enough to be visible."""

    x: float
    until: float
    label: str
    text: str
    class_: str = "fault"


def curve(buckets: Sequence[Bucket], to: Scale, class_: str, area: bool = False) -> Markup:
    """The means as a line, in a band from minimum to maximum. A new attempt after a pause begins a new line."""
    width = WIDTH / BUCKETS
    parts: list[list[Bucket]] = []
    for one in buckets:
        before = parts[-1][-1] if parts else None
        if before is None or (one.attempt != before.attempt and one.x - before.x > 3 * width):
            parts.append([])
        parts[-1].append(one)
    lines, bands, areas = [], [], []
    for part in parts:
        points = [(_middle(b, width), to.y(b.mean)) for b in part]
        lines.append(_path(points))
        if len(part) > 1 and any(b.count > 1 for b in part):
            upper = [(x, to.y(b.high)) for (x, _), b in zip(points, part, strict=True)]
            lower = [(x, to.y(b.low)) for (x, _), b in zip(points, part, strict=True)]
            bands.append(_path([*upper, *reversed(lower)]) + "Z")
        if area:
            areas.append(_path([(points[0][0], to.height), *points, (points[-1][0], to.height)]) + "Z")
    drawn = [tag("path", class_=f"area {class_}", d="".join(areas))] if areas else []
    drawn += [tag("path", class_=f"band {class_}", d="".join(bands))] if bands else []
    drawn.append(tag("path", class_=f"line {class_}", d="".join(lines)))
    return Markup("").join(drawn)


def dots(buckets: Sequence[Bucket], to: Scale, class_: str) -> Markup:
    """Points of a size that does not scale; their last values."""
    if not buckets:
        return Markup("")
    return tag("path", class_=f"dots {class_}", d="".join(f"M{round(b.x, 1):g} {to.y(b.last):g}h0" for b in buckets))


def steps(levels: Sequence[tuple[float, float, float]], to: Scale, class_: str) -> Markup:
    """(from x, to x, value): filled, empty in between. Very narrow ones are drawn as a thin line."""
    words = []
    for start, end, value in levels:
        width = max(end - start, 0.4)
        words.append(f"M{start:.1f} {to.height:g}V{to.y(value):g}h{width:.1f}V{to.height:g}Z")
    return tag("path", class_=f"area solid {class_}", d="".join(words))


def ribbon(parts: Sequence[tuple[float, float, str]], height: int) -> Markup:
    """(from x, to x, class): one colour after the other."""
    return Markup("").join(
        tag("rect", x=f"{a:.1f}", y=0, width=f"{max(0.4, b - a):.1f}", height=height, class_=f"p-{c}")
        for a, b, c in parts
    )


def _middle(one: Bucket, width: float) -> float:
    return one.x if one.count == 1 else (math.floor(one.x / width) + 0.5) * width


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Through the points; a lone one is a dot."""
    if len(points) == 1:
        return f"M{points[0][0]:.1f} {points[0][1]:g}h0"
    return "M" + "L".join(f"{x:.1f} {y:g}" for x, y in points)


def timeline(
    panels: Sequence[Panel], axis: Axis, marks: Sequence[Mark] = (), hits: Sequence[tuple[float, float, str]] = (),
    label: str = "", numbers: bool = True,
) -> Markup:  # fmt: skip
    """The panels below each other. `hits`: (from x, to x, text) for the mouse; `label`: for screen readers."""
    top = TOP if numbers else 6
    total = top + sum(p.height + GAP + (18 if p.title else 0) for p in panels) - GAP
    found: list[Markup] = []
    texts: list[Markup] = []  # above everything else
    for x, text, minor in _times(axis):
        found.append(tag("line", x1=x, x2=x, y1=top, y2=total, class_="grid"))
        anchor = "start" if x == "0%" else "middle"
        class_ = "tick minor" if minor else "tick"
        found.append(tag("text", text, x=x, y=total + 17, class_=class_, text_anchor=anchor))
    for low, high, seconds in axis.cuts():
        text = f"{seconds / 3600:.1f} h until the next submission are omitted"
        found.append(
            tag("rect", hover(text), x=_per(low), width=_per(high - low), y=top, height=total - top, class_="cut")
        )
    found += [_band(mark, top, total) for mark in marks]
    at = top
    for panel in panels:
        if panel.title:
            note = tag("tspan", panel.note, class_="note", dx=8)
            texts.append(tag("text", panel.title, note, x=0, y=at + 12, class_=f"title {panel.class_}"))
            at += 18
        for y, _ in panel.ticks:
            found.append(tag("line", x1=0, x2="100%", y1=at + y, y2=at + y, class_="grid"))
        found.append(
            tag(
                "svg", panel.drawing, x=0, y=at, width="100%", height=panel.height,
                viewBox=f"0 0 {WIDTH:g} {panel.height}", preserveAspectRatio="none",
            )
        )  # fmt: skip
        texts += [
            tag("text", text, x="100%", y=at + y - 3, class_="tick y", text_anchor="end") for y, text in panel.ticks
        ]
        found.append(tag("line", x1=0, x2="100%", y1=at + panel.height, y2=at + panel.height, class_="base"))
        at += panel.height + GAP
    for low, high, text in hits:
        width = _per(high - low)
        found.append(tag("rect", hover(text), x=_per(low), width=width, y=top, height=total - top, class_="hit"))
    found += [_line(mark, top, total, numbers) for mark in marks]
    found += texts
    return tag(
        "svg", *found, class_="time", width="100%", height=total + BOTTOM, role="img", aria_label=label,
    )  # fmt: skip


def _times(axis: Axis) -> list[tuple[str, str, bool]]:
    found = []
    for index, (elapsed, text) in enumerate(time_ticks(axis.seconds)):
        x = axis.x(axis.moment(elapsed))
        if x <= 0.97 * WIDTH:
            found.append((_per(x), text, index % 2 == 1))
    return found


def _band(mark: Mark, top: int, total: int) -> Markup:
    if mark.until - mark.x < 1.0:
        return Markup("")
    return tag(
        "rect", x=_per(mark.x), width=_per(mark.until - mark.x), y=top, height=total - top, class_=f"span {mark.class_}"
    )


def _line(mark: Mark, top: int, total: int, numbers: bool) -> Markup:
    x = _per(mark.x)
    parts = [hover(mark.text), tag("line", x1=x, x2=x, y1=top - 6 if numbers else top, y2=total, class_="near")]
    parts.append(tag("line", x1=x, x2=x, y1=top - 6 if numbers else top, y2=total, class_="mark"))
    if numbers and mark.label:
        anchor = "start" if mark.x < 10 else "end" if mark.x > WIDTH - 10 else "middle"
        parts.append(tag("text", mark.label, x=x, y=top - 11, text_anchor=anchor))
    return tag("g", *parts, class_=f"event {mark.class_}")


def _per(x: float) -> str:
    return f"{100 * x / WIDTH:.2f}".rstrip("0").rstrip(".") + "%"


# -- bars -------------------------------------------------------------------------------------------------


def bar(parts: Sequence[tuple[float, str, str]], height: int, label: str = "") -> Markup:
    """(amount, class, text) side by side, over the whole width."""
    whole = sum(amount for amount, _, _ in parts) or 1.0
    at, found = 0.0, []
    for amount, class_, text in parts:
        x, width = _per(WIDTH * at / whole), _per(WIDTH * amount / whole)
        found.append(tag("rect", hover(text), x=x, y=0, width=width, height=height, class_=f"p-{class_}"))
        at += amount
    return tag("svg", *found, class_="bar", width="100%", height=height, role="img", aria_label=label)
