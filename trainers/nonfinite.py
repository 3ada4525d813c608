"""What happens when a step's loss or gradient is no number (`optimizer.on_nonfinite`).

stop      the attempt ends with an error; nothing of that step is saved
skip      the update of that step is left out, and training goes on
rollback  back to the last commit, and on without that step's batch

A step that is left out stays so for this attempt only: after a crash, a replay comes to the same place
and decides the same. More than LIMIT of them with no good step between ends the attempt in any case.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Literal

from raylaunch.errors import RunError
from raylaunch.state.run_events import Nonfinite
from raylaunch.training.worker.session import Session

LIMIT = 10
Policy = Literal["stop", "skip", "rollback"]


class Action(Enum):
    """What the loop does with a step's update."""

    APPLY = "apply"
    SKIP = "skip"
    ROLLBACK = "rollback"


class Guard:
    """Judges each step by its loss and gradient norm, the same on all ranks. `left_out`: the steps (counted
    from 1) whose batches a rollback has taken out."""

    def __init__(self, policy: Policy, session: Session) -> None:
        self.policy: Policy = policy
        self.left_out: set[int] = set()
        self._session = session
        self._streak = self._last = 0  # how many bad steps since the last good one, and the furthest of them

    def judge(self, step: int, loss: float, norm: float) -> Action:
        """What to do after this step; RunError when that is to stop."""
        if math.isfinite(loss) and math.isfinite(norm):
            if step > self._last:  # what a rollback repeats is no progress
                self._streak = 0
            return Action.APPLY
        self._streak, self._last = self._streak + 1, max(step, self._last)
        policy = self.policy if self._streak <= LIMIT else "stop"
        what = "gradient" if math.isfinite(loss) else "loss"
        self._session.record(Nonfinite(step, what, policy, str(loss), str(norm)))
        if policy == "stop":
            raise self._verdict(step, loss, norm)
        if policy == "rollback":
            self.left_out.add(step)
        return Action(policy)

    def _verdict(self, step: int, loss: float, norm: float) -> RunError:
        remedy = "lower optimizer.lr, lengthen step_scheduler.warmup_steps or set optimizer.max_grad_norm."
        if self._streak > LIMIT:
            return RunError(
                f"step {step}: loss {loss}, gradient norm {norm}, as in the {LIMIT} tries before it "
                f"(optimizer.on_nonfinite: {self.policy})",
                f"This is not a single bad batch: {remedy}",
            )
        return RunError(
            f"step {step}: loss {loss}, gradient norm {norm}",
            f"The last commit is older than that. Before you resume from it, {remedy}",
        )
