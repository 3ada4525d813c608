"""What Slurm's settings, partitions and accounts mean for raylaunch and this user. Pure: rows in, findings out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta

from raylaunch.config.schema import SlurmConfig
from raylaunch.scheduler.slurm.rows import PartitionRow
from raylaunch.scheduler.slurm.site import Association
from raylaunch.tools.doctor.finding import Finding, few, ok, problem, warning

OLDEST = (22, 5)
MOST_PARTITIONS = 12
_AWAY = {"down", "drained", "draining", "drain", "fail", "failing", "error"}


def settings(found: Mapping[str, str], soft_files: int | None) -> Iterator[Finding]:
    """The site's configuration; `soft_files`: the limit of open files here, which Slurm may hand on to the nodes."""
    version = found.get("SLURM_VERSION", "")
    name = f", cluster {found['ClusterName']}" if found.get("ClusterName") else ""
    text = f"Slurm {version or '(unknown version)'}{name}"
    old = version and tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST
    yield warning("slurm.version", text, "raylaunch is tested with 22.05 and later.") if old else ok("slurm.version", text)  # fmt: skip
    down, grace, age = (_seconds(found.get(key, "")) for key in ("SlurmdTimeout", "KillWait", "MinJobAge"))
    words = [f"at most {found['MaxJobCount']} jobs"] if "MaxJobCount" in found else []
    words += [f"a silent node is down after {down} s"] if down else []
    words += [f"{grace} s from SIGTERM to SIGKILL"] if grace is not None else []
    if words:
        yield ok("slurm.limits", ", ".join(words))
    if down == 0:
        hint = "raylaunch goes on without such a node, but its place in the job stays taken."
        yield warning("slurm.limits", "SlurmdTimeout is 0: Slurm never calls a silent node down", hint)
    if age is not None and age < 10:
        hint = "Why a job ended is then known from sacct alone."
        yield warning("slurm.limits", f"MinJobAge is {age} s: squeue forgets ended jobs at once", hint)
    requeue = "is the default" if found.get("JobRequeue") == "1" else "must be asked for, which raylaunch does"
    mode, kind = found.get("PreemptMode", "OFF"), found.get("PreemptType", "none").rpartition("/")[2]
    preempts = "no preemption" if mode.upper() == "OFF" or kind == "none" else f"preemption {mode} ({kind})"
    yield ok("slurm.requeue", f"requeue {requeue}; {preempts}")
    if found.get("KillOnBadExit", "0").startswith("1"):
        yield ok("slurm.steps", "KillOnBadExit is on: raylaunch's own steps switch it off")
    track = found.get("ProctrackType", "cgroup")
    if not track.endswith("cgroup"):
        hint = "raylaunch ends its own; a job that is killed hard may leave some behind. proctrack/cgroup does not."
        yield warning("slurm.processes", f"{track}: processes that leave their session outlive their job", hint)
    given, spared = found.get("PropagateResourceLimits", "ALL"), found.get("PropagateResourceLimitsExcept", "")
    handed_on = (given == "ALL" or "NOFILE" in given) and "NOFILE" not in spared
    if handed_on and soft_files is not None and soft_files < 1024:
        text = f"Slurm hands this shell's limit of {soft_files} open files on to the nodes"
        yield warning("slurm.propagation", text, "Raise it before `up`: `ulimit -n 65536`.")


