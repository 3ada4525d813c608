"""How it is trained: `optimizer:`, `step_scheduler:`, `distributed:` and `checkpoint:`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raylaunch.config.schema.base import NotNegative, Positive, Section, Share


class OptimizerConfig(Section):
    """`optimizer:`."""

    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of what is trained, with this decay (0.999, say); validated beside it as
    `val_loss_ema`, and what save_consolidated writes."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient that is no number: end the run, leave the step out, or go back to the last
    commit and leave that batch out. The last two wait for each step's result before the update."""


class StepSchedulerConfig(Section):
    """`step_scheduler:` how many steps of how many samples, and what happens every so many."""

    max_steps: Positive = 200
    local_batch_size: Positive = 8
    """Samples per worker and pass."""
    grad_acc_steps: Positive | None = None
    """Passes per step at the size the run starts with; fixes the global batch from then on."""
    global_batch_size: Positive | None = None
    """Samples per step, a constant of the run at any number of workers."""
    ckpt_every_steps: Positive = 50
    val_every_steps: NotNegative = 50
    """0: never."""
    val_batches: Positive = 4
    warmup_steps: NotNegative = 10
    lr_decay_style: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up; wsd (warm-up, stable, decay): constant, then linear over the last lr_decay_steps."""
    lr_decay_steps: Positive | None = None
    """Of wsd. Default: a tenth of max_steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The decay ends at this share of lr."""

    @model_validator(mode="before")
    @classmethod
    def _short_warmup(cls, values: Any) -> Any:
        """The default warmup must not make a run of five steps, as one tries things with, an error."""
        if isinstance(values, dict) and "warmup_steps" not in values:
            steps = values.get("max_steps")
            if type(steps) is int and 0 < steps < 10:  # True is an int too, and a mistake here
                return {**values, "warmup_steps": steps}
        return values

    @model_validator(mode="after")
    def _one_batch(self) -> Self:
        if self.grad_acc_steps is not None and self.global_batch_size is not None:
            raise ValueError("give grad_acc_steps or global_batch_size, not both")
        return self


class DistributedConfig(Section):
    """`distributed:`."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = "fsdp"
    """ddp: each worker has the whole model; fsdp: a shard of it; hsdp: shards inside a node, whole on each node."""
    tp_size: Positive = 1
    """Tensor parallel: so many workers share each layer's products, and the tokens between them. Best inside a node."""
    cp_size: Positive = 1
    """Context parallel: so many workers share the tokens of each sample."""
    pp_size: Positive = 1
    """Pipeline parallel: so many stages, each with a part of the blocks. More micro-batches a step (see
    step_scheduler.local_batch_size) keep them busy."""
    ep_size: Positive = 1
    """Expert parallel: so many workers share the experts of each block, and send each other their tokens."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again, to save memory: nothing, all but products and attention, or all of a block."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; auto: bfloat16 on GPU, float32 on CPU. Parameters are kept in float32."""
    cpu_offload: bool = False
    """Parameters, gradients and optimizer states lie in the host's memory, and are copied to the GPU block by block."""
    float8: bool = False
    """The products of the blocks in float8, where the GPU has it (H100 and newer). Needs raylaunch[float8]."""
    compile: bool = False
    """torch.compile, block by block; what it makes is kept in the run directory for the next attempt. Not with tp_size."""
    comm_timeout: Positive = 600
    """Seconds after which a collective that does not complete is an error."""

    @property
    def model_parallel(self) -> int:
        """Workers that hold together: a world has a multiple of these. (Experts are shared by data-parallel workers.)"""
        return self.pp_size * math.lcm(self.tp_size * self.cp_size, self.ep_size)


class CheckpointConfig(Section):
    """`checkpoint:`."""

    checkpoint_dir: str | None = None
    """Shared by all nodes. Default: `checkpoints` in the run directory."""
    keep_last_n_checkpoints: Positive = 2
    keep_every_n_steps: NotNegative = 0
    """Those of every so many steps stay for good; 0: none."""
    keep_best: bool = False
    """The one with the lowest val_loss stays, of those that were saved right after a validation."""
    async_save: bool = False
    """The steps wait for a copy of the state in memory, and not for the storage."""
    async_checkpointer_type: Literal["thread", "process"] = "thread"
    """Where the copy is written from. A process beside each worker (about 0.4 GB of its own) leaves the steps all of
    Python; a thread costs nothing more than the copy."""
    save_consolidated: bool = False
    """When the run is finished, write its weights into `model` in the run directory, as safetensors that the model's own
    loader reads. The run counts as finished before that. The export is ended after two hours, or
    one minute after another run began to wait. If it fails, or the head's node dies meanwhile, nothing of the run is lost: the event `export_failed` has the
    command that tries again, `raylaunch checkpoints RUN export latest --to DIR`."""

    @property
    def background(self) -> Literal["thread", "process"] | None:
        """Where saves run beside the steps; None: they do not."""
        return self.async_checkpointer_type if self.async_save else None
