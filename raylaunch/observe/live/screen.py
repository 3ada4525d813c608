"""A Picture → lines of a terminal: the main view, or one of the others. Pure.

Everything fits: wide lines are truncated, and only as many nodes and events are shown as there is room for, the worst
and the newest first.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rich.text import Text

from raylaunch.host import internal_errors
from raylaunch.observe.live import braille_plot
from raylaunch.observe.live.snapshot import Picture
from raylaunch.text import plural

VIEWS = {"m": "main", "n": "nodes", "e": "events", "l": "logs"}
TWO_COLUMNS = 100
OLD = 15.0
"""Seconds after which a picture is marked as old."""
_BAD = {"lost", "failed"}
_COLOURS = {
    "ready": "green",
    "lost": "red",
    "failed": "red",
    "starting": "yellow",
    "restarting": "yellow",
    "draining": "yellow",
}
_LOUD = {"fault": "red", "node_lost": "red", "failed": "red", "hang": "red", "oom_kill": "red", "gpu_trouble": "red",
         "driver_lost": "red", "node_strike": "yellow", "election": "yellow", "termination_notice": "yellow", "commit": "green",
         "finished": "green", "first_step": "green"}  # fmt: skip
Line = Text


def lines(
    picture: Picture, view: str, width: int, height: int, logs: Sequence[tuple[str, list[str]]] = (), age: float = 0.0
) -> list[Line]:
    """At most `height` lines of at most `width` characters; `view`: a value of VIEWS; `age`: the picture's, in seconds."""
    head = _head(picture)
    if age > OLD:
        head.append(Text(f"as of {duration(age)} ago: the state directory does not respond", "red"))
    room = height - len(head) - 1
    match view:
        case "nodes":
            body = _nodes(picture, room)
        case "events":
            body = _events(picture, room)
        case "logs":
            body = _logs(logs, room)
        case _:
            body = _main(picture, width, room)
    found = [*head, *body[:room]]
    found += [Text()] * (height - 1 - len(found))
    found.append(_keys(view))
    for line in found:
        line.truncate(width, overflow="ellipsis")
    return found[:height]


def _keys(view: str) -> Line:
    words = [Text(name, "reverse" if name == view else "") for name in VIEWS.values()]
    return Text("  ", "dim").join([*words, Text("quit", "dim")])


def _head(picture: Picture) -> list[Line]:
    parts = [Text(picture.cluster, "bold"), Text(picture.state or "not started yet")]
    for job in picture.jobs:
        left = f", {duration(job.time_left)} left" if job.time_left is not None else ""
        parts.append(Text(f"job {job.id} {job.state}{left}"))
    found = [Text("  ").join(parts)]
    if picture.cannot_submit:
        found.append(
            Text(f"compute nodes may not submit jobs; this command submits them ({picture.cannot_submit})", "yellow")
        )
    found += [Text(internal_errors.line(work, error), "red") for work, error in picture.internal_errors.items()]
    run, points = picture.run, picture.points
    if run is None:
        return [*found, Text("no run", "dim")]
    words = [Text(run.name, "bold"), Text(run.state, _COLOURS.get(run.state, "")), Text(f"attempt {run.attempt}")]
    if run.world_size:
        workers = plural(run.world_size, "worker")
        words.append(Text(f"{workers} on {plural(run.nodes, 'node')}" if run.nodes else workers))
    words += [Text(run.reason, "dim")] if run.reason else []
    found.append(Text("  ").join(words))
    if not points:
        return found
    last = points[-1]
    ends = f", {duration((picture.max_steps - last.step) * picture.step_seconds)} to go" if picture.step_seconds else ""
    share = last.step / picture.max_steps if picture.max_steps else 0.0
    pace = f"{picture.step_seconds:.3g} s per step" if picture.step_seconds else ""
    found.append(
        Text("  ").join(
            [Text(f"step {last.step} of {picture.max_steps}"), bar(share, 20), Text(f"{share:.0%}{ends}"), Text(pace)]
        )
    )
    figures = [
        f"loss {last.loss:.4f}" if 0.01 <= abs(last.loss) < 1e4 else f"loss {last.loss:.4g}",
        f"{count(last.rate)} {picture.unit}/s",
    ]
    if run.state == "running" and picture.step_seconds:
        figures.append(
            f"saves at {picture.next_save}, in {duration((picture.next_save - last.step) * picture.step_seconds)}"
        )
        quiet = picture.time - last.time
        if quiet > max(10.0, 5 * picture.step_seconds):
            figures.append(f"no step for {duration(quiet)}")
    if picture.ledger.get("goodput") is not None:
        figures.append(f"goodput {picture.ledger['goodput']:.0%}")
    if picture.ledger.get("recoveries"):
        figures.append(
            f"{plural(picture.ledger['recoveries'], 'recovery')}, {plural(picture.ledger['steps_lost'], 'step')} lost"
        )
    return [*found, Text("  ".join(figures))]


