"""Context parallel: the tokens of one sample lie on several workers, and attention sees them all.

Each worker has two chunks of the sequence, one from either end, so that causal attention is the same work for
all (Llama 3, Grattafiori et al., 2024, section 3.3.2). Keys and values are gathered for each layer, queries stay:
with grouped-query attention they are the smaller part.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

_TOKENS = 2
"""The dimension of the tokens in queries, keys and values: [B, heads, S, head_dim]."""


def places(rank: int, size: int, seq_len: int) -> Tensor:
    """The positions in the sequence that worker `rank` of `size` has, [seq_len / size] int64, ascending."""
    chunk = seq_len // (2 * size)
    starts = [number * chunk for number in _chunks(rank, size)]
    return torch.cat([torch.arange(start, start + chunk) for start in starts])


def _chunks(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


class ContextParallel:
    """This worker's part of every sample of `seq_len` tokens, a multiple of twice the group's size."""

    def __init__(self, group: dist.ProcessGroup, seq_len: int, device: torch.device) -> None:
        self.group, self._rank, self._size = group, dist.get_rank(group), dist.get_world_size(group)
        self.places = places(self._rank, self._size, seq_len).to(device)
        gathered = torch.cat([places(rank, self._size, seq_len) for rank in range(self._size)])
        self._in_order = gathered.argsort().to(device)
        # Not in `attend`: torch cannot make one while activations are checkpointed.
        chunk = seq_len // (2 * self._size)
        self._seen = [(number + 1) * chunk for number in _chunks(self._rank, self._size)]
        self._causal = [causal_lower_right(chunk, end) for end in self._seen]

    def mask(self, documents: Tensor) -> Tensor:
        """Who sees whom, [B, 1, S / size, S], where `documents` [B, S] numbers the document of each token."""
        mine = documents[:, self.places]
        before = self.places[:, None] >= torch.arange(documents.shape[1], device=documents.device)
        return (mine[:, None, :, None] == documents[:, None, None, :]) & before

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # cannot make a CausalBias; nothing in here is to fuse
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shared: bool) -> Tensor:
        """Attention of this worker's queries to all keys that they may see. `shared`: as `enable_gqa`."""
        both = torch.cat((k, v), dim=1)
        everywhere: Tensor = all_gather_tensor_autograd(both, _TOKENS, self.group)
        k, v = everywhere.index_select(_TOKENS, self._in_order).chunk(2, dim=1)
        if mask is not None:
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=shared)
        out = []
        for part, end, bias in zip(q.chunk(2, dim=_TOKENS), self._seen, self._causal, strict=True):
            seen = (k[:, :, :end], v[:, :, :end])
            out.append(F.scaled_dot_product_attention(part, *seen, bias, enable_gqa=shared))
        return torch.cat(out, dim=_TOKENS)
