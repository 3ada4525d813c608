"""The training loop: FSDP2 over all workers, exact at any number of them.

Set up → data → model, sharded → the newest commit, or fresh values → steps → a last checkpoint.
A step: micro-batches forward and backward, one small all-reduce (loss, gradient norm, wish to stop),
clip, AdamW. What a step measured is read when it is there: on a GPU while the next one runs, so that
a stop takes effect one step later; always on all ranks at the same step.
Refused: a checkpoint of other data or another global batch; a loss that is no number.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from raylaunch.checkpoint import dcp
from raylaunch.config import Config
from raylaunch.errors import RunError
from raylaunch.session import Session
from trainers import corpus, parallel
from trainers.data import Loader, MicroBatch, Plan
from trainers.metrics import Meter, StepStats
from trainers.model import Decoder
from trainers.optim import learning_rate, local_gradients, make_optimizer, set_learning_rate, state_tensors


def train(config: Config, session: Session) -> None:
    """One attempt: from the newest commit to max_steps, or to the step at which a stop is asked for."""
    steps = config.step_scheduler
    started = time.monotonic()
    device = set_up_device(session)
    group = dcp.make_group(config.distributed.comm_timeout)
    loader = make_loader(config, session, pin=device.type == "cuda")
    data_ready = time.monotonic()

    with torch.device("meta"):
        model = Decoder(config.model)
    layout = parallel.make_layout(model, config, device, session.world_size)
    parallel.shard(model, layout, compile_blocks=config.distributed.compile)
    parallel.materialize(model, layout, config.data.seq_len)
    optimizer = make_optimizer(model, config.optimizer)
    model_ready = time.monotonic()
    seconds = {"data": round(data_ready - started, 3), "model": round(model_ready - data_ready, 3)}
    session.event("built", parameters=sum(p.numel() for p in model.parameters()), seconds=seconds)

    keep, background = config.checkpoint.keep_last_n_checkpoints, config.checkpoint.async_save
    saver = dcp.Saver(session, group, keep=keep, background=background)
    tensors, facts = state_tensors(model, optimizer), data_facts(config, session, loader)
    step = resume(session, group, tensors, facts)
    if step == 0:
        parallel.initialize(model, layout, config.data.seed)

    tokens_per_step = session.global_batch_size * config.data.seq_len
    meter = Meter(config, session, done=step, tokens_per_step=tokens_per_step, device=device)
    while step < steps.max_steps and not meter.stop:
        lr = learning_rate(step, config.optimizer.lr, steps)
        set_learning_rate(optimizer, lr)
        stats = StepStats(device, stop=session.stop_requested(), save_failed=saver.failed())
        forward_backward(model, layout, loader.training(step), tokens_per_step, stats)
        gradients = local_gradients(model)
        stats.exchange(gradients)
        if config.optimizer.max_grad_norm is not None:
            clip(gradients, stats.gradient_norm(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        meter.push(step, lr, stats)
        if meter.save_failed:
            saver.give_up()
        ends = step == steps.max_steps
        save = ends or meter.stop or step % steps.ckpt_every_steps == 0
        if save:
            meter.flush()  # raises, rather than let a step without a finite loss be saved
        with meter.paused():
            if steps.val_every_steps and (ends or step % steps.val_every_steps == 0):
                validate(model, loader.validation(steps.val_batches), device, session, step)
            if save:
                saver.save(step, tensors, facts)

    saver.close()
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


def make_loader(config: Config, session: Session, *, pin: bool) -> Loader:
    """The run's token store (made by rank 0 if need be), and what this rank reads of it."""
    store = corpus.prepare(
        session.run_dir / "data",
        config.data.text,
        rank=session.rank,
        attempt=session.attempt,
        silence=config.distributed.comm_timeout,
    )
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


def resume(session: Session, group: dist.ProcessGroup, tensors: dict[str, Tensor], facts: dict[str, int]) -> int:
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
    model: Decoder, layout: parallel.Layout, batches: list[MicroBatch], tokens_per_step: int, stats: StepStats
) -> None:
    """Gradients of the step's mean loss per token, summed over the micro-batches and the ranks."""
    for index, batch in enumerate(batches):
        parallel.begin_pass(model, layout, last=index == len(batches) - 1)
        loss = summed_loss(model, batch.to(layout.device))
        (loss / tokens_per_step).backward()  # type: ignore[no-untyped-call]
        stats.add(loss, batch.samples)


def summed_loss(model: Decoder, batch: MicroBatch) -> Tensor:
    """Cross-entropy summed over the micro-batch's real tokens, float32."""
    logits: Tensor = model(batch.inputs)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none")
    return (losses.view_as(batch.targets).sum(dim=1) * batch.weights).sum()


@torch.no_grad()
def clip(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale the shards so that the norm of the whole gradient is at most max_norm, without a host sync."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
    torch._foreach_mul_(gradients, scale)


@torch.no_grad()
def validate(model: Decoder, batches: list[MicroBatch], device: torch.device, session: Session, step: int) -> None:
    """Report the mean loss per token on the held-out samples, the same ones each time."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        totals[0] += summed_loss(model, batch.to(device))
        totals[1] += batch.samples * batch.targets.shape[1]
    dist.all_reduce(totals)
    loss, tokens = totals.tolist()
    if tokens:  # none when nothing is held out
        session.report(step=step, val_loss=loss / tokens)
