"""`raylaunch plan`: estimate the resources and the time of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raylaunch.cli import options
from raylaunch.cli.options import F
from raylaunch.cli.show import table_width
from raylaunch.cluster import up
from raylaunch.config.schema import Config
from raylaunch.errors import UsageError
from raylaunch.scheduler.slurm import batch_script
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.state import files
from raylaunch.tools.plan import checkpoint_size, cpu_memory, estimate, from_run, gpu_models, memory, queue_time
from raylaunch.tools.plan.alternatives import SEVERAL
from raylaunch.tools.plan.estimate import Estimate, Given
from raylaunch.tools.plan.gpu_models import CPU, GIB, GpuModel
from raylaunch.tools.plan.queue_time import Queue, spell


def _positive(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 1e-9 <= value <= 1e18:
        raise UsageError(f"--{str(parameter.name).replace('_', '-')} {value}: must be a number above 0")
    return value


def _share_of_one(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if (_positive(context, parameter, value) or 0.0) > 1:
        raise UsageError(f"--{parameter.name} {value}: must be a fraction, at most 1", "Write 0.4 for 40%.")
    return value


WIDTH, TITLE = 80, len("checkpoint")


def _rate(flag: str, text: str) -> Callable[[F], F]:
    return click.option(flag, type=float, callback=_positive, help=text)


@click.command()
@click.argument("path", metavar="CFG", type=click.Path(path_type=Path))
@click.option("--gpu", help="GPU model (h100-80gb, a100-40gb, …) or cpu. Default: the one that `slurm:` requests.")
@click.option("--nodes", help="Number of nodes. Default: the upper bound of slurm.nodes.")
@click.option("--gpus-per-node", type=click.IntRange(min=1), help="GPUs (workers) per node. Default: as configured.")
@click.option("--like", "like_run", metavar="RUN", help="Use throughput, start-up time and save time measured in RUN.")
@_rate("--tokens-per-second", "Throughput of all GPUs together.")
@click.option(
    "--mfu", type=float, callback=_share_of_one,
    help="Assumed MFU (for example 0.4) if no throughput is known.",
)  # fmt: skip
@_rate("--bandwidth", f"Write bandwidth of the file system in GB/s. Default: {checkpoint_size.BANDWIDTH / 1e9:g}.")
@_rate("--failures", f"Failures per node and hour. Default: {checkpoint_size.FAILURES:.2g} (Kokolis et al., 2025).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.sets_option
@options.state_dir_option
def plan(
    path: Path, gpu: str | None, nodes: str | None, gpus_per_node: int | None, like_run: str | None,
    tokens_per_second: float | None, mfu: float | None, bandwidth: float | None, failures: float | None,
    as_json: bool, sets: tuple[str, ...], state_dir: Path | None,
) -> int:  # fmt: skip
    """Estimate GPU memory (and what would make it fit), run time, checkpoint size and queue time. Nothing is started.

    \b
      raylaunch plan cfg.yaml --gpu h100-80gb --nodes 4 --gpus-per-node 8
    """
    config = options.load(path, sets, {"slurm__nodes": nodes, "cluster__state_dir": state_dir and str(state_dir)})
    which = _gpu(gpu, config)
    if gpus_per_node is not None:
        config = _with_workers(config, gpus_per_node)
    measured = from_run.read(files.run_dir(up.state_dir_of(config), like_run)) if like_run is not None else None
    slurm = Slurm()
    has = cpu_memory.of_worker(which, config, slurm)
    given = Given(
        which, config.slurm.max_nodes, batch_script.workers_per_node(config.slurm), has.size, has.why,
        tokens_per_second, mfu, measured, bandwidth and bandwidth * 1e9, failures or checkpoint_size.FAILURES,
    )  # fmt: skip
    found = estimate.estimate(config, given)
    asked = queue_time.estimate(config, slurm, datetime.now().astimezone())
    if as_json:
        click.echo(json.dumps(estimate.as_dict(found, config) | {"queue": asdict(asked)}, indent=1))
    else:
        _print(Console(width=min(table_width(), WIDTH), highlight=False), found, config, asked)
    return 1 if found.fits is False or found.shape is None else 0


def _gpu(name: str | None, config: Config) -> GpuModel:
    if name is not None:
        return gpu_models.find(name)
    asked = f"{config.slurm.gpus_per_node or ''} {config.slurm.gres or ''}".split()
    found = next(filter(None, map(gpu_models.asked_for, asked)), None)
    if found is None and batch_script.gpus_per_node(config.slurm):
        raise UsageError(
            "the GPU model is unknown: slurm.gpus_per_node does not name one",
            f"Set --gpu to one of: {', '.join(gpu_models.TABLE)}.",
        )
    return found or CPU


def _with_workers(config: Config, count: int) -> Config:
    """The configuration with `count` workers and GPUs per node; the GPU type is kept."""
    slurm = config.slurm
    gpus_ = None if slurm.gpus_per_node is None else re.sub(r"\d+$", str(count), str(slurm.gpus_per_node))
    changed = slurm.model_copy(update={"ntasks_per_node": count, "gpus_per_node": gpus_})
    return config.model_copy(update={"slurm": changed})


# -- output for people -------------------------------------------------------------------------------------


def _print(console: Console, found: Estimate, config: Config, asked: Queue) -> None:
    where, what = found.place, "on CPUs" if found.gpu is CPU else f"on {found.gpu.name}"
    console.print(
        Text.assemble(
            (_name(found), "bold"), f" on {_several(where.nodes, 'node')}, {_several(where.world, 'worker')} {what}"
        )
    )
    console.print(Text(f"  {_plan(found, config)}", style="dim"))
    if found.peak is not None:
        console.print()
        _print_memory(console, found, config)
    console.print()
    rows = [*_times(found), *_saves(found, config)]
    if found.fits is False and rows:
        console.print(Text("assuming that it fits:", style="dim"))
    _print_rows(console, rows)
    _print_rows(console, [("queue", asked.text)])
    for text in found.missing + found.notes:
        console.print(Text(f"! {text}", style="yellow"))


def _print_rows(console: Console, rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True, min_width=TITLE)
    table.add_column()
    for title, text in rows:
        table.add_row(title, Text(text))
    console.print(table)


def _name(found: Estimate) -> str:
    if found.shape is None:
        return "unknown model"
    sizes = found.shape.parameters
    trained = "" if sizes["trained"] == sizes["total"] else f", {_count(sizes['trained'])} trainable"
    return f"{_count(sizes['total'])} parameters{trained}"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _plan(found: Estimate, config: Config) -> str:
    plan, where = config.distributed, found.place
    sizes = [f"{name}_size {getattr(plan, f'{name}_size')}" for name in ("tp", "cp", "pp", "ep")]
    words = [plan.strategy, *(text for text in sizes if not text.endswith(" 1"))]
    how = plan.activation_checkpointing
    words += [f"activation_checkpointing {how}"] if how != "none" else []
    words += ["cpu_offload"] if plan.cpu_offload else []
    batch = f"{_several(where.batch, 'sample')} of {config.data.seq_len:,} tokens per step"
    passes = "one pass" if where.passes == 1 else f"{where.passes} passes"
    return f"{', '.join(words)}; {batch}, in {passes} of {config.step_scheduler.local_batch_size} per worker"


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _print_memory(console: Console, found: Estimate, config: Config) -> None:
    assert found.peak is not None
    peak = found.peak
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    available = found.available or 0
    scale = max(available, peak.total) if peak.total > available / 10 else peak.total
    room = max(8, min(40, console.width - 30))
    for cause in memory.CAUSES:
        if bytes_ := peak.bytes.get(cause, 0):
            table.add_row(f"  {cause}", _size(bytes_), Text("█" * max(1, round(room * bytes_ / scale)), style="cyan"))
    console.print(table)
    stage = f", in pipeline stage {peak.stage}" if config.distributed.pp_size > 1 else ""
    console.print(Text(f"  peak during {peak.moment}{stage}", style="dim"))
    console.print(_verdict(found))
    if peak.host:
        host = _size(peak.host * found.place.workers_per_node)
        console.print(f"plus {host} of host memory per node, for offloading and checkpoint copies")


def _verdict(found: Estimate) -> Text:
    assert found.peak is not None
    used = _size(found.peak.total)
    if found.available is None:
        return Text(f"{used} per worker; the memory of the nodes is unknown", style="bold")
    against = f"{used.removesuffix(' GiB')} of {_size(found.available)}" + (f" ({found.room})" if found.room else "")
    if found.fits and not found.tight:
        return Text(f"fits: {against}", style="bold green")
    word = "fits, but tightly" if found.fits else "does not fit"
    text = Text().append(f"{word}: {against}", style="bold yellow" if found.fits else "bold red")
    if found.would_fit:
        text.append("; to use less memory:" if found.fits else "; changes that make it fit:")
    elif not found.fits:
        text.append(f"; no tested change makes it fit, on up to {SEVERAL[-1]} times the nodes")
    for fit in found.would_fit:
        changes = [f"{key.split('.')[-1]} {_word(value)}" for key, value in fit.changes.items()]
        changes += [f"{fit.nodes} nodes"] if fit.nodes != found.place.nodes else []
        slower = f", about {fit.slower:.0%} slower" if fit.slower >= 0.02 else ""
        text.append(f"\n  {', '.join(changes)} ({_size(fit.total)}{slower})")
    return text


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _size(bytes_: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20)):
        if bytes_ >= size:
            return f"{bytes_ / size:,.1f} {unit}"
    return f"{bytes_ / 1024:,.1f} KiB"


def _times(found: Estimate) -> list[tuple[str, str]]:
    if found.pace is None or found.step is None:
        return []
    rate = found.pace.tokens_per_s
    tokens = f"{rate:,.{0 if rate >= 10 else 2}f} tokens/s"
    rows = [("throughput", f"{tokens}, {spell(found.step)} per step ({found.pace.how})")]
    if found.first_step is not None:
        parts = ", ".join(f"{name.replace('_', ' ')} {spell(s)}" for name, s in found.first_step.items() if s >= 0.5)
        how = "measured" if found.pace.start else "assumed"
        rows.append(("first step", f"{spell(sum(found.first_step.values()))} after the job starts ({how}: {parts})"))
    with_ = " including saves and failures" if found.saving is not None else ""
    never = "never finishes: failures take all of the time"
    rows.append(("run time", f"{spell(found.end)}{with_}" if found.end is not None else never))
    return rows


def _saves(found: Estimate, config: Config) -> list[tuple[str, str]]:
    one = found.saving
    if one is None:
        return []
    waits = "" if one.stall == one.save else f"; training waits {spell(one.stall)}"
    steps = f", {max(1, round(one.interval / found.step)):,} steps" if found.step else ""
    rows = [
        ("checkpoint", f"{_size(one.size)}, {spell(one.save)} to save (bandwidth {found.bandwidth}){waits}"),
        ("save every", f"{spell(one.interval)}{steps} (Young/Daly, a failure every {spell(one.mtbf)}): "
                       f"{_share(one.cost)} of the time for saves and failures"),
    ]  # fmt: skip
    if one.own_interval is not None and one.own_cost is not None:
        faults = f"; {one.faults:.2g} failures expected" if one.faults is not None else ""
        every = f"ckpt_every_steps {config.step_scheduler.ckpt_every_steps:,}, {spell(one.own_interval)}"
        rows.append(("configured", f"{every}: {_share(one.own_cost)} of the time{faults}"))
    return rows


def _share(part: float) -> str:
    return "all" if part >= 1 else f"{part:.1%}" if part >= 0.001 else "less than 0.1%"
