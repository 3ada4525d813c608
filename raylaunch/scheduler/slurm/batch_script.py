"""Config → the text of the batch script. Pure: what `--dry-run` prints is what is submitted.

The templates are sbatch/cluster.sbatch, for the base job, and sbatch/joiner.sbatch, for small jobs whose
nodes join later: the same environment, set-up and step. Options that raylaunch must own are refused by name when they
come through `slurm.extra` or after `--`; every other sbatch option passes through as it is.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import hostlist
from jinja2 import DictLoader, Environment, StrictUndefined

from raylaunch.config.loader import shell_word
from raylaunch.config.schema import Config, SlurmConfig
from raylaunch.errors import SlurmError, UsageError
from raylaunch.scheduler.slurm.parse import parse_hosts

TEMPLATES = Path(__file__).parent / "templates"
_TEXTS = {path.name: path.read_text(encoding="utf-8") for path in TEMPLATES.glob("*.sbatch")}
"""Read with this module: a head that lives for days renders what it was started with, whatever is installed since."""

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


# Of the user's options, what a joiner must not have: it starts at once or not at all, and never anew.
_NOT_FOR_JOINERS = {"--dependency", "-d", "--begin", "-b", "--hold", "-H", "--requeue", "--no-requeue", "--nodefile", "-F",
                    "--contiguous"}  # fmt: skip


DOCTOR_MINUTES = 15


def job_name(slurm: SlurmConfig, name: str) -> str:
    """Of the base job, and of what succeeds it."""
    return slurm.job_name or f"raylaunch-{name}"


def joiner_name(name: str) -> str:
    return f"raylaunch-{name}-join"


def comment(slurm: SlurmConfig, name: str, canary: str, nodes: int | None = None) -> str:
    """A job's comment: which cluster and life of it the job belongs to, and for a joiner how many nodes were
    asked for; then the user's own words."""
    own = f"raylaunch cluster={name} life={canary}" + (f" nodes={nodes}" if nodes is not None else "")
    return f"{own}; {slurm.comment}" if slurm.comment else own


def options(slurm: SlurmConfig, name: str, cluster_dir: Path, canary: str, requeue: bool = False) -> list[str]:
    """The #SBATCH options of the base job, in one fixed order; values are quoted where sbatch needs it."""
    given = _given(slurm, cluster_dir) | {
        "job-name": job_name(slurm, name),
        "nodes": slurm.nodes.replace(":", "-"),
        "nodelist": slurm.nodelist,
        "mail-type": slurm.mail_type,
        "mail-user": slurm.mail_user,
        "comment": comment(slurm, name, canary),
    }
    own = {"--requeue", "--no-requeue"} & set(slurm.extra)
    flags = ["--no-kill", *([] if own else ["--requeue" if requeue else "--no-requeue"])]
    return [*_lines(given, slurm.exclusive), *flags, *_joined(slurm.extra)]


def joiner_options(
    config: Config, name: str, cluster_dir: Path, canary: str, nodes: int, exclude: Sequence[str]
) -> list[str]:
    """The #SBATCH options of a joiner: as the base's but for elastic.join's, and what is the base's alone."""
    slurm, join = config.slurm, config.elastic.join
    given = _given(slurm, cluster_dir) | {
        "job-name": joiner_name(name),
        "nodes": "1" if nodes == 1 else f"1-{nodes}",
        "time": join.time or slurm.time,
        "account": join.account or slurm.account,
        "partition": join.partition or slurm.partition,
        "qos": join.qos or slurm.qos,
        "exclude": excluded(slurm, exclude),
        "comment": comment(slurm, name, canary, nodes),
    }
    return [*_lines(given, slurm.exclusive), "--no-kill", "--no-requeue", *_joined(_at_once(slurm.extra))]


def doctor_options(slurm: SlurmConfig, directory: Path) -> list[str]:
    """The #SBATCH options of `raylaunch doctor --nodes`: as the base's, short, at once or not at all."""
    given = _given(slurm, directory) | {
        "job-name": "raylaunch-doctor",
        "nodes": slurm.nodes.replace(":", "-"),
        "time": DOCTOR_MINUTES,
        "nodelist": slurm.nodelist,
        "signal": None,
        "output": f"{directory}/slurm-%j.out",
    }
    return [*_lines(given, slurm.exclusive), "--no-kill", "--no-requeue", *_joined(_at_once(slurm.extra))]


