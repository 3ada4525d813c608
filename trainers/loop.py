"""`Loop`: makes a training loop of your own elastic, so that it continues when nodes die.

    def train(config, session):
        model = DistributedDataParallel(Net().to(session.device))
        optimizer = torch.optim.AdamW(model.parameters())
        loop = Loop(config, session, model, optimizer, samples=len(data))
        for batch in loop:
            loss = loss_of(model, data[batch.indices]) * batch.weight
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loop.report(loss=loss.item())

The loop loads the newest checkpoint, assigns the samples of each step (a function of seed and step, divided among the
workers), saves every `step_scheduler.ckpt_every_steps` steps, and returns on a stop request, on all ranks at the same
step. To stop early, call `loop.end()` instead of `break`. Wrap work between steps that takes minutes, such as a
validation, in `with loop.validating():`, or it counts as a hang. Model and optimizer may be plain, DDP or FSDP2. Pass
any other object with a `state_dict` by name. Random numbers are a function of seed, step and rank (see `seeding`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from raylaunch.checkpoint import saver
from raylaunch.checkpoint.resume import resume
from raylaunch.config.schema import Config
from raylaunch.data import sample_order
from raylaunch.errors import RunError
from raylaunch.state import runs
from raylaunch.timing import PATIENCE_AT_END, PATIENCE_AT_STOP
from raylaunch.training.hang_detector import DONE
from raylaunch.training.worker.seeding import seed_step
from raylaunch.training.worker.session import AT_COMMIT, NOW, Session


class Stateful(Protocol):
    """State that a checkpoint can contain beside model and optimizer: a scheduler, a scaler, counters."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """This rank's share of the global batch of one step.

    `indices` [n] int64: the samples. `weight`: multiply the mean loss over these samples by it. Gradients averaged over
    the ranks (DDP, FSDP) are then those of the mean over the global batch. It is 1 if all ranks have equal shares.
    """

    step: int
    indices: Tensor
    weight: float


class Loop:
    """An iterator over training steps that resumes after faults. Each step is done exactly once. Every rank creates one and
    iterates over it in lockstep."""

    def __init__(
        self,
        config: Config,
        session: Session,
        model: nn.Module,
        optimizer: Optimizer,
        samples: int = 0,
        **others: Stateful,
    ) -> None:
        """Loads the newest checkpoint, if there is one.

        `samples`: size of the dataset; 0 for a loop over `steps()` with its own data loading. `others`: further state for
        the checkpoint, by name. Raises RunError if the checkpoint was written with different data settings."""
        session.progress(0, "load")
        if samples and session.global_batch_size < session.world_size:
            raise RunError(
                f"{session.world_size} workers cannot share a global batch of {session.global_batch_size} samples",
                "Raise step_scheduler.global_batch_size, or use fewer workers (elastic.max_nodes).",
            )
        self._config, self._session = config, session
        self._model, self._optimizer, self._others = model, optimizer, others
        self._device = torch.device(session.device)
        self._group = saver.make_group(config.distributed.comm_timeout)
        self._saver = saver.Saver(
            session, self._group, keep=runs.keep(config), background=config.checkpoint.background,
            timeout=config.distributed.comm_timeout,
        )  # fmt: skip
        self._facts = {
            "global_batch_size": session.global_batch_size, "seed": config.data.seed, "samples": samples
        }  # fmt: skip
        self._done_at = time.monotonic()
        self._ends_early = False
        self.step = self._resume()
        """Completed steps."""

    def __iter__(self) -> Iterator[Batch]:
        """The remaining steps, each with this rank's share of its global batch."""
        size, seed = self._facts["global_batch_size"], self._facts["seed"]
        rank, world = self._session.rank, self._session.world_size
        for step in self.steps():
            mine = np.arange(*sample_order.share(step * size, (step + 1) * size, rank, world), dtype=np.int64)
            samples = sample_order.samples_at(mine, self._facts["samples"], seed)
            yield Batch(step, torch.from_numpy(samples), len(mine) * world / size)

    def steps(self) -> Iterator[int]:
        """The numbers of the remaining steps, for loops with their own data loading. The code after the loop runs on all
        ranks, also if the attempt was stopped: check `finished`."""
        most = self._config.step_scheduler.max_steps
        left = False
        while self.step < most and not left:
            self._session.progress(self.step, "step")
            seed_step(self._config.data.seed, self.step, self._session.rank, self._device)
            yield self.step
            self.step += 1
            left = self._between()
        self._saver.close()
        self._session.progress(self.step, DONE)
        self._session.at_return = ("finished" if self.finished else "stopped", self.step)

    @property
    def finished(self) -> bool:
        """True if all steps are done, or `end` was called."""
        return self._ends_early or self.step >= self._config.step_scheduler.max_steps

    def end(self) -> None:
        """Make this step the last one: the run saves and is finished. May be called on any rank."""
        self._ends_early = True

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Context for long work between steps, such as validation, so that it does not count as a hang. All ranks."""
        self._session.progress(self.step, "validate")
        yield
        self._session.progress(self.step, "step")

    def report(self, **metrics: Any) -> None:
        """Append a line to metrics.jsonl for the current step, with the values of rank 0. `loss` is shown by all commands."""
        now = time.monotonic()
        seconds, self._done_at = now - self._done_at, now
        size = self._session.global_batch_size
        self._session.report(step=self.step + 1, samples_per_s=round(size / max(seconds, 1e-9), 1), **metrics)

    def _between(self) -> bool:
        """After a step: save if it is time, and whether to leave."""
        every = self._config.step_scheduler.ckpt_every_steps
        self._session.progress(self.step, "sync")
        news = torch.tensor([self._session.stop_requested(), int(self._saver.failed()), int(self._ends_early)])
        dist.all_reduce(news, op=dist.ReduceOp.MAX, group=self._group)
        stop, failed, early = news.tolist()
        if failed:
            self._saver.give_up()
        self._ends_early = bool(early)
        ends = self.finished
        save = ends or stop == NOW or self.step % every == 0
        if not save:
            return False
        leaves = ends or stop in {NOW, AT_COMMIT}
        patience = PATIENCE_AT_END if ends else PATIENCE_AT_STOP if stop == NOW else 0.0
        saved = self._saver.save(self.step, self._state(), self._facts, wait=leaves, patience=patience)
        return leaves and saved

    def _state(self) -> dict[str, Any]:
        """All that a checkpoint holds; DCP writes each rank's part of it."""
        model, optimizer = get_state_dict(self._model, self._optimizer)
        others = {name: thing.state_dict() for name, thing in self._others.items()}
        return {"model": model, "optimizer": optimizer, "others": others}

    def _resume(self) -> int:
        state: dict[str, Any] = {}

        def made() -> dict[str, Any]:
            # Not for a fresh run: torch makes an optimizer's states by a step, which Adam would count.
            state.update(self._state())
            return state

        done = resume(self._session, self._group, made, self._facts)
        if done:
            set_state_dict(
                self._model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
            for name, thing in self._others.items():
                thing.load_state_dict(state["others"][name])
        return done
