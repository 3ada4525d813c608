"""The complete estimate of `raylaunch plan`. Parts are independent: if one is unknown, the others are still reported.

config, nodes → place → model → memory, alternatives → throughput → first step, end, saves → Estimate
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raylaunch.config.schema import Config
from raylaunch.errors import RaylaunchError
from raylaunch.tools.plan import alternatives, checkpoint_size, memory, model_shape, sharding, throughput
from raylaunch.tools.plan.alternatives import Fit
from raylaunch.tools.plan.checkpoint_size import Saving
from raylaunch.tools.plan.from_run import Measured
from raylaunch.tools.plan.gpu_models import CPU, GpuModel
from raylaunch.tools.plan.memory import Peak
from raylaunch.tools.plan.model_shape import Shape
from raylaunch.tools.plan.sharding import PlannedWorld
from raylaunch.tools.plan.throughput import Throughput


@dataclass(frozen=True)
class Given:
    """The options besides the configuration. `workers_per_node`: GPUs, or workers on a CPU. `bandwidth` in bytes per
    second, `failures` per node and hour; None: measured, or assumed."""

    gpu: GpuModel
    nodes: int
    workers_per_node: int
    available: int | None
    """Bytes of memory per worker; None: unknown."""
    room: str = ""
    """Source of `available`, for people."""
    tokens_per_s: float | None = None
    mfu: float | None = None
    like: Measured | None = None
    bandwidth: float | None = None
    failures: float = checkpoint_size.FAILURES


@dataclass
class Estimate:
    """Unknown values are None; `missing` lists the reasons, `notes` other messages."""

    place: PlannedWorld
    gpu: GpuModel
    available: int | None
    room: str = ""
    shape: Shape | None = None
    peak: Peak | None = None
    would_fit: list[Fit] = field(default_factory=list)
    pace: Throughput | None = None
    step: float | None = None
    first_step: dict[str, float] | None = None
    end: float | None = None
    saving: Saving | None = None
    bandwidth: str = ""
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        """Whether the plan fits; None if the memory is unknown."""
        if self.peak is None or self.available is None:
            return None
        return self.peak.total <= self.available

    @property
    def tight(self) -> bool:
        """It fits, but with less headroom than the allocator is likely to need."""
        return bool(
            self.fits and self.peak and self.available and not alternatives.fits(self.peak.total, self.available)
        )


def estimate(config: Config, given: Given) -> Estimate:
    """UsageError if the plan cannot use these nodes; other errors are added to `missing`."""
    where = sharding.place(config, given.nodes, given.workers_per_node)
    found = Estimate(where, given.gpu, given.available, given.room)
    if where.spare:
        found.notes.append(f"{where.spare} of {where.nodes} nodes are spare: the parallelism settings cannot use them")
    try:
        found.shape = model_shape.of(config)
        _memory(found, config, found.shape)
    except RaylaunchError as error:
        found.missing.append(f"{error.message}. {error.hint}")
    found.pace = _pace(found, config, given)
    if found.pace is not None:
        found.step = found.pace.step(config, where)
        found.end = throughput.training(config, found.pace, where)
    if found.shape is not None:
        _times(found, config, given, found.shape)
    return found


def _times(found: Estimate, config: Config, given: Given, model: Shape) -> None:
    """Times and saves, which depend on the model's shape."""
    where = found.place
    bandwidth, found.bandwidth = _bandwidth(given)
    found.saving = checkpoint_size.plan(
        config, model, where.nodes - where.spare, where.world, bandwidth, given.failures, found.step, found.end
    )
    if found.pace is None:
        return
    found.first_step = throughput.first_step(config, model, found.pace, where, on_gpu=given.gpu is not CPU)
    lost = found.saving.own_cost
    if lost is not None and found.end is not None:
        found.end = found.end / (1 - lost) if lost < 1 else None


