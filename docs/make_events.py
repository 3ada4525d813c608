"""Write docs/events.md from the classes that declare the events; a test holds the two together."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from types import ModuleType

from make_configuration import field_notes

from raylaunch.checkpoint import events as checkpoint_events
from raylaunch.checkpoint.events import Event
from raylaunch.state import cluster_events, event_log, node_events, run_events

TARGET = Path(__file__).with_name("events.md")

COMMON = {
    "address": "The node's IP address.",
    "cause": "One word, such as `node_lost`, `worker_lost`, `hang`, `communication` or `hardware`.",
    "cluster": "The cluster's name.",
    "error": "The error's text.",
    "file": "A file name.",
    "hint": "What to do.",
    "incarnation": "The number of the head. Each election increases it.",
    "into": "A directory.",
    "job": "A Slurm job ID.",
    "line": "File, line and function.",
    "lock": "The path of the lock file.",
    "log": "The path of the log.",
    "node": "A node's name.",
    "nodes": "Number of nodes.",
    "phase": "`start`, `step`, `sync`, `load`, `validate` or `save`.",
    "rank": "A worker's rank.",
    "reason": "Why, in words.",
    "request": "The file's name.",
    "run": "The run's name.",
    "samples": "Samples per step.",
    "seconds": "How long it took.",
    "setting": "The configuration key that decides, with its value.",
    "state": "The run's state.",
    "status": "An exit status, negative for a signal.",
    "step": "A training step.",
    "text": "The message.",
    "thread": "The thread's name.",
    "to": "The directory of the exported weights.",
    "tracker": "The tracker's name.",
    "why": "Why, in words.",
    "workers": "Number of workers.",
}
"""Fields that mean the same in all kinds, unless a kind says something else."""
TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "None": "null"}


def kinds(module: ModuleType) -> list[type[Event]]:
    """Those that a module declares, in its order."""
    found = (each for each in vars(module).values() if inspect.isclass(each) and issubclass(each, Event))
    return [each for each in found if each is not Event and each.__module__ == module.__name__]


def meanings(kind: type[Event]) -> dict[str, str]:
    """Field → its docstring, or what it means in all kinds; "" for neither."""
    own = field_notes(kind)
    return {f.name: own.get(f.name) or COMMON.get(f.name, "") for f in dataclasses.fields(kind)}


def in_words(annotation: str) -> str:
    """A Python type as a reader of JSON knows it."""
    text = re.sub(r"dict\[.*\]", "object", annotation)
    text = re.sub(r"(?:list|tuple)\[(\w+)[^]]*\]", lambda m: f"array of {TYPES[m[1]]}s", text)
    return re.sub(r"\b(?:str|int|float|bool|None)\b", lambda m: TYPES[m[0]], text).replace(" | ", " or ")


def row(kind: type[Event]) -> str:
    notes = meanings(kind)
    fields = []
    for field in dataclasses.fields(kind):
        optional = field.default is None
        what = in_words(str(field.type))
        what = f"{what.removesuffix(' or null')}, optional" if optional else what
        fields.append(f"`{field.name}` ({what}): {notes[field.name]}")
    return f"| `{kind.kind}` | {' '.join(inspect.cleandoc(kind.__doc__ or '').split())} | {'<br>'.join(fields)} |"


def table(module: ModuleType) -> list[str]:
    return ["", "| kind | when | fields |", "| --- | --- | --- |", *map(row, kinds(module)), ""]


def text() -> str:
    former = [f"| `{old}` | `{new}` |" for old, new in event_log.FORMER.items()]
    lines = [
        "# Events", "",
        "raylaunch appends events to `events.jsonl`: one file in the directory of the cluster, one in that of the run. Each line",
        "is a JSON object with a `kind`, the Unix `time` in seconds, and the fields below. Terms such as head, attempt, joiner",
        "and strike are explained in [ARCHITECTURE.md](../ARCHITECTURE.md#terms); STATE is the state directory. This page is",
        "generated from the classes that declare the kinds, by `python docs/make_events.py`.", "",
        "- In a run's file, each event of an attempt has the attempt's number as `attempt`.",
        "- An event with `\"by\": \"watch\"` was written by `raylaunch watch` on a login node, instead of the head.",
        "- A field marked optional is left out where it does not apply.",
        "- A trainer of your own can add events with `Session.event`; choose kinds that are not listed here.", "",
        "## A run", "", "`STATE/runs/NAME/events.jsonl`",
        *table(run_events), "Checkpoints, in the same file:", *table(checkpoint_events),
        "## A cluster", "", "`STATE/clusters/NAME/events.jsonl`",
        *table(cluster_events), "Its nodes and jobs, in the same file:", *table(node_events),
        "`thread_died` and `internal_error` may be in either file.", "",
        "## Former names", "",
        "Earlier versions wrote these names. raylaunch still reads them; your own scripts must look for both.", "",
        "| former kind | kind |", "| --- | --- |", *former, "",
        "`attempt_started` had `incarnation` for `run_incarnation`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
