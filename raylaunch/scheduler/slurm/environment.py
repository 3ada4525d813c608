"""The environment for Slurm's commands: without what would silently change their meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# An SBATCH_ variable beats the script's own #SBATCH line; these are raylaunch's in any case.
_OWN_SBATCH = {"ARRAY_INX", "CLUSTERS", "DEBUG", "ERROR", "EXPORT", "INPUT", "OPEN_MODE", "OUTPUT", "WAIT"}
_SBATCH_OPTIONS = {
    "CORE_SPEC": "core-spec",
    "MEM_PER_NODE": "mem",
    "NO_REQUEUE": "requeue",
    "TIMELIMIT": "time",
}  # where the option's name is not the variable's


_SHORT_OPTIONS = {"-A": "account", "-C": "constraint", "-G": "gpus", "-J": "job-name", "-p": "partition",
                  "-q": "qos", "-t": "time"}  # fmt: skip


_SLURM_KEPT = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"}
_SLURM_PREFIXES = ("SLURM_", "SLURMD_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_")


def clean_env(environ: Mapping[str, str], script: str = "", options: Sequence[str] = ()) -> dict[str, str]:
    """The environment for a Slurm command: without what would silently change its meaning.

    Out go the variables of a job we run in (a joiner is submitted from inside one), those that set
    other output formats and filters (SQUEUE_USERS), and each SBATCH_ variable for which `script` or
    `options` say something themselves. What only the variable says (SBATCH_ACCOUNT) stays.
    """
    lines = [line.removeprefix("#SBATCH") for line in script.splitlines() if line.startswith("#SBATCH")]
    words = [*(word for line in lines for word in line.split()[:1]), *options]
    said = {_SHORT_OPTIONS.get(word[:2], "") if word[:2] != "--" else word[2:].split("=")[0] for word in words}
    said |= {"requeue"} if "no-requeue" in said else set()

    def stays(name: str) -> bool:
        if name in _SLURM_KEPT:
            return True
        if name.startswith("SBATCH_"):
            tail = name.removeprefix("SBATCH_")
            return tail not in _OWN_SBATCH and _SBATCH_OPTIONS.get(tail, tail.lower().replace("_", "-")) not in said
        return not name.startswith(_SLURM_PREFIXES)

    return {name: value for name, value in environ.items() if stays(name)}
