"""`raylaunch up` and `raylaunch script`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from raylaunch.cli import options
from raylaunch.cli.show import LiveLine, note
from raylaunch.cli.watch import until_it_ends
from raylaunch.cluster import down
from raylaunch.cluster import up as cluster
from raylaunch.config.schema import Config
from raylaunch.errors import RaylaunchError, UsageError
from raylaunch.scheduler import backends
from raylaunch.scheduler.backends import Backend
from raylaunch.state import audit, files, members, records
from raylaunch.state.records import Cluster

_config = click.option("-c", "--config", "path", type=click.Path(path_type=Path), help="Configuration file (YAML).")
_extra = click.argument("sbatch_options", nargs=-1, type=click.UNPROCESSED)


@click.command(context_settings={"ignore_unknown_options": False})
@_config
@options.cluster_options
@options.sets_option
@options.state_dir_option
@click.option("--dry-run", is_flag=True, help="Print the batch script and exit.")
@click.option("--no-wait", is_flag=True, help="Return as soon as the job is submitted.")
@click.option(
    "--watch",
    is_flag=True,
    help="Keep running, and submit jobs from here: for sites where compute nodes may not submit jobs.",
)
@click.option(
    "--timeout", default=300.0, show_default=True, help="Seconds to wait for the cluster after the job has started."
)
@_extra
def up(
    path: Path | None, sets: tuple[str, ...], state_dir: Path | None, dry_run: bool, no_wait: bool, watch: bool,
    timeout: float, sbatch_options: tuple[str, ...], **flags: Any,
) -> None:  # fmt: skip
    """Start a cluster of Ray nodes. Additional sbatch options follow `--`.

    \b
      raylaunch up --nodes 4
      raylaunch up --nodes 2:8 --partition gpu --gpus-per-node 8 -- --dependency singleton
    """
    config = options.load(path, sets, {**flags, "cluster__state_dir": state_dir and str(state_dir)}, sbatch_options)
    if dry_run:
        _print_script(config)
        return
    if watch and no_wait:
        raise UsageError(
            "--watch and --no-wait cannot be combined", "Use one of them; `raylaunch watch` can be started later."
        )
    backend = backends.of(config.cluster.backend)
    audit.add(cluster.state_dir_of(config), "up", note, cluster=config.cluster.name, config=config)
    with options.interruptible():
        directory, record = cluster.submit(config, backend)
        if no_wait:
            note(f"cluster {record.name}: job {record.jobs[0]} is submitted; see `raylaunch status`")
            return
        with given_back(directory, record, backend), LiveLine() as line:
            cluster.wait_ready(directory, record, backend, timeout, lambda p: line(p.text))
    _print_ready(directory, record)
    if watch:
        until_it_ends(directory, record)


@click.command()
@_config
@options.cluster_options
@options.sets_option
@options.state_dir_option
@_extra
def script(
    path: Path | None, sets: tuple[str, ...], state_dir: Path | None, sbatch_options: tuple[str, ...], **flags: Any
) -> None:
    """Print the batch script that `up` would submit with the same options."""
    _print_script(
        options.load(path, sets, {**flags, "cluster__state_dir": state_dir and str(state_dir)}, sbatch_options)
    )


def _print_script(config: Config) -> None:
    directory = files.cluster_dir(cluster.state_dir_of(config), config.cluster.name)
    click.echo(cluster.render(config, config.cluster.name, directory), nl=False)


@contextlib.contextmanager
def given_back(directory: Path, record: Cluster, backend: Backend) -> Iterator[None]:
    """What was submitted, when what is done inside fails or is interrupted."""
    try:
        yield
    except (RaylaunchError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            note(f"interrupted: cancelling job {record.jobs[0]}")
        if not down.cancel(directory, record, backend):
            note(f"job {record.jobs[0]} has not ended; see `squeue -j {record.jobs[0]}`")
        down.forget_secrets(directory)
        if record.incarnation == 1 and not any((directory / records.LOGS).iterdir()):
            down.remove_directory(directory)  # it never ran: there is nothing to tell of it
        raise


def _print_ready(directory: Path, record: Cluster) -> None:
    nodes = [node for node in members.living(directory, record).nodes if node.state == "ready"]
    cpus, gpus = (sum(node.resources["cpus"] for node in nodes), sum(len(node.resources["gpus"]) for node in nodes))
    names = ", ".join(sorted(node.name for node in nodes)[:8]) + (", …" if len(nodes) > 8 else "")
    click.echo(
        f"cluster {record.name} is ready: {len(nodes)} nodes ({names}), {cpus} CPUs"
        + (f", {gpus} GPUs" if gpus else "") + f", job {record.jobs[0]}"
    )  # fmt: skip
    for name, error in sorted(cluster.node_failures(directory, record).items()):
        if name not in {node.name for node in nodes}:
            click.echo(f"  left out   {name}: {error}")
    for node in nodes:
        if node.warning:
            click.echo(f"  note       {node.name}: {node.warning}")
    way = cluster.tunnel(directory, record)
    if way is not None:
        click.echo(f"  dashboard  {way[0]} on {way[1]}")
        click.echo(f"  tunnel     {way[2]}")
    name = "" if record.name == "main" else f" --cluster {record.name}"
    click.echo(f"  next       raylaunch train cfg.yaml{name}")
