"""Peak memory of one GPU during a training step, by cause.

    stages and blocks → the moments of a step, each with its bytes by cause → the peak

The moments are those that can be the peak: creation of parameters and optimizer states, the loss, each block's backward
pass and exchange of gradients, and the end of the backward pass. Of a pipeline, the stage with the highest peak counts.
Memory saved by torch.compile and float8 is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from raylaunch.config.schema import Config
from raylaunch.tools.plan import sharding
from raylaunch.tools.plan.activations import FLOAT, BlockActivations
from raylaunch.tools.plan.model_shape import Shape
from raylaunch.tools.plan.sharding import PlannedWorld, Stage, Unit

CAUSES = {
    "parameters": "this worker's shards, float32",
    "optimizer": "AdamW's two states, float32",
    "gradients": "float32 shards, and unsharded ones until they are exchanged",
    "experts": "parameters, optimizer and gradients of the experts, divided by ep_size and FSDP's shards, not by tp_size",
    "average": "optimizer.ema",
    "gathered": "parameters gathered by FSDP for the computation",
    "exchange": "buffers to gather parameters and to reduce gradients",
    "activations": "tensors of the forward pass that the backward pass needs",
    "logits": "logits, their softmax and the gradients of both",
    "runtime": "CUDA, NCCL and cuBLAS (assumed)",
}
RUNTIME = 2 << 30
"""Bytes of a GPU process before its first tensor and for its communicators; an assumption."""

Bytes = Counter[str]


@dataclass(frozen=True)
class Peak:
    """`host`: bytes of host memory that this worker needs for offloading and for checkpoint copies."""

    moment: str
    stage: int
    bytes: Bytes
    host: int

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def width_of(config: Config, on_gpu: bool) -> int:
    """Bytes per element in the computation, as in `trainers.parallel.make_layout`."""
    dtype = config.distributed.dtype
    return 2 if dtype == "bfloat16" or (dtype == "auto" and on_gpu) else FLOAT


def peak(config: Config, shape: Shape, where: PlannedWorld, *, on_gpu: bool, masked: bool = False) -> Peak:
    """The peak of the stage with the highest peak."""
    width = width_of(config, on_gpu)
    block = BlockActivations.of(config, shape, on_gpu=on_gpu, width=width, masked=masked)
    found = [
        _Step(config, shape, where, stage, block, on_gpu).peak()
        for stage in sharding.stages(config, shape, where, width)
    ]
    return max(found, key=lambda one: one.total)


class _Step:
    """A step on one worker of a stage."""

    def __init__(
        self, config: Config, shape: Shape, where: PlannedWorld, stage: Stage, block: BlockActivations, on_gpu: bool
    ) -> None:
        self._config, self._shape, self._where = config, shape, where
        self._stage, self._block, self._on_gpu = stage, block, on_gpu
        self._width = block.width
        self._offloaded = config.distributed.cpu_offload and on_gpu
        self._accumulates = where.passes > 1
        held = min(config.distributed.pp_size - stage.number, where.passes)
        self._waiting = held - 1  # micro-batches of a pipeline besides the one in its backward pass

    def peak(self) -> Peak:
        name, found = max(self._moments(), key=lambda moment: sum(moment[1].values()))
        return Peak(name, self._stage.number, found + Counter(runtime=RUNTIME if self._on_gpu else 0), self._host)

    # -- permanent state ---------------------------------------------------------------------------------

    @property
    def _units(self) -> list[tuple[Unit, int]]:
        """All units, each with its count."""
        return [(unit, self._stage.blocks) for unit in self._stage.block] + [(self._stage.root, 1)]

    def _state(self) -> Bytes:
        found: Bytes = Counter()
        for unit, count in self._units:
            for are_experts in (False, True):
                part = unit.of_experts(are_experts)
                trained = count * part.shard(True)
                weights = FLOAT * trained + self._shape.frozen_width * (count * part.shard() - trained)
                found["experts" if are_experts else "parameters"] += weights
                found["experts" if are_experts else "optimizer"] += 2 * FLOAT * trained
                found["average"] += FLOAT * trained if self._config.optimizer.ema is not None else 0
        return found

    @property
    def _host(self) -> int:
        """Bytes of host memory: offloaded states, and the copies of an asynchronous save."""
        state = sum(self._state().values())
        trained = sum(count * unit.shard(True) for unit, count in self._units)
        copies = trained * FLOAT * (4 if self._config.optimizer.ema is not None else 3)
        offloaded = state + FLOAT * trained if self._offloaded else 0
        return offloaded + (copies if self._config.checkpoint.async_save else 0)

    # -- the moments -------------------------------------------------------------------------------------

    def _moments(self) -> Iterator[tuple[str, Bytes]]:
        state = Counter() if self._offloaded else self._state()
        largest = FLOAT * max(unit.largest for unit, _ in self._units)
        yield "the creation of the parameters", state + Counter(parameters=largest)
        for name, found in self._pass():
            yield name, state + found
        gradients = sum(count * self._reduced(unit) for unit, count in self._units)
        yield "the optimizer step", state + Counter(gradients=gradients)

    def _pass(self) -> Iterator[tuple[str, Bytes]]:
        """The last micro-batch of a step."""
        stage, block = self._stage, self._block
        waiting: Bytes = Counter(activations=self._waiting * (stage.blocks * block.kept + 2 * block.stream))
        waiting["gathered"] = self._width * stage.root.whole()
        accumulated = [self._accumulated(unit) for unit in stage.block]
        root = self._accumulated(stage.root)
        gathered = sum(self._width * unit.whole() for unit in stage.block)
        # In the forward pass, FSDP keeps the previous block's buffer until the next one is gathered; gloo has a copy.
        ahead = waiting + Counter(activations=(stage.blocks - 1) * block.kept)
        ahead["exchange"] += (2 if self._on_gpu else 3) * self._gathering
        if stage.gathered:
            ahead["gathered"] += (stage.blocks - 1) * gathered
        else:
            ahead["gradients"] += root + stage.blocks * sum(accumulated)
        yield "the gathering of the last block", ahead
        if stage.has_head:
            kept = stage.blocks * block.kept + block.norm + (0 if self._shape.lora else block.normed)
            base = waiting + Counter(activations=kept, gradients=root + stage.blocks * sum(accumulated))
            base["gathered"] += gathered * stage.blocks if stage.gathered else 0
            for name, bytes_ in self._loss():
                yield name, base + bytes_
        head = self._head_gradient if stage.has_head else 0
        reduced = sum(self._reduced(unit) for unit in stage.block)
        # Between these blocks, the sum changes linearly, so the first and last ones are enough.
        for left in sorted({stage.blocks - 1, stage.blocks - 2, 1, 0} & set(range(stage.blocks)), reverse=True):
            done = (stage.blocks - 1 - left) * reduced
            base = waiting + Counter(
                activations=left * block.kept, gradients=root + head + left * sum(accumulated) + done
            )
            if stage.gathered:
                base["gathered"] += left * gathered
            elif left:
                base["exchange"] += self._gathering
            yield from self._through_block(base, accumulated, first=left == stage.blocks - 1)
        base = waiting + Counter(gradients=stage.blocks * reduced)
        base["gathered"] = 0  # the parameters outside the blocks are released before, too
        yield from self._exchange(
            "the exchange of the remaining gradients", base, stage.root, root or self._fresh(stage.root)
        )

    def _loss(self) -> Iterator[tuple[str, Bytes]]:
        """Logits [tokens, vocabulary], their softmax and its gradient, in float32 each; then the head's gradient."""
        block, shape = self._block, self._shape
        logits = block.tokens * shape.vocab_size
        yield "the loss computation", Counter(logits=3 * FLOAT * logits)
        narrow = self._width * logits
        work = narrow + (FLOAT * logits if self._width < FLOAT else 0)
        work = max(work, narrow * (2 if block.tp > 1 else 1) + block.normed)
        yield "the backward pass of the head", Counter(logits=work, gradients=self._head_gradient)

    def _through_block(self, base: Bytes, accumulated: list[int], *, first: bool) -> Iterator[tuple[str, Bytes]]:
        """A block's backward pass, then the exchange of its gradients, unit by unit."""
        block, units = self._block, self._stage.block
        inside = base + Counter(
            gathered=sum(self._width * unit.whole() for unit in units),
            gradients=sum(accumulated),
            exchange=0 if first else self._buffer(units[-1]),  # the buffer of the block after it is kept until the next
        )
        fresh = sum(self._fresh(unit) for unit in units)
        for activations, weights in block.backward:
            made = self._width * weights if self._shape.n_experts else min(self._width * weights, fresh)
            yield "the backward pass of a block", inside + Counter(activations=activations, gradients=made)
        yield "the end of the backward pass of a block", inside + Counter(activations=block.behind, gradients=fresh)
        if not self._on_gpu and base["exchange"]:  # gloo has a copy of the data in transfer
            kept = Counter(activations=block.kept, exchange=base["exchange"])
            yield "the gathering of the next block", inside + kept
        whole = [a or self._fresh(unit) for a, unit in zip(accumulated, units, strict=True)]
        for number, unit in enumerate(units):
            others = Counter(
                activations=block.behind,
                gradients=sum(whole[number + 1 :]) + sum(self._reduced(u) for u in units[:number]),
            )
            yield from self._exchange("the exchange of gradients", base + others, unit, whole[number])

    def _exchange(self, name: str, base: Bytes, unit: Unit, gradients: int) -> Iterator[tuple[str, Bytes]]:
        """Copy unsharded gradients to the buffer, then reduce them to this worker's shard of the sum."""
        buffer = self._buffer(unit)
        yield name, base + Counter(gradients=gradients, exchange=buffer)
        shard = FLOAT * unit.shard(True)
        copy = buffer if unit.shards == 1 or not self._on_gpu else 0  # divided; gloo's own
        yield name + ", halfway", base + Counter(gradients=shard, exchange=buffer + copy)

    # -- their parts -------------------------------------------------------------------------------------

    @property
    def _head_gradient(self) -> int:
        """The head's unsharded gradient, which the backward pass creates first."""
        head = Unit(tuple(p.part(self._block.tp, 1) for p in self._shape.last), 1)
        return self._fresh(head)

    def _accumulated(self, unit: Unit) -> int:
        """Gradients of the previous micro-batches: unsharded, in float32."""
        return FLOAT * unit.own(True) if self._accumulates else 0

    def _fresh(self, unit: Unit) -> int:
        """New gradients of this micro-batch; in float32, each is added to the accumulated ones immediately."""
        if self._accumulates and self._width == FLOAT:
            return FLOAT * max((p.size for p in unit.parameters if p.trained), default=0)
        return self._width * unit.own(True)

    def _reduced(self, unit: Unit) -> int:
        return 0 if self._offloaded else FLOAT * unit.shard(True)

    def _buffer(self, unit: Unit) -> int:
        """The buffer for reducing gradients."""
        return FLOAT * unit.whole(True)

    @property
    def _gathering(self) -> int:
        """Buffers of the next block; an offloaded shard is first copied to the GPU as it is."""
        copied = FLOAT if self._offloaded else 0
        units = [unit for unit in self._stage.block if unit.shards > 1]
        return sum(self._width * unit.whole() + copied * unit.shard() for unit in units)
