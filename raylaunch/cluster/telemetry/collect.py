"""The head's part: takes what the agents measure, and writes it into the cluster directory.

    load.json        the last figures of each node, every LATEST_EVERY seconds
    load.jsonl       a line for all nodes together, every ROW_EVERY seconds
    load-nodes.json  a short history of each node, every HISTORY_EVERY seconds

Three files, however many nodes there are. They are for people: a write that fails is logged, and not tried again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylaunch.checkpoint.events import Event
from raylaunch.cluster.telemetry.load_table import LoadTable
from raylaunch.errors import StateError
from raylaunch.state import files
from raylaunch.timing import LOAD_EVERY as LATEST_EVERY

LATEST_FILE, ROWS_FILE, HISTORY_FILE = "load.json", "load.jsonl", "load-nodes.json"
ROW_EVERY, HISTORY_EVERY = 30.0, 60.0
log = logging.getLogger(__name__)


def latest(directory: Path, canary: str) -> dict[str, dict[str, Any]]:
    """Node → its last figures, of this life of the cluster; {} where there are none yet."""
    value = files.read_json(directory / LATEST_FILE) or {}
    return dict(value["nodes"]) if value.get("canary") == canary else {}


class Collector:
    """`off_loop` does file work; `event` writes one line of the cluster's events; `nodes`: those alive."""

    def __init__(
        self, directory: Path, canary: str, off_loop: Callable[..., Any], event: Callable[[Event], None],
        nodes: Callable[[], list[str]],
    ) -> None:  # fmt: skip
        self._directory, self._canary, self._off_loop, self._event = directory, canary, off_loop, event
        self._nodes, self._table = nodes, LoadTable()

    def take(self, node: str, load: dict[str, Any]) -> None:
        """What an agent has measured; nothing, where that is no load."""
        try:
            found = self._table.take(node, load, time.time())
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            log.warning("a load that cannot be read node=%s error=%r", node, error)
            return
        for news in found:
            self._event(news)

    async def run(self) -> None:
        """Write, as long as this head reigns."""
        await self._off_loop(self._inherit)
        row_at = history_at = time.monotonic() + LATEST_EVERY
        while True:
            await asyncio.sleep(LATEST_EVERY)
            self._table.keep(self._nodes())
            if not self._table.latest:
                continue
            now, work = time.monotonic(), [(LATEST_FILE, self._table.latest)]
            if now >= history_at:
                history_at = now + HISTORY_EVERY
                work.append((HISTORY_FILE, self._table.histories()))
            row = self._table.row(time.time()) if now >= row_at else None
            if row is not None:
                row_at = now + ROW_EVERY
            await self._off_loop(self._write, work, row)

    def _inherit(self) -> None:
        """The histories of the head before this one."""
        try:
            before = files.read_json(self._directory / HISTORY_FILE) or {}
            if before.get("canary") == self._canary:
                self._table.inherit(before["nodes"])
        except (StateError, KeyError, TypeError) as error:
            log.warning("the load histories cannot be read error=%r", str(error))

    def _write(self, work: list[tuple[str, dict[str, Any]]], row: dict[str, Any] | None) -> None:
        try:
            for name, nodes in work:
                value = {"canary": self._canary, "time": round(time.time(), 1), "nodes": nodes}
                files.write_text(self._directory / name, json.dumps(value, separators=(",", ":")), durable=False)
            if row is not None:
                files.append_line(self._directory / ROWS_FILE, row)
        except StateError as error:
            log.warning("the load could not be written error=%r", str(error))
