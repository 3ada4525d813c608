"""What the backward pass computes again, to save memory: `distributed.activation_checkpointing`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_SAVED = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm", "bmm", "addmm", "_scaled_mm", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
}  # fmt: skip
"""What `selective` keeps: the dear results; norms, rotations and gates are cheap to compute again."""


def _keep_products(_context: object, operation: object, *_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)


def recomputed(forward: Callable[..., Any], how: str) -> Callable[..., Any]:
    """`forward` of a block, whose insides are kept (none), kept in part (selective) or computed again (full)."""
    if how == "none":
        return forward

    # The compiler wants to see which contexts these are: no variable for the difference.
    def full(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def selective(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts, **kwargs)

    return full if how == "full" else selective
