"""The training loop: FSDP2 over all workers, exact at any number of them.

Set up → data → model, sharded → the newest commit, or fresh values → steps → a last checkpoint.
A step: micro-batches forward and backward, one small all-reduce (loss, tokens that count, gradient norm,
wish to stop), clip, AdamW. What a step measured is read when it is there: on a GPU while the next one runs, so that
a stop takes effect one step later; always on all ranks at the same step. A save that fails does not
end training, but the last one is tried again for a while.
Refused: a checkpoint of other data or another global batch; a loss that is no number (`nonfinite`).
"""

from __future__ import annotations

import functools
import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from raylaunch.checkpoint import saver
from raylaunch.checkpoint.resume import resume
from raylaunch.config.schema import Config
from raylaunch.errors import RunError
from raylaunch.state import runs
from raylaunch.state.run_events import ModelBuilt
from raylaunch.timing import PATIENCE_AT_END, PATIENCE_AT_STOP
from raylaunch.trainers import float8, memory_snapshot, models, parallel, safetensors_io
from raylaunch.trainers.batches import IGNORED, Loader, MicroBatch, Plan
from raylaunch.trainers.compile import Compiled
from raylaunch.trainers.datasets import Data, is_masked, look, open_data
from raylaunch.trainers.ema import Average
from raylaunch.trainers.models import LanguageModel
from raylaunch.trainers.nonfinite import Action, Guard
from raylaunch.trainers.optim import (
    learning_rate,
    local_gradients,
    make_optimizer,
    reset_states,
    set_learning_rate,
    state_tensors,
    trained,
)
from raylaunch.trainers.pipeline_parallel import Pipeline
from raylaunch.trainers.profiling import Profile
from raylaunch.trainers.safetensors_io import export
from raylaunch.trainers.step_metrics import Meter, StepStats
from raylaunch.training.worker.seeding import seed_step
from raylaunch.training.worker.session import AT_COMMIT, NOW, Session

__all__ = ["check", "export", "train"]


def train(config: Config, session: Session) -> None:
    """One attempt: from the newest commit to max_steps, or to the step at which a stop is asked for."""
    with memory_snapshot.on_out_of_memory(session, wanted=config.logging.memory_snapshots):
        Training(config, session).run()


