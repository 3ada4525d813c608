"""When Slurm would start the job: `sbatch --test-only`, through the client."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from raylaunch.cluster import up
from raylaunch.config.schema import Config
from raylaunch.errors import RaylaunchError, SlurmUnavailable
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.state import files


@dataclass(frozen=True)
class Queue:
    """`state`: estimated, unknown (no estimate), refused, unavailable, or absent. `start`: local time, ISO 8601."""

    state: str
    text: str
    start: str | None = None


def estimate(config: Config, slurm: Slurm, now: datetime) -> Queue:
    """Slurm's estimate for the batch script that `up` would submit; nothing is submitted."""
    if config.cluster.backend == "local":
        return Queue("absent", "none: cluster.backend is local")
    try:
        if not slurm.available():
            return Queue("absent", "none: Slurm is not available")
        name = config.cluster.name
        start = slurm.would_start(up.render(config, name, files.cluster_dir(up.state_dir_of(config), name)))
    except SlurmUnavailable as error:
        return Queue("unavailable", _line(error))
    except RaylaunchError as error:
        return Queue("refused", _line(error))
    if start is None:
        return Queue("unknown", "Slurm did not estimate a start time")
    wait = max(0.0, (start - now).total_seconds())
    return Queue(
        "estimated",
        f"{start:%Y-%m-%d %H:%M}, {f'in {spell(wait)}' if wait >= 60 else 'now'} (sbatch --test-only)",
        start.isoformat(),
    )


def _line(error: RaylaunchError) -> str:
    return " ".join(f"{error.message}. {error.hint}".split())


def spell(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.4 h, 2.1 days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.{1 if seconds < 20 * size else 0}f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
