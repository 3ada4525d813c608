"""Pipeline parallel: each stage has some of the blocks, and micro-batches go through them one behind the other.

The schedule is one-forward-one-backward (PipeDream-flush; Narayanan et al., 2021): a stage holds the activations of
as many micro-batches as there are stages from it on, not of all. What a stage sends and receives at the same time
goes out together, so that neither waits for the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from raylaunch.trainers import parallel
from raylaunch.trainers.batches import MicroBatch
from raylaunch.trainers.language_model import LanguageModel

Loss = Callable[[Tensor, MicroBatch], Tensor]
"""(the last stage's logits, the micro-batch) → what is to be minimised, a scalar."""


class Pipeline:
    """This worker's stage. `shape` of the activations between stages, [B, S here, dim]."""

    def __init__(self, model: LanguageModel, layout: parallel.ParallelLayout, shape: tuple[int, int, int]) -> None:
        self._model, self._layout, self._shape = model, layout, shape
        self._stage, self._stages = layout.place.stage
        step = dist.get_world_size() // self._stages
        self._before, self._behind = dist.get_rank() - step, dist.get_rank() + step

    @property
    def is_last(self) -> bool:
        return self._stage == self._stages - 1

    def train(self, batches: list[MicroBatch], loss: Loss) -> None:
        """Forward and backward of all micro-batches; the gradients are exchanged in the last one's backward."""
        count = len(batches)
        ahead = min(self._stages - 1 - self._stage, count)
        held: deque[tuple[Tensor | None, Tensor]] = deque()
        done = 0

        def forward(number: int, came: Tensor | None) -> Tensor:
            batch = batches[number].to(self._layout.device)
            out = self._compute(batch, came)
            out = loss(out, batch) if self.is_last else out
            held.append((came, out))
            return out

        def backward(gradient: Tensor | None) -> Tensor | None:
            nonlocal done
            done += 1
            parallel.begin_pass(self._model, self._layout, last=done == count)
            came, out = held.popleft()
            torch.autograd.backward(out, gradient)
            return came.grad if came is not None else None

        for number in range(ahead):
            out = forward(number, self._exchange(receive_before=True)[0])
            self._exchange(send_behind=out)
        came = self._exchange(receive_before=True)[0] if ahead < count else None
        for number in range(ahead, count):
            out = forward(number, came)
            gradient = self._exchange(send_behind=out, receive_behind=True)[1]
            back = backward(gradient)
            came = self._exchange(send_before=back, receive_before=number < count - 1)[0]
        for _ in range(ahead):
            self._exchange(send_before=backward(self._exchange(receive_behind=True)[1]))

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> Tensor | None:
        """The logits, on the last stage."""
        out = self._compute(batch, self._exchange(receive_before=True)[0])
        self._exchange(send_behind=out)
        return out if self.is_last else None

    def _compute(self, batch: MicroBatch, came: Tensor | None) -> Tensor:
        out: Tensor = self._model(batch.inputs if came is None else came, batch.documents, batch.rows)
        return out

    def _exchange(
        self,
        *,
        send_before: Tensor | None = None,
        receive_before: bool = False,
        send_behind: Tensor | None = None,
        receive_behind: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """With the stages before and behind this one, where there are any: what came from each."""
        operations: list[dist.P2POp] = []
        came: list[Tensor | None] = [None, None]
        sides = (
            (self._before, send_before, receive_before and self._stage > 0),
            (self._behind, send_behind, receive_behind and not self.is_last),
        )
        for side, (peer, sent, receives) in enumerate(sides):
            there = self._stage > 0 if side == 0 else not self.is_last
            if sent is not None and there:
                operations.append(dist.P2POp(dist.isend, sent.detach().contiguous(), peer))
            if receives:
                buffer = torch.empty(self._shape, dtype=self._layout.dtype, device=self._layout.device)
                came[side] = buffer
                operations.append(dist.P2POp(dist.irecv, buffer, peer))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        if came[0] is not None and torch.is_grad_enabled():
            came[0].requires_grad_()
        return came[0], came[1]