class Training:
    """One attempt: the model, its data, and what is known of the steps."""

    def __init__(self, config: Config, session: Session) -> None:
        self.config, self.session = config, session
        session.progress(0, "load")
        started = time.monotonic()
        self.device = device = set_up_device(session)
        self.group = saver.make_group(config.distributed.comm_timeout)
        self.data = open_data(config, session)
        self.place = place = parallel.MeshCoordinates.of(config, session.rank, session.world_size)
        self.loader = make_loader(config, session, self.data, place, pin=device.type == "cuda")
        data_ready = time.monotonic()

        with torch.device("meta"):
            self.model = model = models.make(config, place.stage)
        refuse_masks(model, masked=self.data.masked)
        if config.distributed.float8:
            float8.convert(model, device)
        self.layout = layout = parallel.make_layout(model, config, device, session)
        self.compiled = Compiled(session, device, layout.inside_blocks, wanted=config.distributed.compile)
        self.compiled.load()
        parallel.shard(model, layout, compile_blocks=config.distributed.compile)
        parallel.materialize(model, layout, config.data.seq_len)
        self.replicas = [parallel.replicas(p) for p in trained(model) if isinstance(p, DTensor)]
        self.pipeline = make_pipeline(model, layout, config) if place.stage[1] > 1 else None
        self.optimizer = make_optimizer(model, config.optimizer)
        self.average = Average(model, config.optimizer.ema)
        model_ready = time.monotonic()
        seconds = {"data": round(data_ready - started, 3), "model": round(model_ready - data_ready, 3)}
        session.record(ModelBuilt(sum(p.numel() for p in model.parameters()), seconds))

        self.saves = saver.Saver(
            session, self.group, keep=runs.keep(config), background=config.checkpoint.background,
            timeout=config.distributed.comm_timeout,
        )  # fmt: skip
        self.tensors = state_tensors(model, self.optimizer) | self.average.tensors
        fill(model, False, device, config.data.seed)
        self.tokens_per_step = session.global_batch_size * config.data.seq_len
        self.guard = Guard(config.optimizer.on_nonfinite, session)
        self.profile = Profile(config.logging.profile_steps, session)

    def run(self) -> None:
        """Step by step, to max_steps or to the step at which a stop is asked for."""
        session, max_steps = self.session, self.config.step_scheduler.max_steps
        step = self.restore()
        self.meter = Meter(
            self.config, session, self.guard, done=step, tokens_per_step=self.tokens_per_step, device=self.device
        )
        left = False
        while step < max_steps and not left:
            session.progress(step, "step")
            self.profile.begin(step + 1)
            action = self.train_step(step) if step + 1 not in self.guard.left_out else Action.SKIP
            if action is Action.ROLLBACK:
                self.saves.wait()  # what is under way may become the last commit
                step = self.restore()
                self.meter.rewind(step)
                continue
            step += 1
            self.profile.end(step)
            self.compiled.keep()
            left = self.validate_and_save(step)
        self.saves.close()
        self.loader.close()
        session.finish("finished" if step >= max_steps else "stopped", step)

    def restore(self) -> int:
        """The state of the newest commit, or that of the beginning; the number of steps done in it."""
        self.session.progress(0, "load")
        done = resume(self.session, self.group, lambda: self.tensors, self.data.facts)
        if done == 0:
            fill(self.model, True, self.device, self.config.data.seed)
            reset_states(self.optimizer)
            self.average.begin()
        return done

    def train_step(self, step: int) -> Action:
        """One step of the optimizer, unless its loss or gradients forbid it."""
        config, session, device, meter = self.config, self.session, self.device, self.meter
        lr = learning_rate(step, config.optimizer.lr, config.step_scheduler)
        set_learning_rate(self.optimizer, lr)
        seed_step(config.data.seed, step, session.rank, device)
        wish = session.stop_requested() if session.rank == 0 else 0
        stats = StepStats(
            device, self.tokens_per_step, counts=self.place.has_losses, stop=wish, save_failed=self.saves.failed()
        )
        batches = self.loader.training(step)
        meter.data_waited = self.loader.waited
        session.progress(step, "sync")  # from here on every rank waits for every other
        forward_backward(self.model, self.layout, self.pipeline, batches, self.tokens_per_step, stats)
        gradients = local_gradients(self.model)
        stats.exchange(gradients, self.replicas)
        if config.optimizer.max_grad_norm is not None or not self.data.counts_all:
            rescale(gradients, stats, config.optimizer.max_grad_norm)
        del gradients  # or they would lie there, beside what the optimizer makes
        action = meter.push(step + 1, lr, stats)
        if action is Action.APPLY:
            self.optimizer.step()
            self.average.update()
        self.optimizer.zero_grad()
        if meter.save_failed:
            self.saves.give_up()
        return action

    def validate_and_save(self, step: int) -> bool:
        """What is due after this many steps; whether this attempt ends here."""
        steps, meter = self.config.step_scheduler, self.meter
        ends = step == steps.max_steps
        save = ends or meter.stop == NOW or step % steps.ckpt_every_steps == 0
        if save:
            meter.flush()  # raises, rather than let a step without a finite loss be saved
        leaves = ends or meter.stop == NOW or (save and meter.stop == AT_COMMIT)
        found: dict[str, float] = {}
        with meter.paused():
            if steps.val_every_steps and (ends or step % steps.val_every_steps == 0):
                self.session.progress(step, "validate")
                found = self.validate(step)
            if not save:
                return False
            self.session.progress(step, "save")
            patience = PATIENCE_AT_END if ends else PATIENCE_AT_STOP if meter.stop == NOW else 0.0
            with meter.saving():
                saved = self.saves.save(step, self.tensors, self.data.facts | found, wait=leaves, patience=patience)
            return leaves and saved

    def validate(self, step: int) -> dict[str, float]:
        """The validation losses by name, reported; none where nothing is held out."""
        held_out = self.loader.validation(self.config.step_scheduler.val_batches)
        judged = functools.partial(
            validate, self.model, self.pipeline, held_out, self.device, counts=self.place.has_losses
        )
        found = judged("val_loss")
        if self.config.optimizer.ema is not None:
            with self.average.in_place():
                found |= judged("val_loss_ema")
        if found:
            self.session.report(step=step, **found)
        return found


