"""A trainer for tests: the default one, whose rank 0 waits at gates until the test opens them. So what a test does then
happens in the middle of the run, on a machine of any speed. Imported by workers only."""

from __future__ import annotations

import time

from raylaunch.config import Config, TrainerConfig
from raylaunch.entry import function
from raylaunch.session import Session

GATES = (11, 21)
"""Steps done. RUN_DIR/at-N says that the run waits there, RUN_DIR/go-N lets it pass; so does a request to stop."""


class _Gated(Session):
    def progress(self, step: int, phase: str = "step") -> None:
        super().progress(step, phase)
        if phase == "step" and self.rank == 0 and step in GATES:
            (self.run_dir / f"at-{step}").touch()
            while not (self.run_dir / f"go-{step}").exists() and not self.stop_requested():
                time.sleep(0.05)


def train(config: Config, session: Session) -> None:
    session.__class__ = _Gated
    function(TrainerConfig())(config, session)
