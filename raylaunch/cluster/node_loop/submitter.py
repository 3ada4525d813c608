"""Who submits a cluster's jobs: its head, or where compute nodes may not, a `raylaunch watch` that holds the lock."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from raylaunch.config.schema import Config
from raylaunch.errors import SlurmError, SlurmUnavailable
from raylaunch.host import locks
from raylaunch.scheduler.backends import Backend, SlurmBackend
from raylaunch.scheduler.slurm import batch_script
from raylaunch.state import files
from raylaunch.state.records import Cluster

FILE, LOCK = "submits.json", "watch.lock"


def may_submit(backend: Backend, directory: Path, cluster: Cluster, config: Config) -> str:
    """Whether jobs can be submitted from this machine, asked with a joiner that is only tested; "" or why not.

    Raises SlurmUnavailable when Slurm does not answer.
    """
    if not isinstance(backend, SlurmBackend):
        return ""
    if not backend.slurm.available():
        return "sbatch is not installed here"
    script = batch_script.render_joiner(config, cluster.name, directory, cluster.canary, 1, [])
    try:
        backend.slurm.check(script)
    except SlurmUnavailable:
        raise
    except SlurmError as error:
        return " ".join(error.message.split())
    return ""


def head_refusal(directory: Path, cluster: Cluster) -> str:
    """Why the head cannot submit jobs, as it wrote it; "" when it can, or has not said."""
    value = files.read_json(directory / FILE)
    return str(value["refused"]) if value is not None and value.get("canary") == cluster.canary else ""


def is_watched(directory: Path) -> bool:
    """Whether a `raylaunch watch` holds its lock."""
    return locks.is_held(directory / LOCK)


def watching(directory: Path, patience: float = 1.0) -> AbstractContextManager[bool]:
    """Hold the watcher's lock; False when another one watches. A head that looks holds it for a moment."""
    return locks.held(directory / LOCK, patience)
