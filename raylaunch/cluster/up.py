"""Bringing a cluster up: make its directory, submit its job, watch until it is ready.

    prepare (directory, token, canary, script) → submit → pending → booting → head → k of N → ready

It is ready at the minimum of nodes; late ones join on their own. What fails is named with the
node's own error, and the job is given back. Taking down is in `down`, looking in `status`.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from raylaunch.cluster import down
from raylaunch.config import loader
from raylaunch.config.schema import AlertsConfig, Config
from raylaunch.errors import BringUpError, RaylaunchError, SlurmUnavailable, UsageError
from raylaunch.host import locks
from raylaunch.scheduler import backends
from raylaunch.scheduler.backends import Backend, Job
from raylaunch.scheduler.slurm import batch_script, mail
from raylaunch.state import event_log, files, members, records
from raylaunch.state.cluster_events import ClusterSubmitted
from raylaunch.state.members import MemberRow
from raylaunch.state.records import Cluster, Head
from raylaunch.text import user

JOBS_EVERY = (0.5, 5.0)
"""Seconds between two questions to the backend while waiting: the first, and where it grows to."""
FILES_EVERY = 0.1
SILENCE_LIMIT = 180.0
"""Seconds of a controller's failover: no reason to give back what has queued for hours."""
REASON_LIMIT = 5.0
"""Seconds that a job which nobody waits for is looked at: until Slurm says why it pends."""
MORE_NEWS = 5.0
"""Seconds that a hopeless bring-up listens on, to name every node that failed and not the first alone."""


