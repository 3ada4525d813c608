"""Taking a cluster down: save, end everything that belongs to it and nothing else, and verify it.

    ask the head (save the run, send the agents home) → its word in ended.json → cancel what is left
    of the jobs → check: no job, no process, no temp directory

Bounded at every step, and idempotent. A cluster without a head is cancelled at once.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from raylaunch.cluster.node_loop import scheduler_view, submitter
from raylaunch.config import loader
from raylaunch.errors import ConfigError
from raylaunch.scheduler import backends
from raylaunch.scheduler.backends import Backend, Job
from raylaunch.state import event_log, files, records, requests
from raylaunch.state.cluster_events import ClusterDown
from raylaunch.state.members import Members
from raylaunch.state.records import Cluster, ClusterEnd, Head
from raylaunch.state.requests import DownAsk
from raylaunch.timing import DOWN_LIMIT, GONE_LIMIT, SAVE_LIMIT, TAKEN_LIMIT


@dataclass
class Ended:
    """What became of it."""

    was_alive: bool
    clean: bool = True
    notes: list[str] = field(default_factory=list)


def clear_life(directory: Path) -> None:
    """Remove what belongs to one life of a cluster: a new one must not read it."""
    for name in (records.HEAD_FILE, records.MEMBERS_FILE, records.ENDED_FILE, records.EXIT_CODE_FILE,
                 records.CANARY_FILE, records.TOKEN_FILE, records.DUTIES_FILE, submitter.FILE, "agents.json"):  # fmt: skip
        (directory / name).unlink(missing_ok=True)
    for part in (records.NODES, records.REQUESTS, records.INCARNATIONS):
        for path in (directory / part).glob("*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def remove_directory(directory: Path) -> None:
    """Remove a cluster directory that never came to life."""
    shutil.rmtree(directory, ignore_errors=True)


def all_jobs(directory: Path, cluster: Cluster, backend: Backend) -> list[str]:
    """The jobs of this life: those that were recorded meanwhile, too, and those whose submitter was killed."""
    now = Cluster.read(directory)
    found = [*cluster.jobs, *(now.jobs if now is not None and now.canary == cluster.canary else ())]
    with contextlib.suppress(ConfigError):  # without its configuration there is nothing to look for
        config = loader.load_resolved(directory / records.CONFIG_FILE)
        found += scheduler_view.unrecorded(backend, cluster, config)
    return list(dict.fromkeys(found))


def _living(directory: Path, cluster: Cluster, backend: Backend) -> list[Job]:
    states = backend.states(directory, all_jobs(directory, cluster, backend))
    return [job for job in states.values() if job.alive]


def cancel(directory: Path, cluster: Cluster, backend: Backend, limit: float = GONE_LIMIT) -> bool:
    """Cancel the cluster's jobs and wait until they are gone; whether they are."""
    deadline, pause = time.monotonic() + limit, 0.1
    cancelled: set[str] = set()
    while True:
        jobs = all_jobs(directory, cluster, backend)
        if new := [job for job in jobs if job not in cancelled]:  # a joiner may come while this waits
            backend.cancel(directory, new)
            cancelled |= set(new)
        if not any(job.alive for job in backend.states(directory, jobs).values()):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(1.0, pause * 1.3)


def down(
    directory: Path, cluster: Cluster, save_limit: float = SAVE_LIMIT, show: Callable[[str], None] = lambda _: None
) -> Ended:
    """End a cluster, saving its run first; what became of it."""
    backend = backends.of(cluster.backend)
    jobs = _living(directory, cluster, backend)
    if not jobs:
        if cluster.backend == "local":
            backend.cancel(directory, cluster.jobs)  # agents that were killed leave their trees behind
        forget_secrets(directory)
        return Ended(was_alive=False)
    ended = Ended(was_alive=True)
    head = Head.read(directory)
    if head is not None and head.canary == cluster.canary and not all(job.pending for job in jobs):
        _ask_head(directory, cluster, backend, save_limit, show, ended)
    else:
        show("no head yet: cancelling the job")
    if not cancel(directory, cluster, backend):
        ended.clean = False
        left = ",".join(job.id for job in _living(directory, cluster, backend))
        ended.notes.append(f"job {left} has not ended; see `squeue -j {left}`")
    _verify(directory, cluster, ended)
    forget_secrets(directory)
    event_log.append(directory, ClusterDown(ended.clean, ended.notes))
    return ended


def _ask_head(
    directory: Path, cluster: Cluster, backend: Backend, save_limit: float, show: Callable[[str], None], ended: Ended
) -> None:
    """Let the head save and end; give up on it when it does not take the request or does not end."""
    request = requests.ask(directory, DownAsk(save_limit=save_limit))
    show("saving the run and stopping")
    taken_by = time.monotonic() + TAKEN_LIMIT
    ended_by = time.monotonic() + save_limit + DOWN_LIMIT
    ask_again = time.monotonic() + 1.0
    while not (directory / records.ENDED_FILE).exists():
        now = time.monotonic()
        # Opening it, not listing its directory: NFS lists what is gone for half a minute.
        if (now > taken_by and files.read_json(request) is not None) or now > ended_by:
            ended.notes.append("the head did not answer; its job was cancelled")
            return
        if now > ask_again:
            ask_again = now + 3.0
            if not any(job.alive for job in backend.states(directory, cluster.jobs).values()):
                return
        time.sleep(0.1)
    # The job ends by itself now; a cancel at once would only stain its accounting.
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline and any(j.alive for j in backend.states(directory, cluster.jobs).values()):
        time.sleep(0.2)


def _verify(directory: Path, cluster: Cluster, ended: Ended) -> None:
    """What the agents said about their nodes; on this machine also what we see."""
    end = ClusterEnd.read(directory)
    if end is None or end.canary != cluster.canary:
        end = ClusterEnd()
    ended.notes += [f"{node} was lost before: its processes could not be ended" for node in end.lost]
    for node, left in end.unclean.items():
        ended.clean = False
        ended.notes.append(
            f"{node}: " + (f"{left} processes or directories remain" if left > 0 else "it did not report its end")
        )
    if cluster.backend == "local":
        for row in Members.read(directory).nodes:
            if row.temp_dir and Path(row.temp_dir).exists():
                ended.clean = False
                ended.notes.append(f"{row.name}: {row.temp_dir} is left")


def forget_secrets(directory: Path) -> None:
    """A dead cluster's token opens nothing; it need not lie about."""
    (directory / records.TOKEN_FILE).unlink(missing_ok=True)
