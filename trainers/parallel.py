"""How the model lies over the workers: one mesh, each block split over its last dimension and sharded over the
one before (FSDP2), copies over the first.

Workers are numbered with tensor parallel innermost (inside a node, if it fits), then context parallel, then data
parallel, then the stages of a pipeline: only data parallel changes its size in a run. fsdp: shards over all of the last two. hsdp: over those of a
node, with a replica on each node. ddp: a replica on each worker; the same code, with shards of one. Experts lie on a
second mesh of the same workers. Parameters,
gradients and optimizer states are float32 shards; the computation runs in the dtype of the configuration. Gradients
are *summed* over the workers, not averaged: the loss is divided by the global number of tokens before the backward
pass, which is right at any world size. Initial values depend on the seed and a parameter's name only, never on the
sharding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from raylaunch.config.schema import Config
from raylaunch.errors import RunError
from raylaunch.trainers.context_parallel import ContextParallel
from raylaunch.trainers.decoder import Block, Decoder
from raylaunch.trainers.expert_parallel import MixtureOfExperts
from raylaunch.trainers.language_model import LanguageModel
from raylaunch.training.worker.session import Session

GATHERED_BYTES = 1 << 30
"""A model up to this size (in the dtype of the computation) stays whole on each worker for the length
of a step: one gather a step instead of two per micro-batch. A larger one is gathered block by block."""


@dataclass(frozen=True)
class MeshCoordinates:
    """Where this worker stands: (index, size) among those that have other parts of the model (`stage`), that share no
    sample (`data`), that share samples and have other tokens of them (`context`), and that have the same tokens
    (`tensor`)."""

    stage: tuple[int, int]
    data: tuple[int, int]
    context: tuple[int, int]
    tensor: tuple[int, int]

    @classmethod
    def of(cls, config: Config, rank: int, world_size: int) -> MeshCoordinates:
        """RunError for a world that the plan cannot use."""
        plan = config.distributed
        tp, cp, pp = plan.tp_size, plan.cp_size, plan.pp_size
        if world_size % plan.model_parallel:
            experts = f", ep_size {plan.ep_size}" if plan.ep_size > 1 else ""
            raise RunError(
                f"the parallelism settings need a multiple of {plan.model_parallel} workers, got {world_size} "
                f"(distributed: tp_size {tp} * cp_size {cp} * pp_size {pp}{experts})",
                "Change slurm.nodes, slurm.ntasks_per_node or the plan.",
            )
        stage, rest = divmod(rank, world_size // pp)
        data, rest = divmod(rest, tp * cp)
        return cls((stage, pp), (data, world_size // (pp * tp * cp)), (rest // tp, cp), (rest % tp, tp))

    @property
    def has_losses(self) -> bool:
        """Its losses are nobody else's."""
        return self.tensor[0] == 0 and self.stage[0] == self.stage[1] - 1


@dataclass(frozen=True)
class ParallelLayout:
    """Where and how the model computes. `offload`: parameters lie in the host's memory. `mesh`: the workers of this
    stage: replicate (if there are), shard, tensor (if any); `experts`: the same as replicate, shard, expert.
    `gathered`: see GATHERED_BYTES; `balance`: see MixtureOfExperts."""

    device: torch.device
    offload: bool
    place: MeshCoordinates
    mesh: DeviceMesh
    dtype: torch.dtype
    gathered: bool
    context: ContextParallel | None
    experts: DeviceMesh | None
    balance: float

    @property
    def inside_blocks(self) -> list[ProcessGroup]:
        """The groups in which a block's own code communicates; FSDP's are around it."""
        meshes = [(self.mesh, "tensor"), *([(self.experts, "expert")] if self.experts is not None else [])]
        groups = [mesh[name].get_group() for mesh, name in meshes if name in (mesh.mesh_dim_names or ())]
        return groups + ([self.context.group] if self.context is not None else [])


