"""A model of one's own, `model._target_`: whatever module a function makes, in our loop.

    def make(width: int, vocab_size: int) -> nn.Module: ...       # tokens [B, S] int64 → logits [B, S, vocab_size]

Its blocks are the entries of its largest nn.ModuleList. Every module that has parameters of its own has a
`reset_parameters()`, as torch's have: it is asked for whole fresh values, parameter by parameter, from a random
stream that depends on the seed and the parameter's name only. A `forward` with a parameter `documents` gets the
number of each token's document, [B, S], where `data.document_mask` is on.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from raylaunch.config import user_code
from raylaunch.config.schema import Config
from raylaunch.errors import RunError
from raylaunch.trainers.activation_checkpointing import recomputed
from raylaunch.trainers.module_wrapper import Wrapped

_RESETS = ("reset_parameters", "_reset_parameters")  # the second is torch's own in nn.MultiheadAttention


class Own(Wrapped):
    """What `model.target` makes of `model.kwargs`."""

    def __init__(self, config: Config) -> None:
        model, recompute = config.model, config.distributed.activation_checkpointing
        target = str(model.target)
        function = user_code.named("model._target_", target, config.trainer.chdir)

        def make() -> nn.Module:
            try:
                made = function(**model.kwargs)
            except (TypeError, ValueError) as error:
                raise RunError(f"model._target_: {target}: {error}", f"Given: {model.kwargs or 'nothing'}.") from error
            if not isinstance(made, nn.Module):
                raise RunError(f"model._target_: {target} gave a {type(made).__name__}, no nn.Module")
            return made

        super().__init__(make)
        self._target = target
        self.takes_documents = "documents" in inspect.signature(self.inner.forward).parameters
        for layer in self.layers if recompute != "none" else ():
            layer.forward = recomputed(layer.forward, recompute)

    @cached_property
    def layers(self) -> Sequence[nn.Module]:
        lists = [list(m) for m in self.inner.modules() if isinstance(m, nn.ModuleList)]
        return max(lists, key=lambda blocks: sum(p.numel() for b in blocks for p in b.parameters()), default=[])

    def forward(self, tokens: Tensor, documents: Tensor | None = None, rows: int | None = None) -> Tensor:
        given = {} if documents is None else {"documents": documents}
        out = self.inner(tokens, **given)
        logits: Tensor = getattr(out, "logits", out)
        return logits

    def fresh(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        path, _, leaf = name.rpartition(".")
        owner = self.get_submodule(path)
        # The module again, without FSDP and with whole parameters.
        kind = next(c for c in type(owner).__mro__ if not issubclass(c, FSDPModule))
        clone: Any = kind.__new__(kind)
        clone.__dict__.update(owner.__dict__)
        clone.__dict__["_parameters"] = {
            n: None if p is None else nn.Parameter(torch.empty(p.shape, device=generator.device))
            for n, p in owner.named_parameters(recurse=False)
        } | {n: None for n, p in owner._parameters.items() if p is None}
        cuda = [generator.device] if generator.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            torch.manual_seed(generator.initial_seed())
            self._reset(owner)(clone)
        whole: Tensor = clone._parameters[leaf].detach()
        return whole

    def check_weights(self) -> None:
        for module in self.inner.modules():
            if any(True for _ in module.parameters(recurse=False)):
                self._reset(module)

    def describe(self, config: Config, to: Path, dtype: str) -> str:
        described = {"_target_": self._target, **config.model.kwargs, "torch_dtype": dtype}
        (to / "config.json").write_text(json.dumps(described, indent=1))
        return "model"

    def their_name(self, name: str) -> str:
        return name.removeprefix("inner.")

    def _reset(self, module: nn.Module) -> Any:
        """Its class's way to fresh values; RunError for one that has none."""
        for name in _RESETS:
            if callable(found := getattr(type(module), name, None)):
                return found
        names = ", ".join(name for name, _ in module.named_parameters(recurse=False))
        raise RunError(
            f"model._target_: {type(module).__name__} has parameters ({names}) and no reset_parameters()",
            "Add one that initializes them; torch's own modules have one.",
        )
