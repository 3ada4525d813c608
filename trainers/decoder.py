"""A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Built on the meta device, sharded, then given memory and values by `parallel.materialize`; `init_std`
says how each parameter starts. Refuses nothing: `schema.ModelConfig` has checked the shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raylaunch.config.schema import Config, ModelConfig
from raylaunch.trainers import llama_weights
from raylaunch.trainers.activation_checkpointing import recomputed
from raylaunch.trainers.context_parallel import ContextParallel
from raylaunch.trainers.expert_parallel import MixtureOfExperts
from raylaunch.trainers.language_model import LanguageModel

INIT_STD = 0.02


class Attention(nn.Module):
    """Causal grouped-query attention: n_heads query heads share n_kv_heads key and value heads. `context`: where
    the other tokens are (see `context_parallel`); None: they are all here."""

    context: ContextParallel | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.n_heads
        self.shared = config.n_kv_heads != config.n_heads
        self.wq = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """[B, S, dim] → [B, S, dim]; cos and sin are [S, head_dim / 2], float32. `mask` [B, 1, S, all S]: who sees
        whom; None: everything before."""
        projections = (self.wq, self.wk, self.wv)
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in projections)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.context is not None:
            out = self.context.attend(q, k, v, mask, self.shared)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.shared)
        projected: Tensor = self.wo(out.transpose(1, 2).flatten(-2))
        return projected


class FeedForward(nn.Module):
    """SwiGLU: a gated two-layer network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return projected


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added after. `recompute`: what the backward pass
    computes again (`distributed.activation_checkpointing`)."""

    def __init__(self, config: ModelConfig, recompute: str = "none") -> None:
        super().__init__()
        self._run = recomputed(self._compute, recompute)
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.feed_forward = MixtureOfExperts(config) if config.n_experts else FeedForward(config)

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        """`given`: as `_compute` takes it."""
        out: Tensor = self._run(x, *given)
        return out

    def _compute(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, real: Tensor | None = None) -> Tensor:
        """cos, sin and mask: see `Attention`; `real`: see `MixtureOfExperts`, the only one that has it."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x), *([] if real is None else [real]))
        return out


class Decoder(LanguageModel):
    """`context`: which tokens of each sample are here; None: all. (Rotary positions are relative, so those of a packed
    document need not begin at 0.) `stage`: (which, of how many) parts of it this is; one that is not the first takes
    what the one before gives, [B, S, dim], and one that is not the last gives such."""

    cos: Tensor
    sin: Tensor
    context: ContextParallel | None = None

    def __init__(self, config: ModelConfig, recompute: str = "none", stage: tuple[int, int] = (0, 1)) -> None:
        super().__init__()
        self.config = config
        self.weights = Path(config.init_from) if config.init_from is not None else None
        which, stages = stage
        first, behind = which * config.n_layers // stages, (which + 1) * config.n_layers // stages
        # By their number in the whole model: names are the same in any stage.
        self.embedding = nn.Embedding(config.vocab_size, config.dim) if which == 0 else None
        self.blocks = nn.ModuleDict({str(number): Block(config, recompute) for number in range(first, behind)})
        self.norm = nn.RMSNorm(config.dim, eps=1e-5) if which == stages - 1 else None
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False) if which == stages - 1 else None

    def forward(self, tokens: Tensor, documents: Tensor | None = None, rows: int | None = None) -> Tensor:
        x, mask = tokens if self.embedding is None else self.embedding(tokens), None
        if documents is not None:
            same = documents[:, None, :, None] == documents[:, None, None, :]
            mask = same.tril() if self.context is None else self.context.mask(documents)
        real = []
        if self.config.n_experts:
            real = [(torch.arange(len(tokens), device=tokens.device) < (len(tokens) if rows is None else rows)).float()]
        for block in self.blocks.values():
            x = block(x, self.cos, self.sin, mask, *real)
        out: Tensor = x if self.norm is None or self.head is None else self.head(self.norm(x))
        return out

    @property
    def layers(self) -> Sequence[nn.Module]:
        return list(self.blocks.values())

    def settle(self, seq_len: int, device: torch.device) -> None:
        """cos and sin of position times frequency, [positions here, head_dim / 2] each, float32.

        Plain attributes: buffers would have to survive the meta device and mixed precision."""
        half = self.config.dim // self.config.n_heads // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        here = torch.arange(seq_len) if self.context is None else self.context.places.cpu()
        angles = torch.outer(here.double(), frequencies)
        self.cos, self.sin = angles.cos().float().to(device), angles.sin().float().to(device)

    def init_std(self, name: str) -> float | None:
        """Standard deviation of a parameter's initial values; None: all ones (the norms).

        What writes into the residual stream starts smaller, so that its variance does not grow with
        depth."""
        if "norm" in name:
            return None
        if name.endswith(("wo.weight", "down.weight", "experts.down")):
            return INIT_STD / math.sqrt(2 * self.config.n_layers)
        return INIT_STD

    def check_weights(self) -> None:
        if self.weights is not None:
            llama_weights.check(self.weights, self.config)

    def their_name(self, name: str) -> str:
        return llama_weights.name_of(name)

    def their_parts(self, name: str) -> list[str] | None:
        return llama_weights.experts_of(name, self.config.n_experts)

    def source(self, name: str) -> str:
        tied = name == "head.weight" and self.weights is not None and llama_weights.is_tied(self.weights)
        return llama_weights.name_of("embedding.weight" if tied else name)

    def describe(self, config: Config, to: Path, dtype: str) -> str:
        (to / "config.json").write_text(json.dumps(llama_weights.described(config, dtype), indent=1))
        return "model"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (first half, second half of the last dimension) by their angles, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.type_as(x)