def copies(strategy: str, world_size: int, local_world_size: int, within: int) -> int:
    """How often the model is there; `within`: workers that must not be torn apart. RunError where hsdp's nodes do
    not fit."""
    if strategy == "hsdp" and (world_size % local_world_size or local_world_size % within):
        raise RunError(
            f"hsdp needs as many workers on every node, a multiple of {within}: there are {world_size} in all, "
            f"{local_world_size} on this node",
            "Use identical nodes, or distributed.strategy: fsdp.",
        )
    return {"ddp": world_size // within, "hsdp": world_size // local_world_size}.get(strategy, 1)


def make_layout(model: LanguageModel, config: Config, device: torch.device, session: Session) -> ParallelLayout:
    """The mesh and what follows from it; dtype `auto` is bfloat16 on GPU, float32 on CPU."""
    plan = config.distributed
    place = MeshCoordinates.of(config, session.rank, session.world_size)
    world = session.world_size // plan.pp_size  # of this stage
    bfloat16 = plan.dtype == "bfloat16" or (plan.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize // plan.tp_size
    replicas = copies(plan.strategy, world, session.local_world_size, plan.model_parallel // plan.pp_size)

    def mesh(last: str, size: int) -> DeviceMesh:
        sizes = {"replicate": replicas, "shard": world // replicas // size, last: size}
        return stage_mesh({name: n for name, n in sizes.items() if n > 1 or name == "shard"})

    def stage_mesh(sizes: dict[str, int]) -> DeviceMesh:
        everyone = {"stage": plan.pp_size, **sizes} if plan.pp_size > 1 else sizes
        whole = init_device_mesh(device.type, tuple(everyone.values()), mesh_dim_names=tuple(everyone))
        return whole[tuple(sizes)]

    experts = mesh("expert", plan.ep_size) if plan.ep_size > 1 else None
    context = None
    if plan.cp_size > 1:
        apart = stage_mesh({"data": place.data[1], "context": plan.cp_size, "tensor": plan.tp_size})
        context = ContextParallel(apart["context"].get_group(), config.data.seq_len, device)
    balance = config.model.router_aux_loss / session.global_batch_size
    gathered = size <= GATHERED_BYTES
    return ParallelLayout(
        device, plan.cpu_offload, place, mesh("tensor", plan.tp_size), dtype, gathered, context, experts, balance
    )


def shard(model: LanguageModel, layout: ParallelLayout, *, compile_blocks: bool) -> None:
    """Split and shard in place, block by block; what is outside the blocks is one more group."""
    if isinstance(model, Decoder):
        _split(model, layout)
    # Inputs are not cast: tokens are integers, the rotary tables stay float32 on purpose.
    policy = MixedPrecisionPolicy(layout.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = _without(layout.mesh, "tensor")
    how: dict[str, Any] = {"mp_policy": policy}
    if layout.offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=layout.device.type == "cuda")
    for block in model.layers:
        if isinstance(block, Block) and isinstance(block.feed_forward, MixtureOfExperts):
            _share_out(block.feed_forward, layout, how)
        if compile_blocks:
            block.compile()
        fully_shard(block, mesh=mesh, reshard_after_forward=not layout.gathered, **how)
    fully_shard(model, mesh=mesh, **how)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain sum, which gloo has too


def _split(model: Decoder, layout: ParallelLayout) -> None:
    """Context parallel, and tensor parallel with sequence parallel (Korthikanti et al., 2022): products are split over
    heads and hidden units, and between them each worker has a part of the tokens."""
    model.context = layout.context
    for block in model.layers:
        assert isinstance(block, Block)
        block.attention.context = layout.context
    if layout.place.tensor[1] == 1:
        return
    mesh, tokens, whole = layout.mesh["tensor"], Shard(1), Replicate()
    outside = {
        "embedding": RowwiseParallel(input_layouts=whole, output_layouts=tokens),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=tokens, output_layouts=whole),
    }
    parallelize_module(model, mesh, {name: how for name, how in outside.items() if getattr(model, name) is not None})
    for block in model.layers:
        parallelize_module(
            block,
            mesh,
            {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(tokens, None, None, None), desired_input_layouts=(whole, None, None, None)
                ),
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(output_layouts=tokens),
                "feed_forward_norm": SequenceParallel(),
                "feed_forward": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(whole,)),
                "feed_forward.gate": ColwiseParallel(),
                "feed_forward.up": ColwiseParallel(),
                "feed_forward.down": RowwiseParallel(output_layouts=tokens),
            },
        )


def _share_out(mixture: MixtureOfExperts, layout: ParallelLayout, how: dict[str, Any]) -> None:
    """Expert parallel: each worker of a group gets some of the experts; FSDP shards those over the groups."""
    mixture.balance = layout.balance
    mixture.whole = layout.context.group if layout.context is not None else None
    if layout.experts is None:
        return
    expert = layout.experts["expert"]
    mixture.group = expert.get_group()
    for name, weights in list(mixture.experts.named_parameters()):
        mixture.experts.register_parameter(name, nn.Parameter(distribute_tensor(weights.data, expert, [Shard(0)])))
    fully_shard(
        mixture.experts, mesh=_without(layout.experts, "expert"), reshard_after_forward=not layout.gathered, **how
    )


def _without(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The dimensions that FSDP uses."""
    return mesh[tuple(dim for dim in mesh.mesh_dim_names or () if dim != name)]


def begin_pass(model: LanguageModel, layout: ParallelLayout, *, last: bool) -> None:
    """Before each micro-batch of a step: only the last one's backward exchanges the gradients."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)
    model.set_reshard_after_backward(last or not layout.gathered)


def materialize(model: LanguageModel, layout: ParallelLayout, seq_len: int) -> None:
    """Give the meta-device shards memory; values are still to come (`initialize` or a checkpoint)."""
    model.to_empty(device="cpu" if layout.offload else layout.device)
    model.settle(seq_len, layout.device)


@torch.no_grad()
def initialize(
    model: LanguageModel, named: Iterable[tuple[str, nn.Parameter]], device: torch.device, seed: int
) -> None:
    """Fill each of these parameters from its own random stream: made whole, one at a time, the shard kept."""
    for name, parameter in named:
        assert isinstance(parameter, DTensor)
        whole = model.fresh(name, parameter.shape, _generator(seed, name, device))
        parameter.to_local().copy_(whole[own_part(parameter)])


def own_part(parameter: DTensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this worker's shard is."""
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))


def replicas(parameter: DTensor) -> int:
    """How many workers have the same shard."""
    mesh = parameter.device_mesh
    return math.prod(mesh.size(dim) for dim, kind in enumerate(parameter.placements) if kind.is_replicate())


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