def _at_once(extra: Sequence[str]) -> list[str]:
    """slurm.extra without what would make a job wait or run again."""
    kept: list[str] = []
    stays = True
    for word in extra:  # an option's value, as a word of its own, goes the way of the option
        if word.startswith("-"):
            stays = (word.split("=", 1)[0] if word.startswith("--") else word[:2]) not in _NOT_FOR_JOINERS
        kept += [word] if stays else []
    return kept


def excluded(slurm: SlurmConfig, more: Sequence[str]) -> str | None:
    """slurm.exclude, which may name a file, and more nodes."""
    own = slurm.exclude or ""
    if "/" in own and more:
        with contextlib.suppress(OSError):
            own = ",".join(Path(own).read_text().split())
    listed = hostlist.collect_hostlist(more) if more else ""
    return ",".join(part for part in (own, listed) if part) or None


def barred(slurm: SlurmConfig) -> frozenset[str]:
    """The nodes of slurm.exclude; none where it cannot be read."""
    marker = "raylaunch"  # what makes a file's name its content
    text = excluded(slurm, [marker])
    with contextlib.suppress(SlurmError):
        return frozenset(parse_hosts(text or "")) - {marker}
    return frozenset()


def _given(slurm: SlurmConfig, cluster_dir: Path) -> dict[str, object]:
    """What the base job and its joiners have in common, and where the others' values stand."""
    return {
        "job-name": None,
        "nodes": None,
        # With one task a node Slurm stops at the lower end of a range of nodes; unsaid, it takes all it can.
        "ntasks-per-node": workers_per_node(slurm) if workers_per_node(slurm) > 1 else None,
        "gpus-per-node": slurm.gpus_per_node or None,
        "gres": slurm.gres,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "time": slurm.time,
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "nodelist": None,
        "exclude": slurm.exclude,
        "mail-type": None,
        "mail-user": None,
        "signal": slurm.signal,
        "comment": None,
        "output": f"{cluster_dir}/logs/slurm-%j.out",
        "open-mode": "append",
    }


def _lines(given: dict[str, object], exclusive: bool) -> list[str]:
    lines = [f"--{key}={_quote(str(value))}" for key, value in given.items() if value is not None]
    return [*lines, *(["--exclusive"] if exclusive else [])]


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


def render(
    slurm: SlurmConfig, name: str, cluster_dir: Path, canary: str, python: str = sys.executable, requeue: bool = False
) -> str:
    """The whole batch script of a cluster's base job."""
    check_extra(slurm.extra)
    lines = options(slurm, name, cluster_dir, canary, requeue)
    return _render("cluster.sbatch", slurm, lines, name, cluster_dir, canary, python)


def render_joiner(
    config: Config, name: str, cluster_dir: Path, canary: str, nodes: int, exclude: Sequence[str],
    python: str = sys.executable,
) -> str:  # fmt: skip
    """The whole batch script of a joiner of one to `nodes` nodes, none of them in `exclude`."""
    check_extra(config.slurm.extra)
    lines = joiner_options(config, name, cluster_dir, canary, nodes, exclude)
    return _render("joiner.sbatch", config.slurm, lines, name, cluster_dir, canary, python)


def render_doctor(slurm: SlurmConfig, directory: Path, canary: str, python: str = sys.executable) -> str:
    """The whole batch script of `raylaunch doctor --nodes`."""
    check_extra(slurm.extra)
    lines = doctor_options(slurm, directory)
    return _render(
        "doctor.sbatch", slurm, lines, "doctor", directory, canary, python, "raylaunch.tools.doctor.node_check"
    )


def _render(
    template: str, slurm: SlurmConfig, lines: list[str], name: str, cluster_dir: Path, canary: str, python: str,
    module: str = "raylaunch.cluster.agent.supervisor",
) -> str:  # fmt: skip
    environment = Environment(
        loader=DictLoader(_TEXTS), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    return environment.get_template(template).render(
        options=lines,
        name=name,
        cluster_dir=shlex.quote(str(cluster_dir)),
        canary=shlex.quote(canary),
        env=[(key, shell_word(value)) for key, value in slurm.env.items()],
        modules=[shlex.quote(module) for module in slurm.modules],
        setup=slurm.setup,
        python=shlex.quote(python),
        module=module,
    )
