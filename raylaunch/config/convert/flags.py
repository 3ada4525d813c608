"""Command lines taken apart: the options of sbatch, srun and torchrun that mean something here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

SHORT = {
    "A": "account", "a": "array", "c": "cpus-per-task", "C": "constraint", "d": "dependency", "D": "chdir",
    "e": "error", "G": "gpus", "i": "input", "J": "job-name", "k": "no-kill", "L": "licenses", "m": "distribution",
    "M": "clusters", "n": "ntasks", "N": "nodes", "o": "output", "p": "partition", "q": "qos", "t": "time",
    "w": "nodelist", "W": "wait", "x": "exclude", "H": "hold", "s": "oversubscribe", "l": "label", "u": "unbuffered",
    "K": "kill-on-bad-exit",
}  # fmt: skip
"""sbatch's and srun's short options (sbatch(1), srun(1))."""
FLAGS = {
    "exclusive", "hold", "no-kill", "overcommit", "oversubscribe", "requeue", "no-requeue", "wait", "parsable", "verbose",
    "quiet", "contiguous", "spread-job", "use-min-nodes", "label", "unbuffered", "overlap", "exact", "pty",
    "kill-on-bad-exit", "no-container-mount-home", "container-mount-home", "container-writable", "container-readonly",
    "container-remap-root", "no-container-entrypoint", "container-entrypoint", "get-user-env", "reboot",
}  # fmt: skip
"""Options without a value, or whose value can only be joined with `=`."""
TORCHRUN_FLAGS = {"standalone", "module", "no-python", "run-path", "use-env", "help"}


@dataclass
class Options:
    """What was given: option → value ("" for flags); `rest`: the words after the options."""

    values: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)


def slurm(words: Sequence[str]) -> Options:
    """Of sbatch or srun, up to the first word that is none."""
    return _parse(words, SHORT, FLAGS)


def torchrun(words: Sequence[str]) -> Options:
    """Of torchrun, names with `-` for `_`, up to the script."""
    return _parse(words, {"m": "module", "t": "tee", "r": "redirects", "h": "help"}, TORCHRUN_FLAGS)


def _parse(words: Sequence[str], short: Mapping[str, str], flags: Iterable[str]) -> Options:
    found, flags = Options(), set(flags)
    at = 0
    while at < len(words) and words[at].startswith("-") and words[at] not in {"-", "--"}:
        word = words[at]
        at += 1
        if word.startswith("--"):
            name, joined, value = word[2:].partition("=")
            name = name.replace("_", "-")
        else:
            name, value = short.get(word[1], word[1]), word[2:].removeprefix("=")
            joined = value
        if not joined and name not in flags and at < len(words):
            value = words[at]
            at += 1
        found.values[name] = value
    found.rest = list(words[at + (at < len(words) and words[at] == "--") :])
    return found
