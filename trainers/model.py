"""A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Built on the meta device, sharded, then given memory and values by `parallel.materialize`; `init_std`
says how each parameter starts. Refuses nothing: `config.ModelConfig` has checked the shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raylaunch.config import ModelConfig

INIT_STD = 0.02


class Attention(nn.Module):
    """Causal grouped-query attention: n_heads query heads share n_kv_heads key and value heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.n_heads
        self.shared = config.n_kv_heads != config.n_heads
        self.wq = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, dim] → [B, S, dim]; cos and sin are [S, head_dim / 2], float32."""
        projections = (self.wq, self.wk, self.wv)
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in projections)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.shared)
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
    """Attention and feed-forward, each normalised before and added after."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class Decoder(nn.Module):
    """Tokens [B, S] int64 → logits [B, S, vocab_size]. Call `make_tables` before the first pass."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def make_tables(self, seq_len: int, device: torch.device) -> None:
        """cos and sin of position times frequency, [seq_len, head_dim / 2] each, float32.

        Plain attributes: buffers would have to survive the meta device and mixed precision."""
        half = self.config.dim // self.config.n_heads // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequencies)
        self.cos, self.sin = angles.cos().float().to(device), angles.sin().float().to(device)

    def init_std(self, name: str) -> float | None:
        """Standard deviation of a parameter's initial values; None: all ones (the norms).

        What writes into the residual stream starts smaller, so that its variance does not grow with
        depth."""
        if "norm" in name:
            return None
        if name.endswith(("wo.weight", "down.weight")):
            return INIT_STD / math.sqrt(2 * self.config.n_layers)
        return INIT_STD


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (first half, second half of the last dimension) by their angles, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.type_as(x)
