"""All that a trainer sees of the outside: who it is, where its files lie, what it reports.

A trainer is a function `(config, session)`. The driver makes one session per worker; tests make
them by hand. Nothing here imports Ray or torch. Reporting costs the step nothing: lines go through
a queue to a background thread of rank 0 (`lines`), and another one looks for a stop request, whatever
happens to these lines; where this rank is, the driver hears from a third (`pulse`), which every rank has.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylaunch.checkpoint.events import Event
from raylaunch.errors import StateError
from raylaunch.state import event_log, files
from raylaunch.state.appender import Appender
from raylaunch.training.stop_request import AT_COMMIT, NOW
from raylaunch.training.worker.heartbeat import HeartbeatClient

__all__ = ["AT_COMMIT", "NOW", "Session"]

FINISH_LIMIT = 120.0
"""Seconds to try to write an attempt's outcome."""
CLOSE_LIMIT = 10.0
"""Seconds to try to write the last metrics."""
LOOK_EVERY = 0.5
"""Seconds between two looks for a stop request."""


@dataclass
class Session:
    """One worker of one attempt of one run.

    `world_size` workers, `local_world_size` of them on this node (index `local_rank`).
    `device` is "cpu" or "cuda:N". `global_batch_size` is in samples and constant for the run.
    """

    run: str
    run_dir: Path
    checkpoint_dir: Path
    attempt: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    device: str
    global_batch_size: int
    cpus: int = 1
    """CPUs that this worker may use."""
    run_incarnation: int = 1
    """Orders the drivers of this run: with `attempt` it says who may commit (see checkpoint.store)."""
    pulse: HeartbeatClient | None = None
    """The connection to the driver; None: nobody listens (tests by hand)."""
    at_return: tuple[str, int] | None = None
    """The outcome and step to `finish` with when the trainer returns, if it does without an error."""
    step: int = 0
    """Steps done, as far as `progress` was told."""
    _metrics: Appender = field(init=False)
    _stop: threading.Event = field(default_factory=threading.Event)
    _closed: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._metrics = Appender(self.run_dir / files.METRICS_FILE)

    def start(self) -> None:
        """Begin the background work: the pulse of every rank, the files of rank 0."""
        if self.pulse is not None:
            self.pulse.start()
        if self.rank == 0 and self._thread is None:
            self._metrics.start()
            self._thread = threading.Thread(target=self._look, name="session", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write out what is queued. The pulse goes on: its end tells the driver that this process has ended."""
        if self._thread is not None:
            self._closed.set()
            self._thread = None
            self._metrics.close(CLOSE_LIMIT)

    def report(self, **metrics: Any) -> None:
        """Append one line to the run's metrics.jsonl (rank 0 only; returns at once, but for a value on a GPU).

        Values are numbers or texts; tensors and NumPy values of one element are taken for their number. TypeError for
        what is no JSON."""
        if self.rank == 0:
            metrics = {key: _number(value) for key, value in metrics.items()}
            if self.pulse is not None and "step" in metrics:
                self.pulse.reached(int(metrics["step"]))
            row = {**metrics, "world_size": self.world_size, "attempt": self.attempt, "time": time.time()}
            self._metrics.write(json.dumps({key: _plain(value) for key, value in row.items()}).encode() + b"\n")

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to the run's events.jsonl (rank 0 only): an event of your own, with a kind that docs/events.md
        does not have. A full disk does not end training."""
        if self.rank == 0:
            try:
                event_log.write(self.run_dir, kind, attempt=self.attempt, **fields)
            except StateError as error:
                print(f"session: event {kind} {fields} was not written: {error}", file=sys.stderr, flush=True)

    def record(self, event: Event) -> None:
        """As `event`, for a kind of raylaunch's."""
        self.event(event.kind, **event.values())

    def stop_requested(self) -> int:
        """0: go on. AT_COMMIT: end after the next regular save (the run resizes). NOW: save at this step
        and end. Known to rank 0 only: share it with the others in a collective that the step has anyway,
        so that all leave at the same step."""
        if self.rank != 0:
            return 0
        return NOW if self._stop.is_set() else self.pulse.wish if self.pulse is not None else 0

    def progress(self, step: int, phase: str = "step") -> None:
        """Say that this rank begins `phase` with `step` steps done; any rank, returns at once.

        "step" at the beginning of each, "sync" before the collective that ends it, "load", "validate" and
        "save" around these. A watchdog looks at it: when no rank has news for long, the attempt counts as
        hung, and those that are behind the others as missing. Never called: the attempt is not watched."""
        self.step = step
        if self.pulse is not None:
            self.pulse.progress(step, phase)

    def finish(self, outcome: str, step: int) -> None:
        """Say how the attempt ended: "finished" or "stopped", and at which step (rank 0 only).

        What cannot be written is tried again for a while: without it the attempt counts as failed."""
        if self.rank != 0:
            return
        path = files.attempt_dir(self.run_dir, self.attempt) / "outcome.json"
        deadline, pause = time.monotonic() + FINISH_LIMIT, 0.5
        while True:
            try:
                return files.write_json(path, {"outcome": outcome, "step": step})
            except StateError as error:
                if time.monotonic() > deadline:
                    raise
                print(f"session: {error}", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(10.0, 2 * pause)

    def returned(self) -> None:
        """The trainer has returned: what it left for this moment is its outcome."""
        if self.at_return is not None:
            self.finish(*self.at_return)

    def _look(self) -> None:
        """Look for a stop request about twice a second, until there is one; whatever a look runs into, the next may see."""
        said = ""
        while not self._stop.is_set() and not self._closed.is_set():
            try:
                if self._asked_to_stop():
                    return self._stop.set()
            except Exception as error:  # noqa: BLE001
                if repr(error) != said:
                    print(f"session: cannot look for a stop request: {error!r}", file=sys.stderr, flush=True)
                said = repr(error)
            self._closed.wait(LOOK_EVERY)
        return None

    def _asked_to_stop(self) -> bool:
        """By the file's content, not its existence: NFS remembers for a minute that a file is not there."""
        try:
            return (self.run_dir / files.STOP_FILE).read_text() != files.NO_STOP
        except FileNotFoundError:
            return False


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: those become strings, so that every reader can read the file."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
