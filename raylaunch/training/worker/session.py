"""The interface between a trainer and raylaunch: rank, device, directories, metrics, stop requests.

A trainer is a function `(config, session)`. The driver creates one session per worker; tests create
them directly. Nothing here imports Ray or torch. Reporting does not delay a step: a background thread of
rank 0 writes the metrics (`appender`), another one checks for a stop request, and a third one, on every
rank, sends the rank's progress to the driver (`heartbeat`).
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raylaunch.checkpoint.events import Event
from raylaunch.errors import StateError
from raylaunch.state import event_log, files, records
from raylaunch.state.appender import Appender
from raylaunch.training.policy import TrainerOutcome
from raylaunch.training.stop_request import AT_COMMIT, NOW
from raylaunch.training.worker.heartbeat import HeartbeatClient

__all__ = ["AT_COMMIT", "NOW", "Session"]

FINISH_LIMIT = 120.0
"""Seconds to try to write an attempt's outcome."""
CLOSE_LIMIT = 10.0
"""Seconds to try to write the last metrics."""
LOOK_EVERY = 0.5
"""Seconds between two checks for a stop request."""


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
    """The number of the driver of this run. With `attempt` it decides who may commit (see `checkpoint/store`)."""
    pulse: HeartbeatClient | None = None
    """The connection to the driver; None in tests."""
    at_return: tuple[str, int] | None = None
    """The outcome and step for `finish`, used when the trainer returns without an error."""
    step: int = 0
    """Completed steps, as of the last call of `progress`."""
    _metrics: Appender = field(init=False)
    _stop: threading.Event = field(default_factory=threading.Event)
    _closed: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._metrics = Appender(self.run_dir / files.METRICS_FILE)

    def start(self) -> None:
        """Start the background threads: heartbeats on every rank, files on rank 0."""
        if self.pulse is not None:
            self.pulse.start()
        if self.rank == 0 and self._thread is None:
            self._metrics.start()
            self._thread = threading.Thread(target=self._look, name="session", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write the queued metrics. Heartbeats continue: their end tells the driver that this process has exited."""
        if self._thread is not None:
            self._closed.set()
            self._thread = None
            self._metrics.close(CLOSE_LIMIT)

    def report(self, **metrics: Any) -> None:
        """Append one line to the run's metrics.jsonl (rank 0 only). Returns at once, except that a value on a GPU is
        waited for.

        Values are numbers or strings; a tensor or NumPy array of one element is converted to a number. Raises TypeError
        for a value that JSON cannot represent."""
        if self.rank == 0:
            metrics = {key: _number(value) for key, value in metrics.items()}
            if self.pulse is not None and "step" in metrics:
                self.pulse.reached(int(metrics["step"]))
            row = {**metrics, "world_size": self.world_size, "attempt": self.attempt, "time": time.time()}
            self._metrics.write(json.dumps({key: _plain(value) for key, value in row.items()}).encode() + b"\n")

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to the run's events.jsonl (rank 0 only). `kind` is a name of your choice that docs/events.md
        does not list. A full disk does not stop training."""
        if self.rank == 0:
            try:
                event_log.write(self.run_dir, kind, attempt=self.attempt, **fields)
            except StateError as error:
                print(f"session: event {kind} {fields} was not written: {error}", file=sys.stderr, flush=True)

    def record(self, event: Event) -> None:
        """Append an event that raylaunch declares (rank 0 only)."""
        self.event(event.kind, **event.values())

    def stop_requested(self) -> int:
        """0: continue. AT_COMMIT: return after the next regular save (the run is resized). NOW: save at this step
        and return. Only rank 0 receives the request: share it in a collective that each step has anyway, so that all
        ranks return at the same step."""
        if self.rank != 0:
            return 0
        return NOW if self._stop.is_set() else self.pulse.wish if self.pulse is not None else 0

    def progress(self, step: int, phase: str = "step") -> None:
        """Report that this rank starts `phase` with `step` completed steps. Call it on every rank; it returns at once.

        Phases: "step" at the start of a step, "sync" before the collective at its end, and "load", "validate" and
        "save" for these. Hang detection uses it: if no rank makes progress for too long, the attempt is aborted, and
        the ranks that are behind the others are reported. A trainer that never calls it is not checked for hangs."""
        self.step = step
        if self.pulse is not None:
            self.pulse.progress(step, phase)

    def finish(self, outcome: str, step: int) -> None:
        """Record the outcome of the attempt, "finished" or "stopped", and its last step (rank 0 only). Without this call
        the attempt counts as failed.

        A write that fails is repeated for FINISH_LIMIT seconds; then StateError is raised."""
        if self.rank != 0:
            return
        path = files.attempt_dir(self.run_dir, self.attempt) / records.OUTCOME_FILE
        deadline, pause = time.monotonic() + FINISH_LIMIT, 0.5
        while True:
            try:
                return files.write_json(path, asdict(TrainerOutcome(outcome, step)))
            except StateError as error:
                if time.monotonic() > deadline:
                    raise
                print(f"session: {error}", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(10.0, 2 * pause)

    def returned(self) -> None:
        """Called when the trainer has returned: record the outcome that it left in `at_return`."""
        if self.at_return is not None:
            self.finish(*self.at_return)

    def _look(self) -> None:
        """Check for a stop request about twice a second, until there is one. A check that fails is repeated."""
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
