"""A mixture of experts in place of a block's feed-forward network: each token goes to the best few of them.

Top-k routing with normalised weights, as in Mixtral (Jiang et al., 2024); no token is dropped. The load is balanced
by a loss for each sequence by itself (DeepSeek-V3, 2024, equations 17 to 20), so that it is the same however samples
are shared out. With expert parallel each worker has some of the experts, and tokens travel to them and back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce, all_to_all_single_autograd
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from raylaunch.config.schema import ModelConfig


class Experts(nn.Module):
    """SwiGLU networks side by side: gate and up [E, ffn_dim, dim], down [E, dim, ffn_dim]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        wide, narrow = (config.n_experts, config.ffn_dim, config.dim), (config.n_experts, config.dim, config.ffn_dim)
        self.gate, self.up = nn.Parameter(torch.empty(wide)), nn.Parameter(torch.empty(wide))
        self.down = nn.Parameter(torch.empty(narrow))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """[tokens, dim] → [tokens, dim]; the first counts[0] tokens are for the first expert that is here, and so on."""
        gate, up, down = (w.to_local() if isinstance(w, DTensor) else w for w in (self.gate, self.up, self.down))
        out = []
        for number, tokens in enumerate(torch.split(x, counts)):  # an empty part still gives its expert a gradient
            hidden = F.silu(tokens @ gate[number].T) * (tokens @ up[number].T)
            out.append(hidden @ down[number].T)
        return torch.cat(out)


class MixtureOfExperts(nn.Module):
    """[B, S, dim] → [B, S, dim]. `group`: the workers that share the experts; `whole`: those that share the tokens of
    a sample; None: this one alone. `balance`: what the gradient of one sequence's balance loss is multiplied by."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.count, self.chosen = config.n_experts, config.n_experts_per_token
        self.router = nn.Linear(config.dim, config.n_experts, bias=False)
        self.experts = Experts(config)
        self.group: dist.ProcessGroup | None = None
        self.whole: dist.ProcessGroup | None = None
        self.balance = 0.0

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """`real` [B]: 1 for a sample, 0 for padding, which is no load to balance."""
        tokens = x.flatten(0, 1)
        scores = self.router(tokens).float().softmax(dim=-1)
        weights, chosen = scores.topk(self.chosen, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # by expert
        counts = chosen.flatten().bincount(minlength=self.count)
        sent = tokens[order // self.chosen]
        back = self.experts(sent, counts.tolist()) if self.group is None else self._travel(sent, counts)
        by_token = torch.empty_like(back).index_copy(0, order, back).view(-1, self.chosen, x.shape[-1])
        out: Tensor = (by_token * weights.type_as(by_token).unsqueeze(-1)).sum(dim=1).view_as(x)
        if self.balance and torch.is_grad_enabled():
            loss = self._unevenness(scores.view(*x.shape[:2], -1), chosen.view(*x.shape[:2], -1))
            out = _Attach.apply(out, (loss * real).sum(), self.balance)  # type: ignore[no-untyped-call]
        return out

    def _travel(self, sent: Tensor, counts: Tensor) -> Tensor:
        """Tokens, ordered by expert, to where their experts are, and the results back in the same order."""
        assert self.group is not None
        size = dist.get_world_size(self.group)
        coming = torch.empty_like(counts)  # [from whom, for which of the experts here]
        dist.all_to_all_single(coming, counts, group=self.group)
        here = self.count // size
        to, come = (c.view(size, here).sum(dim=1).tolist() for c in (counts, coming))
        got = all_to_all_single_autograd(sent, come, to, self.group)
        which = torch.arange(here, device=sent.device).repeat(size).repeat_interleave(coming)
        order = which.argsort(stable=True)  # by expert, no longer by sender
        done = self.experts(got[order], coming.view(size, here).sum(dim=0).tolist())
        done = torch.empty_like(done).index_copy(0, order, done)
        back: Tensor = all_to_all_single_autograd(done, to, come, self.group)
        return back

    def _unevenness(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """[B, S, E] probabilities and [B, S, k] choices → [B]: 1 for sequences that load all experts alike, and more."""
        load = F.one_hot(chosen, self.count).sum(dim=(1, 2)).float()
        mean, length = scores.sum(dim=1), scores.shape[1]
        if self.whole is not None:
            # Every worker then has the whole sequence's loss: each takes its part of it.
            size = dist.get_world_size(self.whole)
            load, length = all_reduce(load, "sum", self.whole), length * size
            mean = _sum_of(mean, self.whole)
        else:
            size = 1
        parts = (load / (self.chosen * length)) * (mean / length)
        return self.count * parts.sum(dim=-1) / size


class _Attach(torch.autograd.Function):
    """The output as it is; backward, the attached loss gets `scale` as its gradient. A loss that leaves the model
    beside its output would have its backward pass outside of FSDP's care."""

    @staticmethod
    def forward(context: Any, out: Tensor, loss: Tensor, scale: float) -> Tensor:
        context.scale, context.like = scale, loss
        return out.view_as(out)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, torch.full_like(context.like, context.scale), None


class _Sum(torch.autograd.Function):
    """The sum over a group, each of whose workers uses it: the gradients are summed as well."""

    @staticmethod
    def forward(context: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        total: Tensor = all_reduce(x, "sum", group)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, "sum", context.group), None


def _sum_of(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total: Tensor = _Sum.apply(x, group)  # type: ignore[no-untyped-call]
    return total
