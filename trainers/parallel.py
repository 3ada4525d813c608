"""How the model lies over the workers: one mesh, each block sharded over all of it (FSDP2).

Parameters, gradients and optimizer states are float32 shards; the computation runs in the dtype of
the configuration. Gradients are *summed* over the workers, not averaged: the loss is divided by the
global number of tokens before the backward pass, which is right at any world size.
Initial values depend on the seed and a parameter's name only, never on the sharding.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from raylaunch.config import Config
from trainers.model import Decoder

GATHERED_BYTES = 1 << 30
"""A model up to this size (in the dtype of the computation) stays whole on each worker for the length
of a step: one gather a step instead of two per micro-batch. A larger one is gathered block by block."""


@dataclass(frozen=True)
class Layout:
    """Where and how the model computes. `gathered`: see GATHERED_BYTES."""

    device: torch.device
    mesh: DeviceMesh
    dtype: torch.dtype
    gathered: bool


def make_layout(model: Decoder, config: Config, device: torch.device, world_size: int) -> Layout:
    """One mesh dimension, `shard`, over all workers; dtype `auto` is bfloat16 on GPU, float32 on CPU."""
    name = config.distributed.dtype
    bfloat16 = name == "bfloat16" or (name == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return Layout(device, mesh, dtype, gathered=size <= GATHERED_BYTES)


def shard(model: Decoder, layout: Layout, *, compile_blocks: bool) -> None:
    """Shard in place, block by block; what is outside the blocks is one more group."""
    # Inputs are not cast: tokens are integers, the rotary tables stay float32 on purpose.
    policy = MixedPrecisionPolicy(layout.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        if compile_blocks:
            block.compile()
        fully_shard(block, mesh=layout.mesh, mp_policy=policy, reshard_after_forward=not layout.gathered)
    fully_shard(model, mesh=layout.mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain sum, which gloo has too


def begin_pass(model: Decoder, layout: Layout, *, last: bool) -> None:
    """Before each micro-batch of a step: only the last one's backward exchanges the gradients."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)
    model.set_reshard_after_backward(last or not layout.gathered)


def materialize(model: Decoder, layout: Layout, seq_len: int) -> None:
    """Give the meta-device shards memory; values are still to come (`initialize` or a checkpoint)."""
    model.to_empty(device=layout.device)
    model.make_tables(seq_len, layout.device)


@torch.no_grad()
def initialize(model: Decoder, layout: Layout, seed: int) -> None:
    """Fill each parameter from its own random stream: made whole, one at a time, the shard kept."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        std = model.init_std(name)
        whole = torch.ones(parameter.shape, device=layout.device)
        if std is not None:
            whole.normal_(std=std, generator=_generator(seed, name, layout.device))
        # src_data_rank=None: every rank cuts its shard from its own copy, nothing is sent.
        mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(mine.to_local())


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
