"""What the training loop needs of a model, whoever wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from raylaunch.config.schema import Config


class LanguageModel(nn.Module):
    """Tokens [B, S] int64 → logits [B, S, vocabulary].

    Made on the meta device, sharded block by block, then given memory (`parallel.materialize`, which calls
    `settle`) and values: each parameter from `weights`, under `their_name`, or from the seed, by `init_std`.
    """

    weights: Path | None = None
    """A directory of safetensors to begin with; None: begin with fresh values."""

    takes_documents = True
    """It can keep documents apart."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The blocks, which are sharded, compiled and recomputed one by one."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, documents: Tensor | None = None, rows: int | None = None) -> Tensor:
        """`documents` [B, S]: the number of each token's document; tokens then see their own document only.
        `rows`: the first so many of B are samples, the rest padding; default: all."""
        raise NotImplementedError

    def settle(self, seq_len: int, device: torch.device) -> None:
        """Make again what is neither parameter nor saved, and was lost on the meta device."""
        raise NotImplementedError

    def init_std(self, name: str) -> float | None:
        """Standard deviation of a parameter's fresh values; None: all ones."""
        raise NotImplementedError

    def fresh(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """A parameter's whole fresh values, on the generator's device."""
        whole = torch.ones(shape, device=generator.device)
        std = self.init_std(name)
        return whole if std is None else whole.normal_(std=std, generator=generator)

    def is_fresh(self, name: str) -> bool:
        """A parameter that `weights` do not have: an adapter's."""
        return self.weights is None

    def check_weights(self) -> None:
        """RunError when `weights` are another model's."""

    def their_name(self, name: str) -> str:
        """A parameter's name in Hugging Face's layout."""
        raise NotImplementedError

    def their_parts(self, name: str) -> list[str] | None:
        """Names there of the slices [0], [1], … of a parameter that is several in that layout; None: it is one."""
        return None

    def source(self, name: str) -> str:
        """Where in `weights` a parameter's values are."""
        return self.their_name(name)

    def describe(self, config: Config, to: Path, dtype: str) -> str:
        """Write what stands beside exported weights into `to`; the stem of the weights' files."""
        raise NotImplementedError