def _memory(found: Estimate, config: Config, model: Shape) -> None:
    on_gpu, masked = found.gpu is not CPU, is_masked(config)
    found.peak = memory.peak(config, model, found.place, on_gpu=on_gpu, masked=masked)
    if found.fits is False or found.tight:
        assert found.available is not None
        found.would_fit = alternatives.search(config, model, found.place, found.available, on_gpu=on_gpu, masked=masked)
    plan = config.distributed
    if masked and on_gpu and model.n_heads != model.n_kv_heads and not model.theirs:
        scores = 4 * config.step_scheduler.local_batch_size * model.n_heads // plan.tp_size * config.data.seq_len**2
        found.notes.append(
            "data.document_mask with grouped-query attention: without a fused kernel in torch, each block needs "
            f"{scores / plan.cp_size / 2**30:.1f} GiB more for attention scores"
        )
    if model.n_experts:
        experts, shards_ = model.n_experts // plan.ep_size, _expert_shards(config, found.place)
        if shards_ > experts:
            found.notes.append(
                f"{shards_} shards of {experts} experts: FSDP pads them to {shards_}; increase ep_size or use hsdp"
            )
    if plan.compile or plan.float8:
        found.notes.append("memory saved by distributed.compile and float8 is not included")


def _expert_shards(config: Config, where: PlannedWorld) -> int:
    plan = config.distributed
    over = plan.ep_size if plan.ep_size > 1 else plan.tp_size
    return where.world // plan.pp_size // where.replicas // over


def is_masked(config: Config) -> bool:
    """Whether attention is masked by document, as decided by `trainers.datasets`."""
    if config.data.document_mask is not None:
        return config.data.document_mask
    for path in config.data.weights:
        with contextlib.suppress(OSError, ValueError):
            said = json.loads((Path(path).expanduser() / "manifest.json").read_text(encoding="utf-8"))
            if isinstance(said, dict) and said.get("format") == "sft":
                return True
    return False


def _pace(found: Estimate, config: Config, given: Given) -> Throughput | None:
    if given.tokens_per_s is not None:
        return throughput.stated(given.tokens_per_s)
    if given.like is not None:
        return given.like.pace(config, found.shape, found.place)
    made = None
    if found.shape is not None:
        made = throughput.assumed(config, found.shape, found.place, given.gpu, given.mfu)
    if made is None:
        found.missing.append("the throughput is unknown: set --tokens-per-second or --like RUN")
    return made


def _bandwidth(given: Given) -> tuple[float, str]:
    if given.bandwidth is not None:
        return given.bandwidth, "stated"
    if given.like is not None and given.like.bandwidth is not None:
        return given.like.bandwidth, f"measured in run {given.like.run}"
    return checkpoint_size.BANDWIDTH, "assumed"


def as_dict(found: Estimate, config: Config) -> dict[str, Any]:
    """The output of `--json`; docs/plan.md documents the keys."""
    where, peak, plan = found.place, found.peak, config.distributed
    return {
        "plan": {
            **asdict(where), "strategy": plan.strategy, "tp_size": plan.tp_size, "cp_size": plan.cp_size,
            "pp_size": plan.pp_size, "ep_size": plan.ep_size, "local_batch_size": config.step_scheduler.local_batch_size,
            "activation_checkpointing": plan.activation_checkpointing, "cpu_offload": plan.cpu_offload,
        },
        "gpu": asdict(found.gpu),
        "model": None if found.shape is None else found.shape.parameters,
        "memory": None if peak is None else {
            "total": peak.total, "available": found.available, "room": found.room, "fits": found.fits, "tight": found.tight,
            "moment": peak.moment, "stage": peak.stage, "bytes": dict(peak.bytes),
            "host_per_node": peak.host * where.workers_per_node,
        },
        "would_fit": [asdict(fit) for fit in found.would_fit],
        "time": None if found.pace is None else {
            "tokens_per_s": found.pace.tokens_per_s, "how": found.pace.how, "assumed": found.pace.assumed,
            "step": found.step, "first_step": found.first_step, "end": found.end,
        },
        "checkpoint": None if found.saving is None else asdict(found.saving) | {"bandwidth": found.bandwidth},
        "missing": found.missing,
        "notes": found.notes,
    }  # fmt: skip
