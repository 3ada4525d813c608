"""The training command: what stands behind srun, a container, a shell or a launcher."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from raylaunch.config.convert import flags, shell

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_TOOLS = {"pip", "venv", "ensurepip", "http.server", "json.tool", "site", "zipfile"}
_PYTHON = re.compile(r"(^|/)python[\d.]*$")
TORCHRUN, SRUN, PLAIN = 3, 2, 1
"""How certain it is that a command is the training."""


@dataclass
class Launch:
    """A command that may be the training."""

    certain: int = PLAIN
    words: list[str] = field(default_factory=list)
    given: dict[str, str] = field(default_factory=dict)
    """srun's options."""
    torchrun: dict[str, str] | None = None
    environment: list[str] = field(default_factory=list)
    """NAME=value in front of it."""
    before: list[str] = field(default_factory=list)
    """Commands of its shell that come first."""
    notes: list[str] = field(default_factory=list)


def find_launch(words: list[str]) -> Launch | None:
    """The training command behind srun, a container or a launcher; None for any other command."""
    found = Launch()
    while words:
        program = words[0].rsplit("/", 1)[-1]
        if ASSIGNMENT.fullmatch(words[0]):
            found.environment.append(words[0])
            words = words[1:]
        elif program == "srun":
            found.certain = SRUN
            given = flags.slurm(words[1:])
            found.given |= given.values
            words = given.rest
        elif program in {"exec", "time", "nohup", "nice", "stdbuf", "numactl", "env"} and len(words) > 1:
            words = _past_options(words[1:])
        elif program in {"bash", "sh"} and words[1:2] in (["-c"], ["-lc"]) and len(words) > 2:
            try:
                inner = shell.read(words[2]).commands
            except ValueError:
                return None
            found.before += [each.text for each in inner[:-1]]
            words = words_of(inner[-1].text) if inner else []
        elif program in {"apptainer", "singularity"}:
            found.notes.append(f"{program}: containers are not carried over; start the agents in yours")
            words = _past_container(words)
        elif program == "torchrun":
            return _of_torchrun(words[1:], found)
        elif program == "accelerate" and words[1:2] == ["launch"]:
            found.notes.append(
                "accelerate launch: its options are not carried over; the script finds RANK and WORLD_SIZE set"
            )
            found.certain, found.words = TORCHRUN, _past_options(words[2:])
            return found if found.words else None
        elif _PYTHON.search(words[0]):
            rest = words[1:]
            while rest and rest[0] in {"-u", "-B", "-O", "-E", "-s"}:
                rest = rest[1:]
            if rest[:1] == ["-m"] and rest[1:2] in (["torch.distributed.run"], ["torch.distributed.launch"]):
                return _of_torchrun(rest[2:], found)
            is_module = rest[:1] == ["-m"] and len(rest) > 1 and rest[1].split(".")[0] not in _TOOLS
            if not rest or (rest[0].startswith("-") and not is_module):
                return None
            if found.certain == SRUN:
                found.notes.append(
                    "srun started one process a task: the script must take its rank from RANK, WORLD_SIZE, LOCAL_RANK"
                )
            found.words = rest
            return found
        else:
            return None
    return None


def _of_torchrun(words: list[str], found: Launch) -> Launch | None:
    given = flags.torchrun(words)
    found.certain, found.torchrun = TORCHRUN, given.values
    found.words = ["-m", *given.rest] if "module" in given.values else given.rest
    return found if given.rest else None


def _past_options(words: list[str]) -> list[str]:
    """Without the options in front; those with a value are written with `=` or followed by no script."""
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += 1 if "=" in words[at] or (at + 1 < len(words) and words[at + 1].startswith("-")) else 2
        if at - 1 < len(words) and words[at - 1].endswith(".py"):
            at -= 1
    return words[at:]


def _past_container(words: list[str]) -> list[str]:
    """The command inside: what follows the image."""
    for at, word in enumerate(words):
        if at and (word.endswith((".sif", ".img", ".sqsh")) or word.startswith("docker://")):
            return words[at + 1 :]
    return []


def words_of(text: str) -> list[str]:
    try:
        return shell.words(text)
    except ValueError:
        return []
