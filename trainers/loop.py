"""A training loop of one's own that goes on when nodes die: `Loop`.

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

The loop restores the newest commit, hands out each step's samples (a function of seed and step alone, shared
among the workers there are), saves every `step_scheduler.ckpt_every_steps` steps, leaves when it is asked to, all
ranks at the same step, and says so. To stop early, call `loop.end()` rather than break; work between the steps that
takes minutes (a validation) goes into `with loop.validating():`, or it counts as a hang. Model and optimizer may be plain, DDP or FSDP2; what else has a `state_dict` is
given by name. Random numbers are a function of seed, step and rank (see `seeding`).
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
    """What a checkpoint can hold beside model and optimizer: a scheduler, a scaler, counters of one's own."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """This rank's part of one step.

    `indices` [n] int64: the samples. `weight`: multiply the mean loss over them by this, and gradients that are
    averaged over the ranks (DDP, FSDP) are those of the mean over the global batch; 1 where all parts are equal.
    """

    step: int
    indices: Tensor
    weight: float


class Loop:
    """Steps that are done once each, whatever dies. All ranks make one, and go through it in step."""

    def __init__(
        self,
        config: Config,
        session: Session,
        model: nn.Module,
        optimizer: Optimizer,
        samples: int = 0,
        **others: Stateful,
    ) -> None:
        """`samples`: how many there are to choose from; 0 for a loop over `steps` that finds its data itself.
        `others`: what else belongs to the state, by name."""
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
        """Steps done so far."""

    def __iter__(self) -> Iterator[Batch]:
        """The steps that are left, each with this rank's part of its global batch."""
        size, seed = self._facts["global_batch_size"], self._facts["seed"]
        rank, world = self._session.rank, self._session.world_size
        for step in self.steps():
            mine = np.arange(*sample_order.share(step * size, (step + 1) * size, rank, world), dtype=np.int64)
            samples = sample_order.samples_at(mine, self._facts["samples"], seed)
            yield Batch(step, torch.from_numpy(samples), len(mine) * world / size)

    def steps(self) -> Iterator[int]:
        """The steps that are left, for loops that find their data themselves. What follows the loop runs on all
        ranks, also when the attempt was stopped: ask `finished`."""
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
        """All steps are done, or `end` was called."""
        return self._ends_early or self.step >= self._config.step_scheduler.max_steps

    def end(self) -> None:
        """This step is the last one: save, and be finished. On any rank."""
        self._ends_early = True

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Work between the steps that may take its time; all ranks."""
        self._session.progress(self.step, "validate")
        yield
        self._session.progress(self.step, "step")

    def report(self, **metrics: Any) -> None:
        """One line of metrics.jsonl for the present step (rank 0's numbers); `loss` is what people look for."""
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
