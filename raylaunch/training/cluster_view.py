"""The cluster as a run's driver sees it in the cluster directory: which nodes are how, who is head.

`look` gives every node with its state and how long it has been ready, by our own clock. Files are
read again only when they have changed: at two thousand nodes the table is large. No Ray in here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from raylaunch.host.ports import Ports
from raylaunch.state import files, records
from raylaunch.state.members import Members
from raylaunch.state.records import Head
from raylaunch.training.policy import TrainingNode

T = TypeVar("T")


class _Cached(Generic[T]):
    """A JSON file that is replaced now and then; None while it is not there."""

    def __init__(self, path: Path, read: Callable[[], T | None]) -> None:
        self._path, self._read = path, read
        self._stamp: tuple[int, ...] | None = None
        self._value: T | None = None

    def read(self) -> T | None:
        try:
            stamp = _stamp(self._path)
        except FileNotFoundError:
            return self._value
        if stamp != self._stamp:
            self._value, self._stamp = self._read(), stamp
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
        self._members = _Cached(directory / records.MEMBERS_FILE, partial(Members.read, directory))
        self._head = _Cached(directory / records.HEAD_FILE, partial(Head.read, directory))
        duties = directory / records.DUTIES_FILE
        self._duties: _Cached[dict[str, Any]] = _Cached(duties, partial(files.read_json, duties))
        self._ready_since: dict[str, float] = {}

    def nodes(self) -> dict[str, TrainingNode]:
        """Every node, by name; {} while the table is an older head's."""
        table = self._ours()
        if table is None:
            return {}
        now = self._clock()
        states = {row.name: row.state for row in table.nodes}
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
        return head is not None and head.incarnation > self.incarnation

    def end(self) -> float | None:
        """When the allocation ends (Unix), as far as the head knows."""
        table = self._ours()
        return table.ends if table is not None else None

    def _ours(self) -> Members | None:
        table = self._members.read()
        older = table is not None and table.incarnation is not None and table.incarnation < self.incarnation
        return None if older else table

    def pulse_place(self) -> tuple[str, tuple[int, ...]]:
        """The head's address, and the ports of its block that are free for us to try."""
        head = self._head.read()
        if head is None:
            return "127.0.0.1", ()
        return head.address, tuple(Ports(head.control_port - 1).spare)
