"""The training loop: FSDP2 over all workers, exact at any number of them.

Set up → data → model, sharded → the newest commit, or fresh values → steps → a last checkpoint.
A step: micro-batches forward and backward, one small all-reduce (loss, gradient norm, the wish to
stop), clip, AdamW. What a step reports is read when it is there: on a GPU while the next one runs,
so a stop takes effect one step later, on all ranks at the same one.
Refused: a checkpoint of other data or another global batch; a loss that is no number.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from raylaunch.checkpoint import dcp
from raylaunch.config import Config
from raylaunch.errors import RunError
from raylaunch.session import Session
from trainers import corpus, parallel
from trainers.data import Loader, MicroBatch, Plan
from trainers.metrics import Meter, StepStats
from trainers.model import Decoder, rotary_tables
from trainers.optim import (
    learning_rate,
    local_gradients,
    make_optimizer,
    set_learning_rate,
    state_tensors,
)


def train(config: Config, session: Session) -> None:
    """One attempt: from the newest commit to max_steps, or to the step at which a stop is asked for."""
    steps = config.step_scheduler
    device = set_up_device(session)
    group = dcp.make_group(config.distributed.comm_timeout)

    store = corpus.prepare(
        session.run_dir / "data",
        config.data.text,
        rank=session.rank,
        attempt=session.attempt,
        silence=config.distributed.comm_timeout,
    )
    loader = make_loader(config, session, store, pin=device.type == "cuda")

    with torch.device("meta"):
        model = Decoder(config.model)
    mesh = parallel.make_mesh(device, session.world_size)
    sharded = parallel.shard(model, mesh, config.distributed, device)
    parallel.materialize(model, device)
    optimizer = make_optimizer(model, config.optimizer)
    tables = rotary_tables(config.model, config.data.seq_len, device)

    keep, background = config.checkpoint.keep_last_n_checkpoints, config.checkpoint.async_save
    saver = dcp.Saver(session, group, keep=keep, background=background)
    tensors = state_tensors(model, optimizer)
    facts = data_facts(config, session, loader)
    first = resume(session, group, tensors, facts)
    if first == 0:
        parallel.initialize(model, config.data.seed, device)

    tokens_per_step = session.global_batch_size * config.data.seq_len
    meter = Meter(config, session, first_step=first, tokens_per_step=tokens_per_step, device=device)
    step, stop = first, first >= steps.max_steps
    while not stop:
        lr = learning_rate(step, config.optimizer.lr, steps)
        set_learning_rate(optimizer, lr)
        stats = StepStats(device, stop=session.stop_requested())
        forward_backward(model, sharded, loader.training(step), tables, tokens_per_step, stats)
        gradients = local_gradients(model)
        stats.exchange(gradients)
        if config.optimizer.max_grad_norm is not None:
            clip(gradients, stats.gradient_norm(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        meter.push(step, lr, stats)
        last = step == steps.max_steps or meter.stop
        if last or step % steps.ckpt_every_steps == 0:
            meter.flush()  # raises rather than letting a step without a finite loss be saved
        stop = last or meter.stop
        with meter.paused():
            if steps.val_every_steps and (step % steps.val_every_steps == 0 or step == steps.max_steps):
                validate(model, loader.validation(steps.val_batches), tables, session, step)
            if stop or step % steps.ckpt_every_steps == 0:
                saver.save(step, tensors, facts)
        saver.check()

    saver.wait()
    loader.close()
    session.finish("finished" if step >= steps.max_steps else "stopped", step)


def set_up_device(session: Session) -> torch.device:
    """Select the GPU, or use as many threads as this worker has CPUs."""
    device = torch.device(session.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, session.cpus))
    return device


def make_loader(config: Config, session: Session, store: corpus.Store, pin: bool) -> Loader:
    plan = Plan(
        seq_len=config.data.seq_len,
        seed=config.data.seed,
        global_batch_size=session.global_batch_size,
        local_batch_size=config.step_scheduler.local_batch_size,
        rank=session.rank,
        world_size=session.world_size,
    )
    return Loader(store, plan, val_fraction=config.data.val_fraction, pin=pin)


def data_facts(config: Config, session: Session, loader: Loader) -> dict[str, int]:
    """What must not change over a run's life, or a step would no longer name the same samples."""
    return {
        "global_batch_size": session.global_batch_size,
        "seq_len": config.data.seq_len,
        "seed": config.data.seed,
        "training_samples": loader.training_samples,
    }


def resume(
    session: Session, group: dist.ProcessGroup, tensors: dict[str, Tensor], facts: dict[str, int]
) -> int:
    """Load the newest commit into the tensors; the number of steps done so far (0: nothing to load)."""
    started = time.monotonic()
    commit = dcp.newest(session.checkpoint_dir, group)
    if commit is None:
        return 0
    saved = commit.facts
    changed = [f"{key}: {saved.get(key)} → {now}" for key, now in facts.items() if saved.get(key) != now]
    if changed:
        raise RunError(
            f"the checkpoint {commit.path} belongs to another order of samples ({', '.join(changed)})",
            "Restore these settings and the text, or start a run with a new name.",
        )
    dcp.load(commit, tensors, group)
    session.event("resumed", step=commit.step, seconds=round(time.monotonic() - started, 3))
    return commit.step


def forward_backward(
    model: Decoder,
    sharded: FSDPModule,
    batches: list[MicroBatch],
    tables: tuple[Tensor, Tensor],
    tokens_per_step: int,
    stats: StepStats,
) -> None:
    """Gradients of the step's mean loss per token; they are exchanged after the last micro-batch only."""
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        sharded.set_requires_gradient_sync(last)
        sharded.set_is_last_backward(last)
        loss = summed_loss(model, batch, tables)
        (loss / tokens_per_step).backward()  # type: ignore[no-untyped-call]
        stats.add(loss, batch.samples)


def summed_loss(model: Decoder, batch: MicroBatch, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy summed over the micro-batch's real tokens, float32."""
    batch = batch.to(tables[0].device)
    logits = model(batch.inputs, *tables)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none")
    return (losses.view_as(batch.targets).sum(dim=1) * batch.weights).sum()


@torch.no_grad()
def clip(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale the shards so that the norm of the whole gradient is at most max_norm; no host sync."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale.to(torch.float32))


@torch.no_grad()
def validate(
    model: Decoder, batches: list[MicroBatch], tables: tuple[Tensor, Tensor], session: Session, step: int
) -> None:
    """Report the mean loss per token on the held-out samples, the same ones each time."""
    if not batches:
        return
    totals = torch.zeros(2, dtype=torch.float64, device=tables[0].device)
    for batch in batches:
        totals[0] += summed_loss(model, batch, tables)
        totals[1] += batch.samples * batch.targets.shape[1]
    dist.all_reduce(totals)
    loss, tokens = totals.tolist()
    session.report(step=step, val_loss=loss / tokens)
