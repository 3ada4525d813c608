"""All that a trainer sees of the outside: who it is, where its files lie, what it reports.

A trainer is a function `(config, session)`. The driver makes one session per worker; tests make
them by hand. Nothing here imports Ray or torch. Reporting costs the step nothing: lines go through
a queue to a background thread of rank 0, and looking for a stop request is that thread's job too.
"""

from __future__ import annotations

import json
import math
import queue
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylaunch import state


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
    _lines: queue.SimpleQueue[Mapping[str, Any] | None] = field(default_factory=queue.SimpleQueue)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin the background work of rank 0; a no-op on the others."""
        if self.rank == 0 and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="session", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write out what is queued and end the background thread."""
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join()
            self._thread = None

    def report(self, **metrics: Any) -> None:
        """Append one line to the run's metrics.jsonl (rank 0 only; returns at once)."""
        if self.rank == 0:
            self._lines.put({**metrics, "world_size": self.world_size, "attempt": self.attempt, "time": time.time()})

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to the run's events.jsonl (rank 0 only)."""
        if self.rank == 0:
            state.append_event(self.run_dir, kind, attempt=self.attempt, **fields)

    def stop_requested(self) -> bool:
        """Whether the run was asked to save and end. Known to rank 0 only: share it with the others
        in a collective that the step has anyway, so that all leave at the same step."""
        return self._stop.is_set()

    def finish(self, outcome: str, step: int) -> None:
        """Say how the attempt ended: "finished" or "stopped", and at which step (rank 0 only)."""
        if self.rank == 0:
            state.write_json(
                state.attempt_dir(self.run_dir, self.attempt) / "outcome.json", {"outcome": outcome, "step": step}
            )

    def _work(self) -> None:
        """Drain the queue into metrics.jsonl, and look for a stop request about twice a second."""
        stop_file = self.run_dir / state.STOP_FILE
        with (self.run_dir / state.METRICS_FILE).open("a", encoding="utf-8", buffering=1) as out:
            while True:
                try:
                    # Its content, not its existence: NFS remembers for a minute that a file is not there.
                    if not self._stop.is_set() and stop_file.exists() and stop_file.read_text() != state.NO_STOP:
                        self._stop.set()
                    line = self._lines.get(timeout=0.5)
                    if line is None:
                        return
                    out.write(json.dumps({k: _plain(v) for k, v in line.items()}) + "\n")
                except queue.Empty:
                    continue
                except OSError as error:  # a full disk or a stale handle: the next stop must still be seen
                    print(f"session: {error}", file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: those become strings, so that every reader can read the file."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
