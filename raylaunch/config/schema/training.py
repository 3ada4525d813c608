"""How it is trained: `optimizer:`, `step_scheduler:`, `distributed:` and `checkpoint:`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raylaunch.config.schema.base import NotNegative, Positive, Section, Share


class OptimizerConfig(Section):
    """`optimizer:` the optimizer."""

    name: Literal["adamw"] = "adamw"
    """The optimizer. Example: `adamw`."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate. Example: `0.0003`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay, of matrices only. Example: `0.05`."""
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """AdamW's betas. Example: `[0.9, 0.99]`."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon. Example: `1.0e-10`."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip gradients to this global norm. `null`: do not clip. Example: `0.5`."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the trained weights, with this decay. It is validated as `val_loss_ema`,
    and it is what `checkpoint.save_consolidated` writes. Example: `0.999`."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do when the loss or a gradient is NaN or infinite: end the run (`stop`), leave out the step (`skip`), or
    go back to the last checkpoint and leave out the batch (`rollback`). The last two wait for the result of each step
    before the update. Example: `skip`."""


class StepSchedulerConfig(Section):
    """`step_scheduler:` batch sizes, the number of steps, the learning rate schedule, and how often to save and
    validate."""

    max_steps: Positive = 200
    """Number of optimizer steps of the run. Example: `10000`."""
    local_batch_size: Positive = 8
    """Samples per worker and forward pass (micro-batch). Example: `4`."""
    grad_acc_steps: Positive | None = None
    """Forward passes per step at the initial number of workers. It fixes the global batch size for the rest of the run.
    Example: `8`."""
    global_batch_size: Positive | None = None
    """Samples per step, constant at any number of workers. Default: `local_batch_size` times `grad_acc_steps` times the
    number of workers at the start. Example: `512`."""
    ckpt_every_steps: Positive = 50
    """Steps between two checkpoints. Example: `500`."""
    val_every_steps: NotNegative = 50
    """Steps between two validations. 0: never validate. Example: `500`."""
    val_batches: Positive = 4
    """Batches per validation. Example: `16`."""
    warmup_steps: NotNegative = 10
    """Steps of linear learning rate warm-up. Example: `200`."""
    lr_decay_style: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate schedule after the warm-up. `wsd` (warm-up, stable, decay) is constant, then linear over the last
    `lr_decay_steps`. Example: `wsd`."""
    lr_decay_steps: Positive | None = None
    """Length of the decay of `wsd`. Default: a tenth of `max_steps`. Example: `1000`."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final learning rate, as a fraction of `optimizer.lr`. Example: `0.01`."""

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
    """`distributed:` how the model is distributed over the workers."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = "fsdp"
    """`ddp`: each worker holds the whole model. `fsdp`: the model is sharded over all workers. `hsdp`: sharded within a
    node, replicated across nodes. Example: `hsdp`."""
    tp_size: Positive = 1
    """Tensor parallel size: workers that share the matrix products of each layer (with sequence parallelism). Best
    within a node. Example: `2`."""
    cp_size: Positive = 1
    """Context parallel size: workers that share the tokens of each sample. Example: `2`."""
    pp_size: Positive = 1
    """Pipeline parallel size: number of stages. More micro-batches per step (see `step_scheduler.local_batch_size`)
    reduce idle time. Example: `2`."""
    ep_size: Positive = 1
    """Expert parallel size: workers that share the experts of each block. Example: `4`."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes to save memory: nothing, everything except matrix products and attention
    (`selective`), or the whole block (`full`). Example: `selective`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the computation. `auto`: bfloat16 on GPUs, float32 on CPUs. Parameters are kept in float32. Example:
    `bfloat16`."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in CPU memory, and copy them to the GPU block by block. Example:
    `true`."""
    float8: bool = False
    """Compute matrix products in float8, on GPUs that support it (H100 and newer). Needs `raylaunch[float8]`. Example:
    `true`."""
    compile: bool = False
    """Compile each block with `torch.compile`. The result is cached in the run directory for the next attempt. Not with
    `tp_size`. Example: `true`."""
    comm_timeout: Positive = 600
    """Seconds after which an incomplete collective is an error. Example: `1800`."""

    @property
    def model_parallel(self) -> int:
        """Workers that share one replica of the model: a world has a multiple of these. (Data-parallel workers share the experts.)"""
        return self.pp_size * math.lcm(self.tp_size * self.cp_size, self.ep_size)


class CheckpointConfig(Section):
    """`checkpoint:` where checkpoints are saved, how, and how many are kept."""

    checkpoint_dir: str | None = None
    """Directory for checkpoints, shared by all nodes. Each run gets a subdirectory. Default: `checkpoints` in the run
    directory. Example: `/shared/checkpoints`."""
    keep_last_n_checkpoints: Positive = 2
    """Number of most recent checkpoints to keep. Example: `3`."""
    keep_every_n_steps: NotNegative = 0
    """Also keep the checkpoint of every Nth step forever. 0: none. Example: `10000`."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest `val_loss`, of those saved right after a validation. Example: `true`."""
    async_save: bool = False
    """Save in the background: training waits for a copy of the state in memory, not for the storage. Example:
    `true`."""
    async_checkpointer_type: Literal["thread", "process"] = "thread"
    """What writes the copy: a `thread` of the worker, or a separate `process` (about 0.4 GB each), which avoids
    contention for the GIL. Example: `process`."""
    save_consolidated: bool = False
    """Export the weights as safetensors to `model` in the run directory when the run has finished. The run counts as
    finished before the export, which may take two hours at most, or one minute once another run is waiting. If it
    fails, the event `export_failed` has the command to repeat it. Example: `true`."""

    @property
    def background(self) -> Literal["thread", "process"] | None:
        """Where saves run beside the steps; None: they do not."""
        return self.async_checkpointer_type if self.async_save else None