def _main(picture: Picture, width: int, room: int) -> list[Line]:
    found: list[Line] = []
    tall = min(8, max(0, (room - 8) // (1 if width >= TWO_COLUMNS else 2) - 2))
    if picture.points and tall >= 2:
        found += [Text(), *_curves(picture, width, tall)]
    found += [Text(), *_load(picture)]
    worst = [node for node in ranked(picture.nodes) if _trouble(node)][: max(0, min(5, room - len(found) - 3))]
    if worst:
        found += [_node(node) for node in worst]
    return [*found, Text(), *_events(picture, room - len(found) - 1)]


def _curves(picture: Picture, width: int, tall: int) -> list[Line]:
    steps, times = [float(p.step) for p in picture.points], [p.time for p in picture.points]
    asked: list[tuple[str, Sequence[float], Sequence[float], Callable[[float], str], str]] = [
        ("loss by step", steps, [p.loss for p in picture.points], lambda v: f"{v:.4g}", "cyan"),
        (f"{picture.unit}/s by time", times, [p.rate for p in picture.points], count, "green"),
    ]
    if len({p.workers for p in picture.points}) > 1:
        asked.append(("workers by time", times, [float(p.workers) for p in picture.points], count, "magenta"))
    if width < TWO_COLUMNS:
        return [line for one in asked[:2] for line in _curve(*one, width, tall)]
    columns = [_curve(*one, width // len(asked) - 2, tall) for one in asked]
    found = []
    for row in zip(*columns, strict=True):
        for cell in row:
            cell.pad_right(width // len(asked) - cell.cell_len)
        found.append(Text().join(row))
    return found


def _curve(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float],
    shown: Callable[[float], str],
    colour: str,
    width: int,
    tall: int,
) -> list[Line]:
    rows, low, high = braille_plot.curve(xs, ys, max(1, width - 9), tall)
    if math.isnan(low):
        return [Text(title, "dim"), *(Text() for _ in rows)]
    found = [Text(title, "dim")]
    for index, row in enumerate(rows):
        label = shown(high) if index == 0 else shown(low) if index == tall - 1 else ""
        found.append(Text.assemble((f"{label:>8} ", "dim"), (row, colour)))
    return found


def _load(picture: Picture) -> list[Line]:
    states = Counter(str(node["state"]) for node in picture.nodes)
    words: list[Text | tuple[str, str]] = []
    for name, total in states.most_common():
        words += [(f"{total} {name}", _COLOURS.get(name, "")), ("  ", "")]
    fresh = [node["load"] for node in picture.nodes if node["load"] and node["state"] not in _BAD]
    for key, title in (("cpu", "CPU"), ("memory", "memory"), ("gpu", "GPU"), ("gpu_memory", "GPU memory")):
        known = [row[key] for row in fresh if key in row]
        if known:
            mean = sum(known) / len(known)
            words += [(f"{title} ", "dim"), bar(mean, 8), (f" {mean:.0%}  ", "")]
    watts = sum(row.get("watts", 0) for row in fresh)
    hottest = max((row["temperature"] for row in fresh if "temperature" in row), default=None)
    words += [(f"{watts / 1000:.1f} kW  ", "")] if watts else []
    words += [(f"hottest GPU {hottest} °C", "")] if hottest is not None else []
    return [Text.assemble(*words)] if words else []


def _nodes(picture: Picture, room: int) -> list[Line]:
    shown = ranked(picture.nodes)[: room - 2]
    more = len(picture.nodes) - len(shown)
    title = Text(f"{'node':<20} {'state':<11}{'CPU':>5}{'mem':>6}{'GPU':>6}{'mem':>6}{'W':>7}{'°C':>5}", "dim")
    return [title, *map(_node, shown), *([Text(f"and {more} more in a better state", "dim")] if more else [])]


def _node(node: dict[str, Any]) -> Line:
    load = node["load"]

    def share(key: str) -> str:
        return f"{load[key]:.0%}" if key in load else "-"

    state = str(node["state"])
    name = f"{node['name']}{'*' if node['role'] == 'head' else ''}"
    line = Text.assemble(f"{name:<20.20} ", (f"{state:<11}", _COLOURS.get(state, "")))
    if state in _BAD:
        return line.append(f"  {_trouble(node)}".rstrip(), "red")
    line.append(
        f"{share('cpu'):>5}{share('memory'):>6}{share('gpu'):>6}{share('gpu_memory'):>6}"
        f"{load.get('watts', '-'):>7}{load.get('temperature', '-'):>5}"
    )
    return line.append(f"  {_trouble(node)}", "red") if _trouble(node) else line


def _trouble(node: dict[str, Any]) -> str:
    load, found = node["load"], []
    if node["state"] in _BAD:
        found.append(str(node.get("error") or ""))
    found += [load["throttled"]] if load.get("throttled") else []
    found += [f"{load['ecc_errors']} ECC errors"] if load.get("ecc_errors") else []
    found += [f"{load['oom_kills']} OOM kills"] if load.get("oom_kills") else []
    found += [plural(node["strikes"], "strike")] if node["strikes"] else []
    return ", ".join(filter(None, found))


def ranked(nodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst first: lost, with problems, not ready, then the least busy GPUs."""

    def key(node: dict[str, Any]) -> tuple[Any, ...]:
        load = node["load"]
        return (node["state"] not in _BAD, not _trouble(node), node["state"] == "ready", load.get("gpu", 1.0),
                -load.get("memory", 0.0), str(node["name"]))  # fmt: skip

    return sorted(nodes, key=key)


def _events(picture: Picture, room: int) -> list[Line]:
    found = []
    for moment, kind, words in reversed(picture.events[-max(0, room) :] if room > 0 else ()):
        clock = time.strftime("%H:%M:%S", time.localtime(moment))
        found.append(Text.assemble((f"{clock} ", "dim"), (kind, _LOUD.get(kind, "bold")), f" {words}"))
    return found


def _logs(logs: Sequence[tuple[str, list[str]]], room: int) -> list[Line]:
    if not logs:
        return [Text("no logs yet", "dim")]
    each = max(1, room // len(logs) - 1)
    found: list[Line] = []
    for name, rows in logs:
        found += [Text(name, "dim"), *(Text(row.expandtabs()) for row in rows[-each:])]
    return found


def bar(share: float, width: int) -> Text:
    """A share of 0 to 1."""
    full = round(min(1.0, max(0.0, share)) * width)
    return Text.assemble(("█" * full, "green"), ("░" * (width - full), "dim"))


def duration(seconds: float) -> str:
    """At most two units: `3d 4h`, `2h 05m`, `1m 20s`, `12s`."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {whole % 60:02}s" if minutes else f"{whole}s"


def count(value: float) -> str:
    """A number in about four characters: 950, 12.3k, 4.56M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
