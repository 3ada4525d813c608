"""AdamW and its schedule: a linear warm-up, then a cosine down to min_lr_ratio at the last step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raylaunch.config import OptimizerConfig, StepSchedulerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, its states in place before the first step.

    Making the states here, as AdamW itself would, means that a checkpoint can be loaded straight
    into them, and that the state dict needs no trial step.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
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


def learning_rate(step: int, lr: float, schedule: StepSchedulerConfig) -> float:
    """Of training step `step` (from 0)."""
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    length = max(1, schedule.max_steps - schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - schedule.warmup_steps) / length)))
    return lr * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a checkpoint holds, by name: parameters and optimizer states (sharded; not copied)."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def local_gradients(model: nn.Module) -> list[Tensor]:
    """This rank's shards of the gradients, as plain tensors."""
    shards = []
    for parameter in model.parameters():
        assert isinstance(parameter.grad, DTensor), "every parameter has a gradient after a backward pass"
        shards.append(parameter.grad.to_local())
    return shards
