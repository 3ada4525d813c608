"""The cluster as a run's driver sees it in the cluster directory: which nodes are how, who is head.

`look` gives every node with its state and how long it has been ready, by our own clock. Files are
read again only when they have changed: at two thousand nodes the table is large. No Ray in here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylaunch.host.ports import Ports
from raylaunch.state import files, records
from raylaunch.state.records import Head
from raylaunch.training.policy import TrainingNode


class _Cached:
    """A JSON file that is replaced now and then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self._value: Any = None

    def read(self) -> Any:
        try:
            stamp = _stamp(self._path)
        except FileNotFoundError:
            return self._value
        if stamp != self._stamp:
            self._value, self._stamp = files.read_json(self._path), stamp
        return self._value


def _stamp(path: Path) -> tuple[int, ...]:
    """By opening it: what is known of a name may be a minute old (see `fence`)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        stat = os.fstat(fd)
    finally:
        os.close(fd)
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


class ClusterView:
    """The nodes and the head, for the driver of one incarnation."""

    def __init__(self, directory: Path, incarnation: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.incarnation, self._clock = incarnation, clock
        self._members, self._head = _Cached(directory / records.MEMBERS_FILE), _Cached(directory / records.HEAD_FILE)
        self._duties = _Cached(directory / records.DUTIES_FILE)
        self._ready_since: dict[str, float] = {}

    def look(self) -> dict[str, TrainingNode]:
        """Every node, by name; {} while the table is an older head's."""
        table = self._members.read() or {}
        if int(table.get("incarnation", self.incarnation)) < self.incarnation:
            return {}
        now = self._clock()
        states = {str(row["name"]): str(row["state"]) for row in table.get("nodes", ())}
        for name in [n for n in self._ready_since if states.get(n) != "ready"]:
            del self._ready_since[name]
        found = {}
        for name, what in states.items():
            since = self._ready_since.setdefault(name, now) if what == "ready" else now
            found[name] = TrainingNode(what, now - since)
        return found

    def excluded(self) -> frozenset[str]:
        """Nodes that struck out: the run grows onto them no more."""
        return frozenset(map(str, (self._duties.read() or {}).get("excluded", ())))

    def fenced(self) -> bool:
        """Another head has been elected since: this driver is nobody's any more."""
        head = self._head.read()
        return head is not None and int(head["incarnation"]) > self.incarnation

    def end(self) -> float | None:
        """When the allocation ends (Unix), as far as the head knows."""
        table = self._members.read() or {}
        ours = int(table.get("incarnation", self.incarnation)) >= self.incarnation
        return table.get("ends") if ours else None

    def pulse_place(self) -> tuple[str, tuple[int, ...]]:
        """The head's address, and the ports of its block that are free for us to try."""
        value = self._head.read()
        if value is None:
            return "127.0.0.1", ()
        head = Head.parse(value)
        return head.address, tuple(Ports(head.control_port - 1).spare)
