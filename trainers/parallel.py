"""How the model lies over the workers: one mesh, each block sharded over all of it (FSDP2).

Parameters, gradients and optimizer states are float32 shards; the computation runs in the dtype of
the configuration. Gradients are *summed* over the workers, not averaged: the loss is divided by the
global number of tokens before the backward pass, which is right at any world size.
Initial values depend on the seed and a parameter's name only, never on the sharding.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from raylaunch.config import DistributedConfig
from trainers.model import Decoder


def make_mesh(device: torch.device, world_size: int) -> DeviceMesh:
    """One dimension, `shard`, over all workers."""
    return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))


def compute_dtype(config: DistributedConfig, device: torch.device) -> torch.dtype:
    """The dtype of the computation; `auto` is bfloat16 on GPU and float32 on CPU."""
    name = config.dtype if config.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def shard(model: Decoder, mesh: DeviceMesh, config: DistributedConfig, device: torch.device) -> FSDPModule:
    """Shard block by block, in place; the same object, seen as what it has become."""
    dtype = compute_dtype(config, device)
    # Inputs are not cast: tokens are integers, the rotary tables stay float32 on purpose.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        if config.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain sum, which gloo has too
    assert isinstance(model, FSDPModule)
    return model


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give the meta-device shards memory; the values are still to come (`initialize` or a checkpoint)."""
    model.to_empty(device=device)


@torch.no_grad()
def initialize(model: Decoder, seed: int, device: torch.device) -> None:
    """Fill each parameter from its own random stream: made whole, one at a time, the shard kept."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        std = model.init_std(name)
        whole = torch.ones(parameter.shape, device=device)
        if std is not None:
            whole.normal_(std=std, generator=_generator(seed, name, device))
        # src_data_rank=None: every rank cuts its shard from its own copy, nothing is sent.
        mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(mine.to_local())


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
