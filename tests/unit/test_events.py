"""events.jsonl: the kinds that are declared are those that readers look for, and former ones are read by their new names."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from test_pages import page

import raylaunch
from raylaunch.checkpoint.events import Committed, Event
from raylaunch.observe.history import safe_read
from raylaunch.state import event_log, files
from raylaunch.state.event_log import EventReader
from raylaunch.state.node_events import NodeStrike
from raylaunch.state.run_events import AttemptAborted

made = page("events")
KINDS = [
    kind
    for module in (made.run_events, made.checkpoint_events, made.cluster_events, made.node_events)
    for kind in made.kinds(module)
]
PACKAGE = Path(raylaunch.__file__).parent


def literals(node: ast.AST) -> Iterator[str]:
    yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def is_kind(node: ast.AST) -> bool:
    """row["kind"], row.get("kind")."""
    match node:
        case ast.Subscript(slice=ast.Constant(value="kind")):
            return True
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value="kind"), *_]):
            return True
    return False


def looked_for(path: Path) -> Iterator[str]:
    """The kinds that a module compares a row's with."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Compare(left=left, comparators=others) if is_kind(left):
                for other in others:
                    yield from literals(other)
            case ast.Match(subject=subject, cases=cases) if is_kind(subject):
                for case in cases:
                    yield from literals(case.pattern)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="event_log"), attr="read"), args=[_, *kinds]):
                for kind in kinds:
                    yield from literals(kind)


def test_kinds_have_their_names_alone() -> None:
    names = [kind.kind for kind in KINDS]
    assert len(set(names)) == len(names) > 70 and not set(names) & set(event_log.FORMER)
    assert set(event_log.FORMER.values()) <= set(names)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.kind))
def test_a_kind_says_when_and_what_its_fields_mean(kind: type[Event]) -> None:
    assert str(kind.__doc__).endswith(".") and not str(kind.__doc__).startswith(f"{kind.__name__}(")  # dataclass's own
    assert not [name for name, text in made.meanings(kind).items() if not text.endswith(".")]
    assert {"time", "kind", "attempt", "by"}.isdisjoint(f.name for f in fields(kind))


def test_readers_look_for_kinds_that_are_written() -> None:
    """A comparison with a kind that nobody writes would be silent. (`kind` of a request is another.)"""
    rooms = [PACKAGE / room for room in ("observe", "tools", "training", "state", "cli")]
    found = {kind for room in rooms for path in room.rglob("*.py") for kind in looked_for(path)}
    assert len(found) > 30
    assert found <= {kind.kind for kind in KINDS}


def test_an_event_is_a_line(tmp_path: Path) -> None:
    event_log.append(tmp_path, Committed(5, 0.5), attempt=2)
    event_log.append(tmp_path, AttemptAborted(1.0))  # an optional field is left out
    rows = [json.loads(line) for line in (tmp_path / files.EVENTS_FILE).read_text().splitlines()]
    assert [list(row) for row in rows] == [["time", "kind", "attempt", "step", "seconds"], ["time", "kind", "seconds"]]
    assert event_log.read(tmp_path, "commit") == rows[:1] and event_log.read_all(tmp_path) == rows


def test_former_kinds_are_read_by_their_new_names(tmp_path: Path) -> None:
    event_log.write(tmp_path, "strike", node="a", count=1, reason="lost")
    event_log.append(tmp_path, NodeStrike("b", 2, "lost"))
    event_log.write(tmp_path, "attempt_started", incarnation=3, workers=2)
    nodes = [row["node"] for row in event_log.read(tmp_path, "node_strike")]
    assert nodes == ["a", "b"] == [row["node"] for row in event_log.read_all(tmp_path) if row["kind"] == "node_strike"]
    (started,) = event_log.read(tmp_path, "attempt_started")
    assert started["run_incarnation"] == 3 and "incarnation" not in started
    assert EventReader(tmp_path).read() == event_log.read_all(tmp_path)
    sound = safe_read.sound({"time": 1.0, "kind": "down", "clean": True})
    assert sound is not None and sound["kind"] == "cluster_down"


@pytest.mark.parametrize("row", [None, 3, [], {}, {"kind": 3}, {"kind": ["head"]}, {"kind": "mine"}])
def test_what_is_no_event_of_ours_stays_as_it_is(row: object) -> None:
    assert event_log.current(row) == row