def _seconds(text: str) -> int | None:
    """`300 sec` → 300."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None


def partitions(rows: Sequence[PartitionRow], asked: str | None) -> Iterator[Finding]:
    """A line a partition; the one that is asked for, or the default one, comes first and must work."""
    names = list(dict.fromkeys(row.name for row in rows))
    chosen = (asked or next((row.name for row in rows if row.default), "")).split(",")
    if not rows:
        yield problem("queue.partition", "Slurm shows you no partition", "Ask your administrators which you may use.")
    elif missing := [name for name in chosen if name not in names]:
        hint = f"Set slurm.partition to one of: {few(names)}."
        if asked:
            yield problem("queue.partition", f"there is no partition {few(missing)}", hint)
        else:
            yield warning("queue.partition", "there is no default partition", hint)
    names.sort(key=lambda name: name not in chosen)
    for name in names[:MOST_PARTITIONS]:
        yield _partition(name, [row for row in rows if row.name == name], name in chosen)
    if len(names) > MOST_PARTITIONS:
        yield ok("queue.partition", f"and {len(names) - MOST_PARTITIONS} more in `sinfo`")


def _partition(name: str, rows: Sequence[PartitionRow], is_chosen: bool) -> Finding:
    idle = [row for row in rows if row.state == "idle" and "*" not in row.flags]
    total = sum(row.node_count for row in rows)
    away = sum(row.node_count for row in rows if row.state in _AWAY or "*" in row.flags)
    words = [f"{sum(row.node_count for row in idle)} of {total} nodes idle"]
    if gpus := sum(row.node_count * row.gpus for row in rows):
        words.append(f"{sum(row.node_count * row.gpus for row in idle)} of {gpus} GPUs on them")
    words += [f"{away} down or drained"] if away else []
    limit = rows[0].time_limit
    words.append("no time limit" if limit is None else f"up to {timedelta(seconds=limit)}".removesuffix(", 0:00:00"))
    text = f"{name}{' (default)' * rows[0].default}: {', '.join(words)}"
    text += "" if rows[0].up else "; it takes no jobs (down)"
    usable = rows[0].up and away < total
    if is_chosen and not usable:
        return problem("queue.partition", text, "Choose another slurm.partition.")
    if not usable:
        return warning("queue.partition", text, "Do without it.")
    return ok("queue.partition", text)


def accounts(rows: Sequence[Association] | None, shares: Mapping[str, float], slurm: SlurmConfig) -> Iterator[Finding]:
    """This user's accounts and QOS, against what the config asks for. None: there is no accounting."""
    if rows is None:
        yield ok("user.accounts", "Slurm keeps no accounting here: no account or QOS to give, and no sacct")
        return
    if not rows:
        hint = "Ask your administrators for an account (sacctmgr add user), if jobs are refused."
        yield warning("user.accounts", "you have no account in Slurm's accounting", hint)
        return
    names = list(dict.fromkeys(row.account for row in rows))
    own = [row for row in rows if not slurm.account or row.account.lower() == slurm.account.lower()]
    if not own:
        text = f"slurm.account {slurm.account} is not yours; you have: {few(names)}"
        yield problem("user.accounts", text, "Set slurm.account to one of them.")
        return
    shown = [f"{name} (fair share {shares[name]:.2f})" if name in shares else name for name in names]
    yield ok("user.accounts", f"accounts: {few(shown)}")
    qos = list(dict.fromkeys(name for row in own for name in row.qos))
    if slurm.qos and qos and slurm.qos not in qos:
        text = f"slurm.qos {slurm.qos} is not yours; you have: {few(qos)}"
        yield problem("user.qos", text, "Set slurm.qos to one of them.")
    elif qos:
        default = next((f"; default {row.default_qos}" for row in own if row.default_qos), "")
        yield ok("user.qos", f"QOS: {few(qos)}{default}")


def estimate(nodes: str, when: datetime | None, where: str, now: datetime) -> Finding:
    """What `sbatch --test-only` said of a job like `up`'s."""
    job = f"a job of {nodes} node{'s' * (nodes != '1')}"
    if when is None:
        return ok("user.submit", f"sbatch takes {job}; it does not say when it would start")
    wait = (when - now).total_seconds()
    soon = "at once" if wait < 60 else f"{when:%Y-%m-%d %H:%M} (in {wait / 3600:.1f} h)"
    return ok("user.submit", f"sbatch takes {job}; start: {soon}" + (f", on {where}" if where else ""))
