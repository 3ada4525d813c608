"""An exponential moving average of what is trained (`optimizer.ema`), sharded as the parameters are.

After each update: average ← decay * average + (1 - decay) * parameter (Polyak & Juditsky, 1992, with the usual
exponential weights). It begins as the first values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from raylaunch.checkpoint.shared_memory import local


class Average:
    """Of the model's trained parameters; with decay None there is none, and nothing happens."""

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self._model, self._decay = model, decay
        named = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad and decay is not None]
        self.tensors: dict[str, Tensor] = {f"ema.{name}": torch.zeros_like(p) for name, p in named}
        """What of it belongs into a checkpoint, by name."""
        self._trained = [local(p) for _, p in named]
        self._averages = [local(average) for average in self.tensors.values()]

    def begin(self) -> None:
        """As the parameters are now."""
        if self._decay is not None:
            torch._foreach_copy_(self._averages, self._trained)

    def update(self) -> None:
        """After a step of the optimizer."""
        if self._decay is not None:
            torch._foreach_lerp_(self._averages, self._trained, 1 - self._decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the averages."""
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for trained, average in zip(self._trained, self._averages, strict=True):
            kept = trained.clone()
            trained.copy_(average)
            average.copy_(kept)
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what was gathered before is of the other values
