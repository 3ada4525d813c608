"""Models of one's own, for the tests of `model._target_`: as somebody writes them who knows nothing of raylaunch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    """Attention by torch's own module (in_proj, biases, a `_reset_parameters`), and a scale that it lacks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.feed = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 0.5)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        length = x.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        if mask is not None:
            hidden = (hidden | ~mask).repeat_interleave(4, dim=0)
        h = self.norm(x)
        h, _ = self.attention(h, h, h, attn_mask=hidden, need_weights=False)
        x = x + h
        return x + self.scale * F.gelu(self.feed(x))


class Tied(nn.Module):
    """Embedding and head are one parameter; a buffer that is not saved."""

    def __init__(self, width: int, vocab_size: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("gain", torch.full((), 0.125), persistent=False)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        mask = None if documents is None else documents[:, :, None] == documents[:, None, :]
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x) * self.gain  # type: ignore[no-any-return]


class Deaf(nn.Module):
    """Knows of no documents, and has no blocks."""

    def __init__(self, vocab_size: int = 264) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)  # type: ignore[no-any-return]


class Unset(nn.Module):
    """Has parameters, and nothing that fills them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(264, 264))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens]


def none() -> str:
    """No model."""
    return "a model"
