"""Config → the text of the batch script. Pure: what `--dry-run` prints is what is submitted.

The template is sbatch/cluster.sbatch. Options that raylaunch must own are refused by name when they
come through `slurm.extra` or after `--`; every other sbatch option passes through as it is.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from raylaunch.config import SlurmConfig
from raylaunch.configfile import shell_word
from raylaunch.errors import UsageError

TEMPLATES = Path(__file__).resolve().parents[2] / "sbatch"

# What raylaunch must own, and why a user's value would break it.
OWNED = {
    "--no-kill": "the job must survive a dead node",
    "--kill-on-invalid-dep": "",
    "--output": "the job's output goes to the cluster directory",
    "--error": "the job's output goes to the cluster directory",
    "--open-mode": "the job's output goes to the cluster directory",
    "--parsable": "raylaunch reads sbatch's answer",
    "--wait": "raylaunch waits itself",
    "--wrap": "raylaunch is the script",
    "--array": "a cluster is one job",
    "--ntasks": "give slurm.nodes and slurm.ntasks_per_node",
    "--gpus": "give slurm.gpus_per_node",
    "--gpus-per-task": "give slurm.gpus_per_node and slurm.ntasks_per_node",
    "--ntasks-per-gpu": "give slurm.gpus_per_node and slurm.ntasks_per_node",
    "--tres-per-task": "give slurm.gpus_per_node and slurm.ntasks_per_node",
    "--tres-per-node": "give slurm.gres",
    "--chdir": "the job starts where raylaunch was called",
    "--quiet": "raylaunch reads sbatch's answer",
    "--test-only": "use --dry-run",
}
_SHORT = {"-k": "--no-kill", "-o": "--output", "-e": "--error", "-W": "--wait", "-a": "--array", "-n": "--ntasks",
          "-D": "--chdir", "-Q": "--quiet", "-N": "--nodes", "-J": "--job-name", "-t": "--time", "-p": "--partition",
          "-A": "--account", "-q": "--qos", "-C": "--constraint", "-w": "--nodelist", "-x": "--exclude",
          "-c": "--cpus-per-task", "-G": "--gpus"}  # fmt: skip
# These have a key of their own, and raylaunch needs to know their value.
_KEYS = {"--nodes": "slurm.nodes", "--ntasks-per-node": "slurm.ntasks_per_node", "--signal": "slurm.signal",
         "--job-name": "slurm.job_name", "--gpus-per-node": "slurm.gpus_per_node", "--gres": "slurm.gres",
         "--cpus-per-task": "slurm.cpus_per_task"}  # fmt: skip


def check_extra(extra: Sequence[str]) -> None:
    """Refuse, by name, the sbatch options that raylaunch must own."""
    if extra and not extra[0].startswith("-"):
        raise UsageError(
            f"unexpected argument {extra[0]!r}",
            f"A cluster is named with --name {extra[0]}; sbatch options go behind `--`, and begin with a dash.",
        )
    for option in extra:
        if not option.startswith("-"):
            continue  # the value of the option before it
        name = option.split("=", 1)[0]
        if not name.startswith("--"):
            name = _SHORT.get(name[:2], name)
        if name in OWNED:
            raise UsageError(
                f"the sbatch option {name} is raylaunch's own" + (f": {OWNED[name]}" if OWNED[name] else ""),
                "Leave it out of slurm.extra and of what follows `--`.",
            )
        if name in _KEYS:
            raise UsageError(
                f"the sbatch option {name} has its own key", f"Set {_KEYS[name]} in place of passing it through."
            )


def options(slurm: SlurmConfig, name: str, cluster_dir: Path) -> list[str]:
    """The #SBATCH options, in one fixed order; values are quoted where sbatch needs it."""
    nodes = slurm.nodes.replace(":", "-")
    given: list[tuple[str, object]] = [
        ("job-name", slurm.job_name or f"raylaunch-{name}"),
        ("nodes", nodes),
        # With one task a node Slurm stops at the lower end of a range of nodes; unsaid, it takes all it can.
        ("ntasks-per-node", workers_per_node(slurm) if workers_per_node(slurm) > 1 else None),
        ("gpus-per-node", slurm.gpus_per_node or None),
        ("gres", slurm.gres),
        ("cpus-per-task", slurm.cpus_per_task),
        ("mem", slurm.mem),
        ("time", slurm.time),
        ("account", slurm.account),
        ("partition", slurm.partition),
        ("qos", slurm.qos),
        ("constraint", slurm.constraint),
        ("reservation", slurm.reservation),
        ("nodelist", slurm.nodelist),
        ("exclude", slurm.exclude),
        ("mail-type", slurm.mail_type),
        ("mail-user", slurm.mail_user),
        ("signal", slurm.signal),
        ("comment", slurm.comment),
        ("output", f"{cluster_dir}/logs/slurm-%j.out"),
        ("open-mode", "append"),
    ]
    lines = [f"--{key}={_quote(str(value))}" for key, value in given if value is not None]
    return [*lines, *(["--exclusive"] if slurm.exclusive else []), "--no-kill", "--no-requeue", *_joined(slurm.extra)]


def _quote(value: str) -> str:
    """sbatch takes a double-quoted value with spaces in it."""
    return value if re.fullmatch(r"[^\s\"'#]+", value) else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _joined(extra: Sequence[str]) -> list[str]:
    """["--dependency", "singleton"] as one line each option."""
    lines: list[str] = []
    for word in extra:
        if word.startswith("-") or not lines:
            lines.append(word)
        else:
            lines[-1] += " " + _quote(word)
    return lines


def gpus_per_node(slurm: SlurmConfig) -> int:
    """How many GPUs a node was asked for: `4`, `a100:4`, or a gres of `gpu[:type]:4`."""
    for text in (str(slurm.gpus_per_node or ""), slurm.gres or ""):
        for part in text.split(","):
            words = part.split(":")
            if text is slurm.gres and words[0] != "gpu":
                continue
            if words[-1].isdigit():
                return int(words[-1])
            if words[0] == "gpu":
                return 1
    return 0


def workers_per_node(slurm: SlurmConfig) -> int:
    """Training workers per node: as asked, else one per GPU, else one."""
    return slurm.ntasks_per_node or gpus_per_node(slurm) or 1


def render(slurm: SlurmConfig, name: str, cluster_dir: Path, canary: str, python: str = sys.executable) -> str:
    """The whole batch script of a cluster."""
    check_extra(slurm.extra)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    return environment.get_template("cluster.sbatch").render(
        options=options(slurm, name, cluster_dir),
        name=name,
        cluster_dir=shlex.quote(str(cluster_dir)),
        canary=shlex.quote(canary),
        env=[(key, shell_word(value)) for key, value in slurm.env.items()],
        modules=[shlex.quote(module) for module in slurm.modules],
        setup=slurm.setup,
        python=shlex.quote(python),
    )