def check(config: Config) -> list[str]:
    """What will be trained on what, without training; RunError for what cannot be."""
    with torch.device("meta"):
        model = models.make(config)
    model.check_weights()
    refuse_masks(model, masked=is_masked(config))
    parameters = sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in trained(model))
    more = f", {learning:,} of them trained" if learning < parameters else ""
    return [f"model: {parameters:,} parameters{more}", *look(config)]


def fill(model: LanguageModel, trained: bool, device: torch.device, seed: int) -> None:
    """The values to begin with, of what is trained or of what stays as it is."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad == trained]
    if read := [(name, p) for name, p in named if not model.is_fresh(name)]:
        safetensors_io.load(model, read)
    parallel.initialize(model, ((name, p) for name, p in named if model.is_fresh(name)), device, seed)


def refuse_masks(model: LanguageModel, *, masked: bool) -> None:
    """RunError where documents are to be kept apart by a model that cannot."""
    if masked and not model.takes_documents:
        raise RunError(
            "data.document_mask: the forward of model._target_ has no parameter `documents`",
            "Give it one ([B, S], the number of each token's document), or set data.document_mask: false.",
        )


def set_up_device(session: Session) -> torch.device:
    """Select the GPU, or use as many threads as this worker has CPUs."""
    device = torch.device(session.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, session.cpus))
    return device


def make_loader(config: Config, session: Session, data: Data, place: parallel.MeshCoordinates, *, pin: bool) -> Loader:
    """What this rank reads of the data."""
    plan = Plan(
        seq_len=config.data.seq_len,
        seed=config.data.seed,
        global_batch_size=session.global_batch_size,
        local_batch_size=config.step_scheduler.local_batch_size,
        rank=place.data[0],
        world_size=place.data[1],
        context=place.context,
    )
    return Loader(data, plan, pin=pin)


def make_pipeline(model: LanguageModel, layout: parallel.ParallelLayout, config: Config) -> Pipeline:
    """This worker's stage; between stages, activations are shared out as they are between blocks."""
    place = layout.place
    here = config.data.seq_len // (place.context[1] * place.tensor[1])
    return Pipeline(model, layout, (config.step_scheduler.local_batch_size, here, config.model.dim))


def forward_backward(
    model: LanguageModel,
    layout: parallel.ParallelLayout,
    pipeline: Pipeline | None,
    batches: list[MicroBatch],
    tokens_per_step: int,
    stats: StepStats,
) -> None:
    """Gradients of the step's loss per token, summed over the micro-batches and the ranks. How many tokens count
    is known after the step's one exchange; until then they are divided by all there are."""

    def part(logits: Tensor, batch: MicroBatch) -> Tensor:
        loss = summed_loss(logits, batch)
        stats.add(loss, batch)
        return loss / tokens_per_step

    if pipeline is not None:
        return pipeline.train(batches, part)
    for index, batch in enumerate(batches):
        parallel.begin_pass(model, layout, last=index == len(batches) - 1)
        here = batch.to(layout.device)
        part(model(here.inputs, here.documents, here.rows), here).backward()  # type: ignore[no-untyped-call]
    return None


def summed_loss(logits: Tensor, batch: MicroBatch) -> Tensor:
    """Cross-entropy summed over the micro-batch's targets that count, float32."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses.sum()


@torch.no_grad()
def rescale(gradients: list[Tensor], stats: StepStats, max_norm: float | None) -> None:
    """Make the shards those of the mean over the tokens that count, and the norm of the whole gradient at most
    max_norm, without a host sync."""
    factor = stats.per_counted()
    if max_norm is not None:
        factor = factor * (max_norm / (stats.gradient_norm() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor.float().to(gradients[0].device))


@torch.no_grad()
def validate(
    model: LanguageModel,
    pipeline: Pipeline | None,
    batches: list[MicroBatch],
    device: torch.device,
    name: str,
    *,
    counts: bool,
) -> dict[str, float]:
    """{name: the mean loss per token on the held-out samples}, the same ones each time, or nothing where none are held
    out. `counts`: no other rank has these losses."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        here = batch.to(device)
        logits = pipeline.evaluate(here) if pipeline else model(here.inputs, here.documents, here.rows)
        if counts and logits is not None:
            totals[0] += summed_loss(logits, here)
            totals[1] += batch.counted
    dist.all_reduce(totals)
    loss, tokens = totals.tolist()
    return {name: loss / tokens} if tokens else {}
