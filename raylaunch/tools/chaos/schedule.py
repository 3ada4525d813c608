"""Which faults there are, and the order in which a seed brings them. Pure: same seed, same sequence."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raylaunch.errors import UsageError


@dataclass(frozen=True)
class FaultKind:
    """A kind of fault."""

    text: str
    needs_root: bool = True
    """Only on a sandbox, by root; the others reach a cluster of one's own, too."""
    restarts: bool = True
    """The run needs a new attempt for it; else it should not notice."""
    takes_node: bool = False
    """A node is away for a while: at least the minimum must be left."""
    lasts: bool = False
    """It is undone after a while, whether or not the run has recovered; the others after that."""


KINDS = {
    "worker": FaultKind("SIGKILL to a training worker", needs_root=False),
    "hang": FaultKind("SIGSTOP to a training worker", needs_root=False),
    "raylet": FaultKind("SIGKILL to a node's raylet", needs_root=False),
    "agent": FaultKind("SIGKILL to a node's agent", needs_root=False),
    "driver": FaultKind("SIGKILL to the run's driver", needs_root=False),
    "gcs": FaultKind("SIGKILL to Ray's GCS, on the head", needs_root=False),
    "dashboard": FaultKind("SIGKILL to Ray's dashboard", needs_root=False, restarts=False),
    "node": FaultKind("all of a node's processes die; it boots again later", takes_node=True),
    "head": FaultKind("the head's node dies; it boots again later", takes_node=True),
    "freeze": FaultKind("all of a node's processes stand still, and go on later", takes_node=True, lasts=True),
    "cut": FaultKind("a node is cut off the network, and comes back later", takes_node=True, lasts=True),
    "drain": FaultKind("Slurm's administrator drains a node, and gives it back later", takes_node=True),
    "slurmd": FaultKind("a node's slurmd dies; it starts again later", restarts=False, lasts=True),
    "slurmctld": FaultKind("Slurm's controller is away for a while", restarts=False, lasts=True),
}


@dataclass(frozen=True)
class Planned:
    """One fault to come."""

    seq: int
    """From 1."""
    kind: str
    pick: float
    """In [0, 1): which of those that it may hit."""
    coin: bool
    """For kinds that come in two forms (a node that dies with or without a word)."""
    pause: float
    """Factor on the time between two faults, around 1: no fault keeps step with the checkpoints."""


def plan(kinds: Sequence[str], seed: int) -> Iterator[Planned]:
    """Faults without end. Each round has every kind once, in an order of its own."""
    source = random.Random(seed)
    seq = 0
    while True:
        for kind in source.sample(list(kinds), len(kinds)):
            seq += 1
            yield Planned(seq, kind, source.random(), source.random() < 0.5, 0.75 + 0.5 * source.random())


def parse_kinds(text: str) -> list[str]:
    """`node,worker` → kinds; UsageError for an unknown or a doubled one."""
    kinds = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UsageError(
            f"unknown fault {', '.join(unknown)}" if unknown else "no fault is named", f"Available: {', '.join(KINDS)}."
        )
    if len(set(kinds)) < len(kinds):
        raise UsageError(f"a fault is listed twice in {text!r}", "List each once: they are injected in turn.")
    return kinds


_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float:
    """`60s`, `10m`, `1.5h`, `30d`, or plain seconds; UsageError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|min|m|h|d|)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{text!r} is not a duration", "Write it as 60s, 10m, 1.5h or 30d.")
    return float(match[1]) * _UNITS[match[2]]
