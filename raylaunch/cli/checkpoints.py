"""`raylaunch checkpoints RUN`: what is committed, whether it verifies, what can go, and weights for others."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import click
from rich.console import Console
from rich.table import Table

from raylaunch.checkpoint import checksums, store
from raylaunch.checkpoint.store import Commit, InvalidCheckpoint
from raylaunch.cli import options
from raylaunch.cli.show import note, table_width
from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import RaylaunchError, UsageError
from raylaunch.observe.status import find_run
from raylaunch.state import audit, records, runs
from raylaunch.training import export as exporting

READERS = 4
P = ParamSpec("P")
R = TypeVar("R")
Given = tuple[str, Config, Path]
"""A run, its config and where its checkpoints lie."""


@click.group(invoke_without_command=True)
@click.argument("run")
@options.state_dir_option
@click.pass_context
def checkpoints(ctx: click.Context, run: str, state_dir: Path | None) -> None:
    """List (the default), verify, clean up or export the checkpoints of RUN."""
    ctx.obj = functools.partial(_given, run, state_dir)
    if ctx.invoked_subcommand is None:
        ctx.invoke(ls)


def _given(run: str, state_dir: Path | None) -> Given:
    run_dir, _ = find_run(options.state_dir(state_dir), run)
    config = loader.load_resolved(run_dir / records.CONFIG_FILE)
    return run, config, runs.checkpoint_dir(run_dir, config)


def _of_run(command: Callable[Concatenate[Given, P], R]) -> Callable[P, R]:
    """The run is looked up by the command itself: its `--help` needs none."""

    def with_run(look: Callable[[], Given], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return command(look(), *args, **kwargs)

    return click.pass_obj(functools.update_wrapper(with_run, command))


@checkpoints.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_of_run
def ls(given: Given, as_json: bool = False) -> None:
    """List the checkpoints, and those that cannot be used."""
    _, _, directory = given
    rows = [_row(one) for one in store.iter_checkpoints(directory)]
    left = [path.name for path in [*store.leftovers(directory), *store.set_aside_before(directory)]]
    if as_json:
        return click.echo(json.dumps({"directory": str(directory), "checkpoints": rows, "leftovers": left}, indent=1))
    table = Table(box=None, pad_edge=False)
    for title in ("step", "saved", "size", "workers", "attempt", ""):
        table.add_column(title, justify="right" if title in {"step", "size", "workers", "attempt"} else "left")
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"])) if "time" in row else ""
        size = f"{row['bytes'] / 1e6:,.1f} MB" if "bytes" in row else ""
        table.add_row(
            str(row["step"]), when, size, str(row.get("world_size", "")), str(row.get("attempt", "")), row["bad"]
        )
    Console(width=table_width()).print(table if rows else f"no checkpoint in {directory}")
    if left:
        note(f"{len(left)} directories are incomplete ({left[0]}, …): `gc` deletes those without a writer")
    return None


@checkpoints.command()
@click.argument("steps", nargs=-1, type=int)
@_of_run
def verify(given: Given, steps: tuple[int, ...]) -> None:
    """Read all checkpoints (or those of STEPS) and compare checksums. The exit code is 1 if one is damaged."""
    bad = []
    for one in _chosen(given, steps):
        found = one if isinstance(one, InvalidCheckpoint) else _first_bad(one)
        click.echo(f"step {one.step}: {f'{found.file}: {found.why}' if found else 'as it was written'}")
        bad += [found] if found else []
    if bad:
        raise RaylaunchError(
            f"{len(bad)} checkpoints cannot be used",
            "A run that resumes sets them aside and uses the previous checkpoint.",
        )


@checkpoints.command()
@click.option(
    "--keep",
    type=click.IntRange(1),
    help="Number of most recent checkpoints to keep. Default: as configured. keep_every_n_steps and keep_best still apply.",
)
@click.option("--bad", is_flag=True, help="Also delete damaged checkpoints that were set aside.")
@click.option("--dry-run", is_flag=True, help="Print what would be deleted.")
@_of_run
def gc(given: Given, keep: int | None, bad: bool, dry_run: bool) -> None:
    """Delete old checkpoints and incomplete ones left by killed writers. Safe while the run is training."""
    _, config, directory = given
    rule = replace(runs.keep(config), last=keep) if keep else runs.keep(config)
    old = [one.path for one in rule.surplus(store.committed(directory))]
    gone = [*store.leftovers(directory), *old, *(store.set_aside_before(directory) if bad else [])]
    for path in gone:
        click.echo(f"{'would remove' if dry_run else 'removes'} {path.name}")
    if not dry_run:
        _audit(given, "checkpoints gc")
        incarnation, attempt = store.owner(directory)
        store.retain(directory, rule, incarnation, attempt)
        store.collect(directory, incarnation, attempt)
        for path in store.set_aside_before(directory) if bad else ():
            store.delete(path)
    if not gone:
        click.echo("nothing to remove")


@checkpoints.command(short_help="Export the weights of a checkpoint as safetensors.")
@click.argument("step", metavar="STEP|latest")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Directory to create.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--ema", is_flag=True, help="Export the moving average (optimizer.ema).")
@_of_run
def export(given: Given, step: str, to: Path, dtype: str, ema: bool) -> None:
    """Export the weights of a checkpoint as safetensors in Hugging Face's layout."""
    run, config, directory = given
    if step == "latest":
        checkpoint = exporting.latest(run, directory)
    elif step.isdigit():
        (one,) = _chosen(given, (int(step),))
        if isinstance(one, InvalidCheckpoint):
            raise RaylaunchError(f"step {step} cannot be used: {one.file}: {one.why}", "See `ls`.")
        checkpoint = one.path
    else:
        raise UsageError(f"{step} is not a step number", "Give a number or `latest`.")
    if to.exists():
        raise UsageError(f"{to} already exists", "Give a new directory with --to.")
    _audit(given, "checkpoints export")
    for path in exporting.write(config, checkpoint, to.absolute(), dtype, ema):
        click.echo(str(path))


def _audit(given: Given, action: str) -> None:
    parent = click.get_current_context().parent
    assert parent is not None
    audit.add(options.state_dir(parent.params["state_dir"]), action, note, run=given[0])


def _first_bad(commit: Commit) -> InvalidCheckpoint | None:
    with ThreadPoolExecutor(READERS) as pool:
        shares = [checksums.share(commit, rank, READERS) for rank in range(READERS)]
        return next((bad for bad in pool.map(lambda names: checksums.check(commit, names), shares) if bad), None)


def _chosen(given: Given, steps: tuple[int, ...]) -> list[Commit | InvalidCheckpoint]:
    run, _, directory = given
    there = {one.step: one for one in store.iter_checkpoints(directory)}
    unknown = [step for step in steps if step not in there]
    if unknown:
        known = ", ".join(map(str, sorted(there))) or "none"
        raise UsageError(f"run {run} has no checkpoint of step {unknown[0]}", f"Available: {known}.")
    return [there[step] for step in sorted(steps or there)]


def _row(one: Commit | InvalidCheckpoint) -> dict[str, Any]:
    if isinstance(one, InvalidCheckpoint):
        return {"step": one.step, "bad": f"{one.file}: {one.why}"}
    return {
        "step": one.step, "time": one.time, "bytes": sum(size for size, _ in one.files.values()),
        "world_size": one.world_size, "attempt": one.attempt, "bad": "",
    }  # fmt: skip
