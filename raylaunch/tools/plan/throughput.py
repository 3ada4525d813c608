"""Times of a run: tokens per second (stated, measured or assumed), the first step, the end.

    stated (--tokens-per-second) > measured (--like RUN) > assumed (a fraction of the GPU's peak)

`how` names the source. If the peak is unknown, no throughput is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raylaunch.config.schema import Config
from raylaunch.tools.plan.gpu_models import GpuModel
from raylaunch.tools.plan.model_shape import Shape
from raylaunch.tools.plan.sharding import PlannedWorld

MFU = {"eager": 0.337, "compile": 0.390, "float8": 0.499}
"""Model FLOPs utilisation: torchtitan's published tokens per second of Llama 3.1 8B with
FSDP2 on eight H100 (5,762, 6,667 compiled, 8,532 compiled with float8), by `Shape.flops_per_token`."""
RECOMPUTED = {"none": 1.0, "selective": 1.0, "full": 4 / 3}
"""Operations of a step relative to those without recomputation: `full` repeats the forward pass, a third of a step."""

BRING_UP, WORKERS, COMPILE = 30.0, 30.0, 60.0
"""Assumed seconds: start of nodes and Ray; start of workers and imports; first compilation."""
MADE = {True: 2e10, False: 1e8}
"""Assumed random values per second of a worker, on GPU and CPU. Each worker initialises all parameters of its stage."""


@dataclass(frozen=True)
class Throughput:
    """`tokens_per_s`: of all workers. `how`: the source, for people."""

    tokens_per_s: float
    how: str
    assumed: bool
    start: Mapping[str, float] = field(default_factory=dict)
    """Measured seconds from the start of the workers to the first step; empty: none."""

    def step(self, config: Config, where: PlannedWorld) -> float:
        """Seconds per step."""
        return where.batch * config.data.seq_len / self.tokens_per_s


def work(config: Config, shape: Shape, where: PlannedWorld) -> float:
    """Cost of a token in floating-point operations, including recomputation and pipeline bubbles (Narayanan et al.,
    2021: (stages - 1) / micro-batches)."""
    plan = config.distributed
    idle = 1 + (plan.pp_size - 1) / where.passes
    return shape.flops_per_token(config.data.seq_len) * RECOMPUTED[plan.activation_checkpointing] * idle


def stated(tokens_per_s: float) -> Throughput:
    return Throughput(tokens_per_s, "stated", False)


def assumed(config: Config, shape: Shape, where: PlannedWorld, gpu: GpuModel, mfu: float | None) -> Throughput | None:
    """Throughput from the GPU's peak; None if the peak is unknown."""
    if gpu.flops is None:
        return None
    plan = config.distributed
    kind = "float8" if plan.float8 else "compile" if plan.compile else "eager"
    share = mfu if mfu is not None else MFU[kind]
    how = f"assumed: {share:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s per GPU"
    if mfu is None:
        how += ", as torchtitan on H100" + {"eager": "", "compile": " with compile", "float8": " with float8"}[kind]
    return Throughput(where.world * gpu.flops * share / work(config, shape, where), how, True)


def first_step(
    config: Config, shape: Shape, pace: Throughput, where: PlannedWorld, *, on_gpu: bool
) -> dict[str, float]:
    """Seconds from the start of the job to the first step, by part."""
    if pace.start:
        return {"bring_up": BRING_UP, **pace.start}
    found = {"bring_up": BRING_UP, "workers": WORKERS}
    found["model"] = shape.parameters["total"] / config.distributed.pp_size / MADE[on_gpu]
    found["compile"] = COMPILE if config.distributed.compile else 0.0
    found["step"] = pace.step(config, where)
    return {name: seconds for name, seconds in found.items() if seconds}


def training(config: Config, pace: Throughput, where: PlannedWorld) -> float:
    """Seconds of all steps and validations (a third of a step for each batch), without saves and failures."""
    steps = config.step_scheduler
    validations = steps.max_steps // steps.val_every_steps if steps.val_every_steps else 0
    return pace.step(config, where) * (steps.max_steps + validations * steps.val_batches / 3)
