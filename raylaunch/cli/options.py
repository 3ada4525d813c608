"""Options that several commands share, and how they become a Config."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from raylaunch.cli.show import note
from raylaunch.cluster.up import state_dir_of
from raylaunch.config import loader
from raylaunch.config.schema import Config

F = TypeVar("F", bound=Callable[..., Any])

state_dir_option = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    help="Directory of clusters and runs, shared by all nodes. Default: cluster.state_dir, $RAYLAUNCH_STATE_DIR or ~/.raylaunch.",
)
sets_option = click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set a configuration key, for example slurm.nodes=4."
)

_CLUSTER_FLAGS = [
    ("--nodes", "slurm.nodes", "Number of nodes: N, or MIN:MAX.", str),
    ("--name", "cluster.name", "Name of the cluster. Default: main; for submit, the run's name.", str),
    (
        "--backend",
        "cluster.backend",
        "Where nodes come from: Slurm, or local processes. auto: Slurm if it is set up here, else local.",
        click.Choice(["auto", "slurm", "local"]),
    ),
    ("--partition", "slurm.partition", "Slurm partition.", str),
    ("--account", "slurm.account", "Slurm account.", str),
    ("--qos", "slurm.qos", "Slurm quality of service.", str),
    ("--time", "slurm.time", "Time limit, in a format that Slurm accepts.", str),
    ("--ntasks-per-node", "slurm.ntasks_per_node", "Training workers per node.", int),
    ("--gpus-per-node", "slurm.gpus_per_node", "GPUs per node.", str),
    ("--cpus-per-task", "slurm.cpus_per_task", "CPUs per training worker.", int),
    ("--mem", "slurm.mem", "Memory per node, in a format that Slurm accepts.", str),
]


def cluster_options(function: F) -> F:
    """The flags of `up`, `submit` and `script`, each named after its config key."""
    for flag, key, text, kind in reversed(_CLUSTER_FLAGS):
        function = click.option(flag, key.replace(".", "__"), type=kind, help=text)(function)
    return function


def load(path: Path | None, sets: Sequence[str], flags: dict[str, Any], extra: Sequence[str] = ()) -> Config:
    """The config in force, from `section__key` flags and the rest."""
    overrides = {key.replace("__", "."): value for key, value in flags.items() if value is not None}
    if extra:
        listed = loader.load(path, sets, overrides).slurm.extra
        overrides["slurm.extra"] = [*listed, *extra]
    return loader.load(path, sets, overrides, tell=note)


def state_dir(given: Path | None) -> Path:
    """The state directory for commands that take no config file: flag, user file, environment, home."""
    return given.absolute() if given is not None else state_dir_of(loader.load(None))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM means what Ctrl-C means, so that whatever ends the command cleans up behind it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
