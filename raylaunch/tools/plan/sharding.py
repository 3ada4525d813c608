"""The distribution of a model over the workers: the part on one GPU of each pipeline stage, as in `trainers.parallel`.

    config, nodes, workers per node → PlannedWorld → the units of each stage (which FSDP gathers and reduces together)

FSDP splits each parameter by rows and pads it: a parameter with fewer rows than shards takes one row on every worker,
and as many rows as shards when gathered. So eight experts over 64 shards take the space of 64 when gathered. A world
that the plan cannot use is rejected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raylaunch.config.schema import Config
from raylaunch.errors import UsageError
from raylaunch.text import plural
from raylaunch.tools.plan.model_shape import Parameter, Shape
from raylaunch.training import policy

GATHERED_BYTES = 1 << 30
"""As in `trainers.parallel`: a stage up to this size stays gathered during a step."""


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers and reduces together; sizes in elements. `shards`: workers that share the unit."""

    parameters: tuple[Parameter, ...]
    shards: int

    def shard(self, trained: bool = False) -> int:
        """Size on one worker, with padding; of all parameters, or of the trained ones."""
        return sum(math.ceil(p.rows / self.shards) * p.columns for p in self._those(trained))

    def whole(self, trained: bool = False) -> int:
        """Gathered size, with padding."""
        return self.shard(trained) * self.shards

    def own(self, trained: bool = False) -> int:
        """Size without padding."""
        return sum(p.size for p in self._those(trained))

    def of_experts(self, are: bool) -> Unit:
        """The unit's experts, or its other parameters."""
        return Unit(tuple(p for p in self.parameters if p.expert == are), self.shards)

    @property
    def largest(self) -> int:
        """Elements of the largest trained parameter."""
        return max((p.size for p in self._those(True)), default=0)

    def _those(self, trained: bool) -> Sequence[Parameter]:
        return [p for p in self.parameters if p.trained or not trained]


@dataclass(frozen=True)
class Stage:
    """A pipeline stage. `block`: the units of each of its `blocks` blocks, starting with the experts (if they are split
    separately); `root`: parameters outside the blocks. `gathered`: see GATHERED_BYTES."""

    number: int
    blocks: int
    block: tuple[Unit, ...]
    root: Unit
    has_embedding: bool
    has_head: bool
    gathered: bool


@dataclass(frozen=True)
class PlannedWorld:
    """The world of a plan. `replicas`: copies of the model; `samples`: groups of workers with different samples;
    `passes`: micro-batches per step of each worker; `spare`: nodes that the plan cannot use."""

    nodes: int
    workers_per_node: int
    spare: int
    world: int
    replicas: int
    samples: int
    batch: int
    passes: int


def place(config: Config, nodes: int, workers_per_node: int) -> PlannedWorld:
    """UsageError if the plan cannot use these nodes."""
    plan, steps = config.distributed, config.step_scheduler
    model_parallel_size = plan.model_parallel
    used = policy.usable(nodes, workers_per_node, model_parallel_size)
    world = used * workers_per_node
    if not world:
        raise UsageError(
            f"{plural(nodes, 'node')} with {plural(workers_per_node, 'worker')} each: fewer than the "
            f"{model_parallel_size} workers needed for tp_size {plan.tp_size} * cp_size {plan.cp_size} * "
            f"pp_size {plan.pp_size}, ep_size {plan.ep_size}",
            "Increase --nodes or --gpus-per-node, or reduce these sizes.",
        )
    of_stage, within = world // plan.pp_size, model_parallel_size // plan.pp_size
    if plan.strategy == "hsdp" and (of_stage % workers_per_node or workers_per_node % within):
        raise UsageError(
            f"distributed.strategy hsdp: groups of {within} of the {of_stage} workers of a pipeline stage do not fit "
            f"on nodes with {workers_per_node} workers",
            f"Use a multiple of {within} workers per node, or strategy: fsdp.",
        )
    replicas = {"ddp": of_stage // within, "hsdp": of_stage // workers_per_node}.get(plan.strategy, 1)
    samples = of_stage // (plan.tp_size * plan.cp_size)
    batch = steps.global_batch_size or steps.local_batch_size * (steps.grad_acc_steps or 1) * (
        world // model_parallel_size
    )
    passes = math.ceil(math.ceil(batch / samples) / steps.local_batch_size)
    return PlannedWorld(nodes, workers_per_node, nodes - used, world, replicas, samples, batch, passes)


def stages(config: Config, shape: Shape, where: PlannedWorld, width: int) -> list[Stage]:
    """The stages of the pipeline, one without pipeline parallel; `width`: bytes per element in the computation."""
    plan = config.distributed
    tp, pp, ep = plan.tp_size, plan.pp_size, plan.ep_size
    group = where.world // pp // where.replicas
    shards = group // tp
    found = []
    for number in range(pp):
        blocks = (number + 1) * shape.n_layers // pp - number * shape.n_layers // pp
        outside = (shape.first if number == 0 else []) + (shape.last if number == pp - 1 else [])
        size = sum(p.size for p in outside) + blocks * sum(p.size for p in shape.block)
        here = [p.part(tp, ep) for p in shape.block]
        apart = [p for p in here if p.expert] if ep > 1 else []
        together = [p for p in here if not (p.expert and ep > 1)]
        units = ([Unit(tuple(apart), group // ep)] if apart else []) + [Unit(tuple(together), shards)]
        root = Unit(tuple(p.part(tp, ep) for p in outside), shards)
        found.append(
            Stage(
                number, blocks, tuple(units), root, number == 0, number == pp - 1,
                size * width // tp <= GATHERED_BYTES,
            )
        )  # fmt: skip
    return found
