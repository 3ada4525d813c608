"""AdamW and its schedule: a linear warm-up, then a decay down to min_lr_ratio at the last step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raylaunch.config.schema import OptimizerConfig, StepSchedulerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, its states in place before the first step.

    Making the states here, as AdamW itself would, means that a checkpoint can be loaded straight
    into them, and that the state dict needs no trial step.
    """
    parameters = trained(model)
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:  # experts lie on a mesh of their own, and one update takes one mesh
        kinds.setdefault((parameter.ndim >= 2, getattr(parameter, "device_mesh", None)), []).append(parameter)
    groups = [
        {"params": alike, "weight_decay": config.weight_decay if decays else 0.0}
        for (decays, _), alike in kinds.items()
    ]
    betas = (config.betas[0], config.betas[1])
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained: all, or a model's adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def learning_rate(step: int, lr: float, schedule: StepSchedulerConfig) -> float:
    """Of training step `step` (from 0). Cosine: Loshchilov & Hutter, 2016; wsd: Hu et al. (MiniCPM), 2024."""
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    begin = schedule.warmup_steps
    if schedule.lr_decay_style == "wsd":
        begin = max(begin, schedule.max_steps - (schedule.lr_decay_steps or max(1, schedule.max_steps // 10)))
    done = min(1.0, max(0, step - begin) / max(1, schedule.max_steps - begin))
    match schedule.lr_decay_style:
        case "cosine":
            left = 0.5 * (1 + math.cos(math.pi * done))
        case "constant":
            left = 1.0
        case "linear" | "wsd":
            left = 1.0 - done
    return lr * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def reset_states(optimizer: torch.optim.Optimizer) -> None:
    """As `make_optimizer` made them."""
    for states in optimizer.state.values():
        for value in states.values():
            value.zero_()


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a checkpoint holds, by name: what is trained, and optimizer states (sharded; not copied)."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def local_gradients(model: nn.Module) -> list[Tensor]:
    """This rank's shards of the gradients, as plain tensors."""
    shards = []
    for parameter in trained(model):
        assert isinstance(parameter.grad, DTensor), "every parameter has a gradient after a backward pass"
        shards.append(parameter.grad.to_local())
    return shards
