"""What models of others have in common: `inner`, a module made by code that knows nothing of us.

Parameters are made on the meta device; buffers (rotary frequencies) are small, and made as the model makes them.
Parameters that are one and the same (tied embeddings) are so again when memory was given to each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from raylaunch.trainers.language_model import LanguageModel


class Wrapped(LanguageModel):
    """`inner` is what `make` gives."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        with torch.device("cpu"), _parameters_on_meta():
            self.inner = make()
        self._buffers_made = {name: buffer.clone() for name, buffer in self.inner.named_buffers()}
        first: dict[int, str] = {}
        self._tied: dict[str, str] = {}
        for name, parameter in self.inner.named_parameters(remove_duplicate=False):
            if (other := first.setdefault(id(parameter), name)) != name:
                self._tied[name] = other
        self.inner.train()

    def settle(self, seq_len: int, device: torch.device) -> None:
        for name, made in self._buffers_made.items():
            path, _, leaf = name.rpartition(".")
            self.inner.get_submodule(path)._buffers[leaf] = made.to(device)
        for name, other in self._tied.items():
            path, _, leaf = name.rpartition(".")
            setattr(self.inner.get_submodule(path), leaf, self.inner.get_parameter(other))


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made in here have their parameters on the meta device and their buffers where they are."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