def state_dir_of(config: Config) -> Path:
    """The state directory in force: the config's, else the default."""
    own = config.cluster.state_dir
    return Path(own).expanduser().absolute() if own else files.default_state_dir().absolute()


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Two `up` of one name at once: the second is refused, not interleaved."""
    files.make_dir(directory)
    with locks.held(directory / ".lock") as is_ours:
        if not is_ours:
            raise UsageError(
                f"another `raylaunch` is starting cluster {directory.name}", "Wait for it, or choose another --name."
            )
        yield


def render(config: Config, name: str, directory: Path, canary: str = "CANARY") -> str:
    """The batch script exactly as it would be submitted (but for the canary's value)."""
    least = config.elastic.min_nodes or 1
    if least > config.max_nodes:
        raise UsageError(
            f"elastic.min_nodes ({least}) exceeds the most nodes that the cluster may have ({config.max_nodes})",
            "Lower it, or raise slurm.nodes (--nodes) or elastic.max_nodes.",
        )
    slurm = mail.through_slurm(config)
    return batch_script.render(slurm, name, directory, canary, requeue=config.elastic.max_requeues > 0)


def submit(config: Config, backend: Backend, run: str | None = None) -> tuple[Path, Cluster]:
    """Make the cluster's directory afresh and submit its job; the directory and the record.

    Raises UsageError when a cluster of that name is alive.
    """
    name = config.cluster.name
    directory = files.cluster_dir(state_dir_of(config), name)
    is_new = not files.exists(directory)
    batch_script.check_extra(config.slurm.extra)
    with _one_at_a_time(directory):
        is_new = is_new and not files.exists(directory / records.CLUSTER_FILE)  # another `up` may have been quicker
        try:
            old = refuse_living(directory)
            cluster = _prepare(config, backend.name, directory, old, run)
            job = backend.submit(directory, cluster, (directory / records.SCRIPT_FILE).read_text())
        except BaseException:
            if is_new:
                down.remove_directory(directory)
            raise
        cluster = replace(cluster, jobs=(job,))
        cluster.write(directory / records.CLUSTER_FILE)
    event_log.append(directory, ClusterSubmitted(job, cluster.incarnation, config.slurm.nodes))
    return directory, cluster


def refuse_living(directory: Path) -> Cluster | None:
    """The record of a dead cluster of that name, None when there was none; UsageError when it lives."""
    old = Cluster.read(directory) if files.exists(directory) else None
    job = alive_job(directory, old) if old is not None else None
    if old is not None and job is not None:
        raise UsageError(
            f"cluster {old.name} is already running (job {job.id} is {job.state})",
            f"Use it, stop it with `raylaunch down {old.name}`, or choose another --name.",
        )
    return old


def _prepare(config: Config, backend: str, directory: Path, old: Cluster | None, run: str | None) -> Cluster:
    """The directory of a new life of the cluster; a dead life's leftovers go, its logs and events stay."""
    for part in (records.LOGS, records.NODES, records.REQUESTS, records.INCARNATIONS):
        files.make_dir(directory / part)
    incarnation = _next_incarnation(directory, old)
    down.clear_life(directory)
    cluster = Cluster(
        name=config.cluster.name,
        backend=backend,
        incarnation=incarnation,
        canary=secrets.token_hex(8),
        created=time.time(),
        min_nodes=config.slurm.min_nodes,
        max_nodes=config.slurm.max_nodes,
        workers_per_node=batch_script.workers_per_node(config.slurm),
        run=run,
    )
    files.write_text(directory / records.TOKEN_FILE, files.new_token())
    without_secrets = config.model_copy(update={"alerts": AlertsConfig()})  # they are its runs'
    files.write_text(directory / records.CONFIG_FILE, loader.dump(without_secrets))
    script = render(config, cluster.name, directory, cluster.canary)
    files.write_text(directory / records.SCRIPT_FILE, script, mode=0o700)
    cluster.write(directory / records.CLUSTER_FILE)
    files.write_text(directory / records.CANARY_FILE, cluster.canary)
    return cluster


def _next_incarnation(directory: Path, old: Cluster | None) -> int:
    """Above all that there were, of elections too: whoever is left of them must find itself fenced."""
    head = Head.read(directory)
    return max([0, old.incarnation if old else 0, head.incarnation if head else 0, *records.claims(directory)]) + 1


@dataclass(frozen=True)
class BringUpProgress:
    """Where a bring-up stands. `stage`: pending, booting, head, nodes, ready."""

    stage: str
    text: str
    ready: int = 0
    total: int = 0


def check_once_queued(directory: Path, cluster: Cluster, backend: Backend) -> None:
    """Raise BringUpError if the job is one that waiting does not start; the caller gives it back then."""
    deadline = time.monotonic() + REASON_LIMIT
    while time.monotonic() < deadline:
        with contextlib.suppress(SlurmUnavailable):  # it has the job; what it does not say is no reason to give it back
            job = backend.states(directory, cluster.jobs).get(cluster.jobs[0])
            if job is not None:
                _refuse_blocked(job, "It was cancelled.")
                if job.reason or not job.pending:
                    return
        time.sleep(JOBS_EVERY[0])


def _refuse_blocked(job: Job, hint: str) -> None:
    if job.blocked:
        raise BringUpError(f"job {job.id} cannot start as submitted ({job.reason}): {job.blocked}", hint)


def wait_ready(
    directory: Path, cluster: Cluster, backend: Backend, timeout: float, show: Callable[[BringUpProgress], None]
) -> list[MemberRow]:
    """Wait until the minimum of nodes is ready; the nodes then. `timeout` counts from the job's start.

    Raises BringUpError with each failed node's own error. The caller gives the job back then.
    """
    deadline: float | None = None
    hopeless: float | None = None
    ask_again, pause = 0.0, JOBS_EVERY[0]
    job: Job | None = None
    answered, heard = time.monotonic(), False
    while True:
        now = time.monotonic()
        if now >= ask_again:
            try:
                job = backend.states(directory, cluster.jobs).get(cluster.jobs[0])
                answered, heard = now, True
            except SlurmUnavailable:
                if now - answered > SILENCE_LIMIT:
                    raise
                show(BringUpProgress("pending", "Slurm does not answer; retrying"))
            pause = min(JOBS_EVERY[1], pause * 1.3)
            ask_again = now + pause
        ready = [node for node in members.living(directory, cluster).nodes if node.state == "ready"]
        failures = node_failures(directory, cluster)
        if len(ready) >= cluster.min_nodes:
            show(BringUpProgress("ready", f"{len(ready)} nodes are ready", len(ready), cluster.max_nodes))
            return ready
        if not heard:
            time.sleep(FILES_EVERY)
            continue
        if job is None or not job.alive or (directory / records.ENDED_FILE).exists():
            raise _ended_early(directory, cluster, job, failures)
        _refuse_blocked(job, "It was cancelled. Use `--no-wait` to keep such a job in the queue.")
        total = len(job.nodes) or cluster.max_nodes
        if failures and total - len(failures) < cluster.min_nodes:
            hopeless = hopeless or now
            if len(failures) + len(ready) >= total or now - hopeless > MORE_NEWS:  # name them all at once
                raise _too_few(cluster, total, failures)
        if not job.pending and deadline is None:
            deadline = now + timeout
        if deadline is not None and now > deadline:
            silent = sorted(set(job.nodes) - {node.name for node in ready})
            raise BringUpError(
                f"only {len(ready)} of at least {cluster.min_nodes} nodes within {timeout:g} s; "
                f"not ready: {', '.join(silent)}{_listed(failures)}",
                f"See {directory / records.LOGS}, or wait longer with --timeout.",
            )
        show(_progress(directory, cluster, job, len(ready), total))
        time.sleep(FILES_EVERY if not job.pending else min(0.5, pause))


def _progress(directory: Path, cluster: Cluster, job: Job, ready: int, total: int) -> BringUpProgress:
    if job.pending:
        start = f", estimated start {job.start}" if job.start else ""
        return BringUpProgress("pending", f"job {job.id} is pending ({job.reason or 'no reason yet'}{start})")
    head = Head.read(directory)
    if head is None or head.canary != cluster.canary:
        return BringUpProgress("booting", f"job {job.id} is {job.state.lower()}; agents are booting on {total} nodes")
    if ready == 0:
        return BringUpProgress("head", f"the head starts on {head.node} ({head.address})", 0, total)
    return BringUpProgress("nodes", f"nodes {ready} of {total}", ready, total)


def node_failures(directory: Path, cluster: Cluster) -> dict[str, str]:
    """Node → its own error: from the directory, and from the job's output for nodes that do not see it."""
    found: dict[str, str] = {}
    for job in cluster.jobs:
        found |= failures_in(directory / records.LOGS / f"slurm-{job}.out")
    for path in (directory / records.NODES).glob("*.json"):
        found[path.stem] = str((files.read_json(path) or {}).get("error"))
    return found


def failures_in(output: Path) -> dict[str, str]:
    """Node → its own error, as it stands in a job's output."""
    found: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in output.read_text(errors="replace").splitlines():
            if line.startswith(records.FAILED_LINE):
                node, _, text = line.removeprefix(records.FAILED_LINE).strip().partition(": ")
                found[node] = text
    return found


def _listed(failures: dict[str, str]) -> str:
    return "".join(f"\n    {node}: {text}" for node, text in sorted(failures.items()))


def _too_few(cluster: Cluster, total: int, failures: dict[str, str]) -> BringUpError:
    good = total - len(failures)
    advice = f"continue without it: `raylaunch up --nodes {good}:{total}`, or " if good else ""
    return BringUpError(
        f"{len(failures)} of {total} nodes cannot start, and at least {cluster.min_nodes} are needed:"
        + _listed(failures),
        f"Repair the node, {advice}exclude it with slurm.exclude.",
    )


def _ended_early(directory: Path, cluster: Cluster, job: Job | None, failures: dict[str, str]) -> BringUpError:
    what = f"job {cluster.jobs[0]} " + (f"is {job.state} ({job.reason})" if job else "is gone")
    if failures:
        return BringUpError(
            f"the cluster ended before it was ready ({what}):{_listed(failures)}", f"See {directory / records.LOGS}."
        )
    output = directory / records.LOGS / f"slurm-{cluster.jobs[0]}.out"
    if cluster.backend == "slurm" and not output.exists():
        return BringUpError(
            f"the job exited before it wrote any output ({what}): expected {output}",
            "The nodes probably do not share the state directory: set cluster.state_dir to one that they share.",
        )
    last = output.read_text(errors="replace").splitlines()[-5:] if output.exists() else []
    return BringUpError(
        f"the cluster ended before it was ready ({what})" + "".join(f"\n    {line}" for line in last),
        f"See {directory / records.LOGS}.",
    )


def find(state_dir: Path, name: str) -> tuple[Path, Cluster]:
    """A cluster by name; UsageError with the names there are."""
    directory = files.cluster_dir(state_dir, name)
    cluster = Cluster.read(directory) if files.exists(directory) else None
    if cluster is None:
        known = names(state_dir)
        raise UsageError(
            f"no cluster {name} in {state_dir}",
            f"Available: {', '.join(known)}." if known else "Start one with `raylaunch up`.",
        )
    return directory, cluster


def names(state_dir: Path) -> list[str]:
    """The clusters that the state directory knows, dead ones too."""
    folder = state_dir / "clusters"
    try:
        return sorted(p.parent.name for p in folder.glob(f"*/{records.CLUSTER_FILE}"))
    except OSError:
        return []


def alive_job(directory: Path, cluster: Cluster) -> Job | None:
    """A job of the cluster that is alive, running ones and the base's first: a cluster lives on in its joiners,
    and while its base job waits to start again."""
    jobs = backends.of(cluster.backend).states(directory, cluster.jobs)
    living = [jobs[job] for job in cluster.jobs if job in jobs and jobs[job].alive]
    return min(living, key=lambda job: job.pending, default=None)


def require_alive(state_dir: Path, name: str) -> tuple[Path, Cluster]:
    """A living cluster by name; RaylaunchError with the next step otherwise."""
    directory, cluster = find(state_dir, name)
    if (directory / records.ENDED_FILE).exists() or alive_job(directory, cluster) is None:
        raise RaylaunchError(f"cluster {name} is down", f"Start it with `raylaunch up --name {name}`.")
    return directory, cluster


def tunnel(directory: Path, cluster: Cluster) -> tuple[str, str, str] | None:
    """(address on the head, node, ssh line) of the dashboard; None before there is a head."""
    head = Head.read(directory)
    if head is None or head.canary != cluster.canary:
        return None
    port = head.dashboard_port
    line = f"ssh -N -L {port}:127.0.0.1:{port} {user()}@{head.hostname}"
    return f"http://127.0.0.1:{port}", head.node, line
