"""What a step measured, on its way to the run's metrics, without making the step wait.

One small all-reduce per step carries the loss, the number of samples, the gradient norm, rank 0's
wish to stop and the news of a failed background save. On a GPU the result is copied to the host behind
the step and read when the next one is under way; on a CPU it is there at once. `Meter` reports, and
raises on a loss that is no number.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from raylaunch.config import Config
from raylaunch.errors import RunError
from raylaunch.session import Session

_LOSS, _SAMPLES, _SQUARES, _STOP, _SAVE_FAILED = _SLOTS = range(5)


class StepStats:
    """The sums of one step: over its micro-batches first, then over the ranks."""

    def __init__(self, device: torch.device, *, stop: bool, save_failed: bool) -> None:
        self._sums = torch.zeros(len(_SLOTS), dtype=torch.float64, device=device)
        self._sums[_STOP].fill_(float(stop))
        self._sums[_SAVE_FAILED].fill_(float(save_failed))
        self._ready: torch.cuda.Event | None = None

    def add(self, loss: Tensor, samples: int) -> None:
        self._sums[_LOSS] += loss.detach()
        self._sums[_SAMPLES] += samples

    def exchange(self, gradients: list[Tensor]) -> None:
        """Sum over the ranks, with the squares of this rank's gradient shards."""
        norm: Tensor = torch.nn.utils.get_total_norm(gradients)
        self._sums[_SQUARES] = norm.double().square()
        dist.all_reduce(self._sums)

    def gradient_norm(self) -> Tensor:
        """Of the whole gradient, before clipping; stays on the device."""
        return self._sums[_SQUARES].sqrt()

    def send(self) -> None:
        """Start the copy to the host."""
        if self._sums.is_cuda:
            host = torch.empty(len(_SLOTS), dtype=torch.float64, pin_memory=True)
            host.copy_(self._sums, non_blocking=True)
            self._sums, self._ready = host, torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def read(self) -> list[float]:
        """The sums, by slot; waits for this step, but not for later ones."""
        if self._ready is not None:
            self._ready.synchronize()
        values: list[float] = self._sums.tolist()
        return values


class Meter:
    """Reports every log_every_steps steps, and the last one. `stop`: all ranks are to stop now;
    `save_failed`: some rank's background save has failed."""

    def __init__(
        self, config: Config, session: Session, *, done: int, tokens_per_step: int, device: torch.device
    ) -> None:
        self.stop = self.save_failed = False
        self._session = session
        self._every, self._last_step = config.logging.log_every_steps, config.step_scheduler.max_steps
        self._tokens_per_step = tokens_per_step
        self._lag = 1 if device.type == "cuda" else 0
        self._waiting: deque[tuple[int, float, StepStats]] = deque()
        self._first = done + 1
        self._reported_step, self._reported_at = done, time.monotonic()

    def push(self, step: int, lr: float, stats: StepStats) -> None:
        """Hand in a step (the count of completed steps); reads what is ready by now."""
        stats.send()
        self._waiting.append((step, lr, stats))
        while len(self._waiting) > self._lag:
            self._read()

    def flush(self) -> None:
        """Read all that is handed in; raises if one of them went wrong."""
        while self._waiting:
            self._read()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here does not count against tokens_per_s."""
        started = time.monotonic()
        yield
        self._reported_at += time.monotonic() - started

    def _read(self) -> None:
        step, lr, stats = self._waiting.popleft()
        loss_sum, samples, squares, stop, save_failed = stats.read()
        assert samples == self._session.global_batch_size, f"step {step} consumed {samples} samples"
        loss, norm = loss_sum / self._tokens_per_step, math.sqrt(squares)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"step {step}: loss {loss}, gradient norm {norm}",
                "The last commit is from before that, and training again goes on from there: first lower "
                "optimizer.lr, lengthen step_scheduler.warmup_steps or set optimizer.max_grad_norm.",
            )
        self.stop = self.stop or stop > 0
        self.save_failed = self.save_failed or save_failed > 0
        if step == self._first:
            self._session.event("first_step", step=step)
        if step % self._every == 0 or step == self._last_step or self.stop:
            self._report(step, lr, loss, norm)

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
        )
        self._reported_step, self._reported_at = step, now
