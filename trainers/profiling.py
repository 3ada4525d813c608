"""A window of steps under torch's profiler: `logging.profile_steps`."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from raylaunch.state.run_events import Profiled
from raylaunch.training.worker.session import Session


class Profile:
    """Traces the steps from `window[0]` to `window[1]` (counted from 1, both within), if this attempt comes to them,
    into RUN_DIR/profile/step-FIRST-rank-RANK.json.gz, for chrome://tracing or Perfetto."""

    def __init__(self, window: list[int] | None, session: Session) -> None:
        self._window, self._session = window, session
        self._running: profile | None = None

    def begin(self, step: int) -> None:
        """Step `step` begins."""
        if self._window is not None and step == self._window[0]:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._running.start()

    def end(self, step: int) -> None:
        """Step `step` is over. (A window that an attempt does not come to the end of leaves no trace.)"""
        if self._running is None or self._window is None or step < self._window[1]:
            return
        self._running.stop()
        directory = self._session.run_dir / "profile"
        directory.mkdir(exist_ok=True)
        path = directory / f"step-{self._window[0]}-rank-{self._session.rank}.json.gz"
        self._running.export_chrome_trace(str(path))
        self._running = None
        self._session.record(Profiled(self._window[0], self._window[1], str(directory)))
