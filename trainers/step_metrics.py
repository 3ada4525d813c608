"""What a step measured, on its way to the run's metrics, without making the step wait.

One small all-reduce per step carries the loss, the number of samples and of tokens that count, the gradient norm, rank 0's
wish to stop and the news of a failed background save. On a GPU the result is copied to the host behind
the step and read when the next one is under way, unless the update has to wait for it
(`optimizer.on_nonfinite`); on a CPU it is there at once. `Meter` reports what is read.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from raylaunch.config.schema import Config
from raylaunch.state.run_events import FirstStep
from raylaunch.trainers.batches import MicroBatch
from raylaunch.trainers.nonfinite import Action, Guard
from raylaunch.training.worker.session import NOW, Session

_LOSS, _SAMPLES, _COUNTED, _SQUARES, _STOP, _SAVE_FAILED = _SLOTS = range(6)


class StepStats:
    """The sums of one step: over its micro-batches first, then over the ranks."""

    def __init__(self, device: torch.device, tokens: int, *, counts: bool, stop: int, save_failed: bool) -> None:
        """`tokens`: what the losses are divided by for their gradients. `counts`: no other rank has these losses.
        `stop`: what `Session.stop_requested` answers on rank 0, and 0 on the others."""
        self._tokens, self._counts = tokens, counts
        self._sums = torch.zeros(len(_SLOTS), dtype=torch.float64, device=device)
        self._sums[_STOP].fill_(float(stop))
        self._sums[_SAVE_FAILED].fill_(float(save_failed))
        self._ready: torch.cuda.Event | None = None

    def add(self, loss: Tensor, batch: MicroBatch) -> None:
        if not self._counts:
            return
        self._sums[_LOSS] += loss.detach()
        self._sums[_SAMPLES] += batch.samples
        self._sums[_COUNTED] += batch.counted

    def exchange(self, gradients: list[Tensor], replicas: list[int]) -> None:
        """Sum over the ranks, with the squares of this rank's gradient shards, each of which so many ranks have."""
        for count in sorted(set(replicas)):
            alike = [gradient for gradient, n in zip(gradients, replicas, strict=True) if n == count]
            norm: Tensor = torch.nn.utils.get_total_norm(alike)
            self._sums[_SQUARES] += norm.to(self._sums.device).double().square() / count
        dist.all_reduce(self._sums)

    def per_counted(self) -> Tensor:
        """What turns gradients per token into gradients per token that counts; stays on the device."""
        return self._tokens / self._sums[_COUNTED].clamp(min=1)

    def gradient_norm(self) -> Tensor:
        """Of the whole gradient of the mean loss, before clipping; stays on the device."""
        return self._sums[_SQUARES].sqrt() * self.per_counted()

    def send(self) -> None:
        """Start the copy to the host."""
        if self._sums.is_cuda:
            host = torch.empty(len(_SLOTS), dtype=torch.float64, pin_memory=True)
            host.copy_(self._sums, non_blocking=True)
            self._sums, self._ready = host, torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def read(self) -> Read:
        """What there is to know; waits for this step, but not for later ones."""
        if self._ready is not None:
            self._ready.synchronize()
        loss, samples, counted, squares, stop, save_failed = self._sums.tolist()
        counted = max(counted, 1.0)
        norm = math.sqrt(squares) * self._tokens / counted
        return Read(loss / counted, norm, int(samples), int(stop), save_failed > 0)


class Read(NamedTuple):
    """One step: the mean loss of the tokens that count, and the norm of its gradient."""

    loss: float
    gradient_norm: float
    samples: int
    stop: int
    save_failed: bool


class Meter:
    """Reports every log_every_steps steps, and the last one. `stop`: what all ranks are to do (0, AT_COMMIT,
    NOW); `save_failed`: some rank's background save has failed for good."""

    def __init__(
        self, config: Config, session: Session, guard: Guard, *, done: int, tokens_per_step: int, device: torch.device
    ) -> None:
        self.stop, self.save_failed = 0, False
        self._session, self._guard = session, guard
        self._every, self._last_step = config.logging.log_every_steps, config.step_scheduler.max_steps
        self._tokens_per_step = tokens_per_step
        self._lag = 1 if device.type == "cuda" and guard.policy == "stop" else 0
        self._waiting: deque[tuple[int, float, StepStats]] = deque()
        self._first: int | None = done + 1
        self._reported_step, self._reported_at = done, time.monotonic()
        self.data_waited = 0.0
        """Seconds that steps have waited for data so far (set by the loop)."""
        self._waited_before, self._stall = 0.0, 0.0

    def push(self, step: int, lr: float, stats: StepStats) -> Action:
        """Hand in a step (counted from 1) before its update; reads what is ready by now. What to do with the
        update: SKIP and ROLLBACK only where the guard may say so, which makes it wait for this step."""
        stats.send()
        self._waiting.append((step, lr, stats))
        return self.flush(self._lag)

    def flush(self, left: int = 0) -> Action:
        """Read all that is handed in but for the newest `left`; raises if one of them went wrong."""
        action = Action.APPLY
        while len(self._waiting) > left:
            action = self._read()
        return action

    def rewind(self, step: int) -> None:
        """Training goes back to after `step` steps."""
        self._reported_step, self._reported_at = step, time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here does not count against tokens_per_s."""
        started = time.monotonic()
        yield
        self._reported_at += time.monotonic() - started

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Time spent in here is what a save costs: `save_stall` of the next report."""
        started = time.monotonic()
        yield
        self._stall += time.monotonic() - started

    def _read(self) -> Action:
        step, lr, stats = self._waiting.popleft()
        loss, norm, samples, stop, save_failed = stats.read()
        assert samples == self._session.global_batch_size, f"step {step} consumed {samples} samples"
        self.stop = NOW if self.stop == NOW else stop  # AT_COMMIT may be withdrawn
        self.save_failed = self.save_failed or save_failed
        action = self._guard.judge(step, loss, norm)
        if action is not Action.APPLY:
            return action
        if step == self._first:
            self._session.record(FirstStep(step))
            self._first = None
        if step % self._every == 0 or step == self._last_step or self.stop:
            self._report(step, lr, loss, norm)
        return action

    def _report(self, step: int, lr: float, loss: float, norm: float) -> None:
        now = time.monotonic()
        seconds = max(now - self._reported_at, 1e-9)
        self._session.report(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=step * self._tokens_per_step,
            tokens_per_s=round((step - self._reported_step) * self._tokens_per_step / seconds, 1),
            data_wait=round(self.data_waited - self._waited_before, 4),
            **({"save_stall": round(self._stall, 4)} if self._stall else {}),
        )
        self._reported_step, self._reported_at = step, now
        self._waited_before, self._stall = self.data_waited, 0.0
