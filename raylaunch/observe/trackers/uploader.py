"""The process next to a run's driver that reads metrics.jsonl as it grows, and forwards it to trackers.

    python -m raylaunch.observe.trackers.uploader RUN_DIR        ends after its stdin, once everything is forwarded

It is not part of a training worker: outages, imports and threads of a tracker do not affect the training. The position
of each sink is stored in RUN_DIR/tracking.json: the next process, after a fault, continues from there, and a line is
forwarded at least once. A sink that fails is reported as an event, and retried.
"""

from __future__ import annotations

import contextlib
import json
import select
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import StateError
from raylaunch.host import processes
from raylaunch.observe.trackers import sinks
from raylaunch.observe.trackers.sinks import Sink
from raylaunch.state import event_log, files, records
from raylaunch.state.run_events import TrackingFailed

PAUSE = 1.0
"""Seconds between two reads of the file."""
LONGEST_RETRY = 300.0
"""Maximum seconds between two tries of a failing sink; the first pause is PAUSE, each next one twice as long."""
AT_ONCE = 1 << 20
"""Bytes that are read at a time."""
MEMORY = "tracking.json"


@dataclass
class Feed:
    """One sink and its position: `offset` bytes of metrics.jsonl."""

    name: str
    offset: int
    memory: dict[str, Any]
    sink: Sink | None = None
    pause: float = PAUSE
    retry_at: float = 0.0


class MetricsUploader:
    """Forwards the metrics of one run to its sinks."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        self._run_dir, self._config = run_dir, config
        known = files.read_json(run_dir / MEMORY) or {}
        self._feeds = [
            Feed(name, int(known.get(name, {}).get("offset", 0)), known.get(name, {}).get("memory", {}))
            for name in config.trackers
        ]

    def step(self) -> bool:
        """Forward new lines; returns whether there may be more."""
        more = False
        for feed in self._feeds:
            if time.monotonic() < feed.retry_at:
                continue
            before = feed.offset
            try:
                more |= self._pass_on(feed)
                feed.pause = PAUSE
            except Exception as error:  # noqa: BLE001  whatever a tracker raises: the others and the run continue
                self._failed(feed, error)
            if feed.offset != before:
                self._remember()
        return more

    def close(self) -> None:
        """Forward the last lines, and close the sinks."""
        while self.step():
            continue
        for feed in self._feeds:
            if feed.sink is not None:
                try:
                    feed.sink.close()
                except Exception as error:  # noqa: BLE001
                    self._failed(feed, error)

    def _pass_on(self, feed: Feed) -> bool:
        text, full = _lines(self._run_dir / files.METRICS_FILE, feed.offset)
        if not text:
            return False
        if feed.sink is None:
            feed.sink = sinks.open_sink(feed.name, self._config, self._run_dir, feed.memory)
            feed.memory = feed.sink.memory
            self._remember()
        for line in text.splitlines():
            row = json.loads(line)
            if "step" in row:
                feed.sink.write(int(row["step"]), float(row["time"]), _numbers(row))
        feed.sink.flush()
        feed.offset += len(text)
        return full

    def _failed(self, feed: Feed, error: Exception) -> None:
        print(f"tracking: {feed.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if feed.pause == PAUSE:  # once, until it works again
            with contextlib.suppress(StateError):
                why = f"{type(error).__name__}: {error}"[:300]
                event_log.append(self._run_dir, TrackingFailed(feed.name, why))
        feed.sink, feed.retry_at = None, time.monotonic() + feed.pause
        feed.pause = min(LONGEST_RETRY, 2 * feed.pause)

    def _remember(self) -> None:
        record = {feed.name: {"offset": feed.offset, "memory": feed.memory} for feed in self._feeds}
        try:
            files.write_json(self._run_dir / MEMORY, record)
        except StateError as error:
            print(f"tracking: {error.message}", file=sys.stderr, flush=True)


def _lines(path: Path, offset: int) -> tuple[bytes, bool]:
    """Complete lines from there, and whether there may be more."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            text = file.read(AT_ONCE)
    except OSError:  # does not exist yet, or is not readable at the moment
        return b"", False
    return text[: text.rfind(b"\n") + 1], len(text) == AT_ONCE


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a line, without texts other than NaN and infinity."""
    found = {}
    for key, value in row.items():
        if key not in ("step", "time"):
            with contextlib.suppress(ValueError, TypeError):
                found[key] = float(value)
    return found


def main() -> None:
    processes.die_with_parent()
    run_dir = Path(sys.argv[1])
    follower = MetricsUploader(run_dir, loader.load_resolved(run_dir / records.CONFIG_FILE))
    while not select.select([sys.stdin], [], [], 0.0 if follower.step() else PAUSE)[0]:
        continue
    follower.close()


if __name__ == "__main__":
    main()
