"""Judge Slurm's settings, partitions and accounts for raylaunch and this user. Pure: rows in, findings out."""

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
    """The site's configuration; `soft_files`: this shell's limit of open files, which Slurm may propagate to nodes."""
    version = found.get("SLURM_VERSION", "")
    name = f", cluster {found['ClusterName']}" if found.get("ClusterName") else ""
    text = f"Slurm {version or '(unknown version)'}{name}"
    old = version and tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST
    hint = "raylaunch is tested with Slurm 22.05 and later."
    yield warning("slurm.version", text, hint) if old else ok("slurm.version", text)
    down, grace, age = (_seconds(found.get(key, "")) for key in ("SlurmdTimeout", "KillWait", "MinJobAge"))
    words = [f"at most {found['MaxJobCount']} jobs"] if "MaxJobCount" in found else []
    words += [f"unresponsive nodes are down after {down} s"] if down else []
    words += [f"{grace} s from SIGTERM to SIGKILL"] if grace is not None else []
    if words:
        yield ok("slurm.limits", ", ".join(words))
    if down == 0:
        hint = "raylaunch continues without the node, but the node stays allocated to the job."
        yield warning("slurm.limits", "SlurmdTimeout is 0: Slurm never sets unresponsive nodes to down", hint)
    if age is not None and age < 10:
        hint = "Only sacct can then report why a job ended."
        yield warning("slurm.limits", f"MinJobAge is {age} s: squeue drops ended jobs almost immediately", hint)
    requeue = "is the default" if found.get("JobRequeue") == "1" else "must be requested (raylaunch does this)"
    mode, kind = found.get("PreemptMode", "OFF"), found.get("PreemptType", "none").rpartition("/")[2]
    preempts = "no preemption" if mode.upper() == "OFF" or kind == "none" else f"preemption {mode} ({kind})"
    yield ok("slurm.requeue", f"requeue {requeue}; {preempts}")
    if found.get("KillOnBadExit", "0").startswith("1"):
        yield ok("slurm.steps", "KillOnBadExit is set; raylaunch disables it for its own steps")
    track = found.get("ProctrackType", "cgroup")
    if not track.endswith("cgroup"):
        hint = (
            "raylaunch ends its own processes, but a killed job may leave some behind. proctrack/cgroup prevents this."
        )
        yield warning("slurm.processes", f"{track}: processes with a new session may outlive their job", hint)
    given, spared = found.get("PropagateResourceLimits", "ALL"), found.get("PropagateResourceLimitsExcept", "")
    handed_on = (given == "ALL" or "NOFILE" in given) and "NOFILE" not in spared
    if handed_on and soft_files is not None and soft_files < 1024:
        text = f"Slurm propagates this shell's limit of {soft_files} open files to the nodes"
        yield warning("slurm.propagation", text, "Run `ulimit -n 65536` before `raylaunch up`.")


def _seconds(text: str) -> int | None:
    """`300 sec` → 300."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None


def partitions(rows: Sequence[PartitionRow], asked: str | None) -> Iterator[Finding]:
    """One finding per partition; the requested or default one comes first and must be usable."""
    names = list(dict.fromkeys(row.name for row in rows))
    chosen = (asked or next((row.name for row in rows if row.default), "")).split(",")
    if not rows:
        yield problem(
            "queue.partition", "Slurm lists no partitions", "Ask your administrators which partitions you may use."
        )
    elif missing := [name for name in chosen if name not in names]:
        hint = f"Set slurm.partition to one of: {few(names)}."
        if asked:
            yield problem("queue.partition", f"unknown partition: {few(missing)}", hint)
        else:
            yield warning("queue.partition", "Slurm has no default partition", hint)
    names.sort(key=lambda name: name not in chosen)
    for name in names[:MOST_PARTITIONS]:
        yield _partition(name, [row for row in rows if row.name == name], name in chosen)
    if len(names) > MOST_PARTITIONS:
        yield ok("queue.partition", f"{len(names) - MOST_PARTITIONS} more partitions, see `sinfo`")


def _partition(name: str, rows: Sequence[PartitionRow], is_chosen: bool) -> Finding:
    idle = [row for row in rows if row.state == "idle" and "*" not in row.flags]
    total = sum(row.node_count for row in rows)
    away = sum(row.node_count for row in rows if row.state in _AWAY or "*" in row.flags)
    words = [f"{sum(row.node_count for row in idle)} of {total} nodes idle"]
    if gpus := sum(row.node_count * row.gpus for row in rows):
        words.append(f"{sum(row.node_count * row.gpus for row in idle)} of {gpus} GPUs on idle nodes")
    words += [f"{away} down or drained"] if away else []
    limit = rows[0].time_limit
    words.append(
        "no time limit" if limit is None else f"time limit {timedelta(seconds=limit)}".removesuffix(", 0:00:00")
    )
    text = f"{name}{' (default)' * rows[0].default}: {', '.join(words)}"
    text += "" if rows[0].up else "; does not accept jobs (down)"
    usable = rows[0].up and away < total
    if is_chosen and not usable:
        return problem("queue.partition", text, "Choose another slurm.partition.")
    if not usable:
        return warning("queue.partition", text, "Use another partition.")
    return ok("queue.partition", text)


def accounts(rows: Sequence[Association] | None, shares: Mapping[str, float], slurm: SlurmConfig) -> Iterator[Finding]:
    """This user's accounts and QOS, compared with the configuration. None: accounting is not enabled."""
    if rows is None:
        yield ok("user.accounts", "Slurm accounting is not enabled: accounts, QOS and sacct are unavailable")
        return
    if not rows:
        hint = "If jobs are rejected, ask your administrators for an account (sacctmgr add user)."
        yield warning("user.accounts", "you have no Slurm account", hint)
        return
    names = list(dict.fromkeys(row.account for row in rows))
    own = [row for row in rows if not slurm.account or row.account.lower() == slurm.account.lower()]
    if not own:
        text = f"you cannot use slurm.account {slurm.account}. Your accounts: {few(names)}"
        yield problem("user.accounts", text, "Set slurm.account to one of them.")
        return
    shown = [f"{name} (fair share {shares[name]:.2f})" if name in shares else name for name in names]
    yield ok("user.accounts", f"accounts: {few(shown)}")
    qos = list(dict.fromkeys(name for row in own for name in row.qos))
    if slurm.qos and qos and slurm.qos not in qos:
        text = f"you cannot use slurm.qos {slurm.qos}. Your QOS: {few(qos)}"
        yield problem("user.qos", text, "Set slurm.qos to one of them.")
    elif qos:
        default = next((f"; default {row.default_qos}" for row in own if row.default_qos), "")
        yield ok("user.qos", f"QOS: {few(qos)}{default}")


def estimate(nodes: str, when: datetime | None, where: str, now: datetime) -> Finding:
    """The result of `sbatch --test-only` for a job like that of `up`."""
    job = f"a job of {nodes} node{'s' * (nodes != '1')}"
    if when is None:
        return ok("user.submit", f"sbatch accepts {job}; the start time is unknown")
    wait = (when - now).total_seconds()
    soon = "now" if wait < 60 else f"{when:%Y-%m-%d %H:%M} (in {wait / 3600:.1f} h)"
    return ok("user.submit", f"sbatch accepts {job}; estimated start: {soon}" + (f", on {where}" if where else ""))
