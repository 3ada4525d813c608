"""Bytes that a block keeps of a micro-batch for its backward pass, and that this pass needs in addition.

The model follows `trainers.decoder`, `expert_parallel` and `activation_checkpointing` operation by operation and counts
each tensor that autograd saves once. CPU and GPU differ in the norms: on a GPU, a norm keeps its input and one number
per token; on a CPU, it keeps its float32 intermediates. Experts are assumed to be evenly loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from raylaunch.config.schema import Config
from raylaunch.tools.plan.model_shape import Shape

LONG = 8
"""Bytes of an index."""
FLOAT = 4


@dataclass(frozen=True)
class BlockActivations:
    """One block on one worker. `width`: bytes per element in the computation. `rows`: samples of a micro-batch.
    `tokens`: tokens in this worker's matrix products; `residual`: tokens between them (sequence parallel)."""

    shape: Shape
    on_gpu: bool
    width: int
    tp: int
    cp: int
    ep: int
    rows: int
    seq_len: int
    masked: bool
    recompute: str

    @classmethod
    def of(cls, config: Config, shape: Shape, *, on_gpu: bool, width: int, masked: bool) -> BlockActivations:
        plan, steps = config.distributed, config.step_scheduler
        how = "full" if shape.theirs and plan.activation_checkpointing != "none" else plan.activation_checkpointing
        sizes = plan.tp_size, plan.cp_size, plan.ep_size
        return cls(shape, on_gpu, width, *sizes, steps.local_batch_size, config.data.seq_len, masked, how)

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len // self.cp

    @property
    def residual(self) -> int:
        return self.tokens // self.tp

    @property
    def stream(self) -> int:
        """The residual stream at one place."""
        return self.width * self.residual * self.shape.dim

    @property
    def norm(self) -> int:
        """What a norm keeps besides its result, including its input."""
        whole = self.residual * self.shape.dim
        if self.shape.theirs:  # unfused, in float32; with a frozen weight, the factor is not kept
            return (FLOAT + (0 if self.shape.lora else self.width)) * whole
        if self.on_gpu:
            return self.stream + FLOAT * self.residual
        return 2 * FLOAT * whole + FLOAT * self.residual

    @property
    def normed(self) -> int:
        """The result of a norm, as input of the matrix products."""
        return self.width * self.tokens * self.shape.dim

    @property
    def _queries(self) -> int:
        return self.width * self.tokens * self.shape.q_dim // self.tp

    @property
    def _keys(self) -> int:
        """Keys, or values; with context parallel, of all workers. With a mask, transformers repeats them per head."""
        size = self.shape.q_dim if self.shape.theirs and self.masked else self.shape.kv_dim
        return self.width * self.rows * self.seq_len * size // self.tp

    @property
    def _attention(self) -> int:
        """Kept by attention itself: queries, keys, values, its result, and one number per token and head."""
        sums = FLOAT * self.tokens * self.shape.n_heads // self.tp
        mask = self.width * self.rows * (self.seq_len // self.cp) * self.seq_len if self.masked else 0
        copy = 0 if self.shape.theirs else self._queries  # transformers' layout needs no copy
        return 2 * self._queries + 2 * self._keys + sums + mask + copy

    @property
    def _hidden(self) -> int:
        """One hidden vector of the feed-forward network for every token (or token and chosen expert)."""
        return self.width * self.tokens * max(1, self.shape.chosen) * self.shape.ffn_dim // self.tp

    @property
    def _sent(self) -> int:
        """The tokens on their way to the experts and back."""
        return self.width * self.tokens * self.shape.chosen * self.shape.dim

    @property
    def _feed_forward(self) -> int:
        """Kept between the norm and the residual stream."""
        if not self.shape.n_experts:
            return 4 * self._hidden + self._adapters
        router = self.tokens * (FLOAT * self.shape.n_experts + (2 * LONG + 2 * FLOAT) * self.shape.chosen)
        return 4 * self._hidden + (4 if self.ep > 1 else 3) * self._sent + router

    @property
    def _adapters(self) -> int:
        """Kept by LoRA's products: the intermediate result and, with dropout, the inputs after dropout."""
        inputs = sum(into for _, into in self.shape.products) if self.shape.dropout else 0
        between = self.shape.lora * len(self.shape.products) if self.shape.lora else 0
        return self.tokens * (self.width * between + (self.width + 1) * inputs)

    @property
    def _whole(self) -> int:
        """Kept without recomputation."""
        return 2 * (self.norm + self.normed) + self._attention + self._feed_forward

    @property
    def kept(self) -> int:
        """Between forward and backward."""
        if self.recompute == "none":
            return self._whole
        if self.recompute == "full":
            return self.stream
        return self.stream + self._products

    @property
    def _products(self) -> int:
        """What `selective` keeps: the results of products and of attention."""
        out = self.normed  # of wo, and of down, before it is shared out over the tokens
        into = self._queries + 2 * self.width * self.tokens * self.shape.kv_dim // self.tp
        attention = self._queries + FLOAT * self.tokens * self.shape.n_heads // self.tp
        ends = self._sent if self.shape.n_experts else out
        return into + attention + out + 2 * self._hidden + ends

    @property
    def backward(self) -> list[tuple[int, int]]:
        """The peaks of the backward pass: (bytes of activations and their gradients, including recomputed ones;
        elements of the unsharded weight gradients at this point)."""
        shape = self.shape
        d, f = shape.dim, shape.ffn_dim
        gradient = self.stream + (self.normed if self.tp > 1 else 0)
        attention = 2 * (self.norm + self.normed) + self._attention + 3 * self._queries + 2 * self._keys
        if shape.n_experts:
            here = shape.n_experts // self.ep
            # Each expert's gradient is as large as that of all experts, and is added to the sum.
            weights = (4 * here + 1) * d * f
            inside = self._whole - self._sent + 3 * self._hidden // here
            found = [(self._whole + 2 * self._sent, 0), (inside, weights), (attention, 3 * here * d * f)]
        else:
            late = self.normed if self.recompute == "selective" else 0
            # Gradients of three weights; one of the kept activations is already released.
            down = 0 if shape.lora else d * f // self.tp
            found = [(self._whole + late + 2 * self._hidden, down), (attention + self._adapters, 3 * down)]
        return [(gradient + activations, weights) for activations, weights in found]

    @property
    def behind(self) -> int:
        """After the backward pass of the block: the gradient of its input."""
        return self.stream
