"""What the command line and the node checks tell each other: files in one temporary directory of the state directory.

    DIR/  config.yaml canary   by the command line, before the job
          N.hello.json         by node N: who and where it is, its facts
          roster.json          by the command line: all nodes that said hello
          N.checked.json       by node N: which peers it reached, its clock against the first node's, its GPUs
          schedule.json        by the command line: the rounds of pairs
          N.pairs.json         by node N: what its pairs did

Each is written once, atomically. Whoever waits opens the file itself: a listing of a shared directory may be old.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from raylaunch.errors import StateError
from raylaunch.state import files
from raylaunch.tools.doctor.gpu_status import Smi
from raylaunch.tools.doctor.machine_facts import MachineFacts

CANARY, CONFIG, ROSTER, SCHEDULE = "canary", "config.yaml", "roster.json", "schedule.json"
CONNECT_LIMIT = 5.0
PARTNERS = 8
"""Rounds, and so partners that a node is measured with, at most."""
ROUND_LIMIT = 30.0
"""Seconds for one round of pairs."""
GPU_LIMIT = 120.0
"""Seconds for torch's import, on a thousand nodes from one file system, and the GPU's own check."""
HELLO_LIMIT = 120.0
ORDERS_LIMIT = 240.0
"""Seconds that a node waits for the command line, which may have been killed."""
POLL = 0.1
Model = TypeVar("Model", bound=BaseModel)


class Hello(BaseModel):
    """A node, when it begins."""

    index: int
    node: str
    address: str
    interface: str
    port: int
    """Where its clock answers."""
    store: int
    """Where its pairs meet."""
    time: float
    facts: MachineFacts
    cpus: int
    memory: int
    object_store: int
    gpus: tuple[str, ...]
    submit: str | None = None
    """Why jobs cannot be submitted from this node, "" when they can; None where that was not tried."""
    error: str = ""
    """Why this node can go no further."""


class Peer(BaseModel):
    """A node as its peers need it."""

    index: int
    node: str
    address: str
    port: int
    store: int


class PeerList(BaseModel):
    """The nodes that take part, by index."""

    nodes: tuple[Peer, ...]


class Reached(BaseModel):
    """A peer as a node reached it: seconds there and back, and how far its clock is ahead; or why not."""

    seconds: float = 0.0
    ahead: float = 0.0
    error: str = ""


class GpuCheck(BaseModel):
    """What one GPU did. `error`: why it failed."""

    local: int
    name: str = ""
    memory: int = 0
    taken: int = 0
    """Bytes that somebody else had before we came."""
    flops: float = 0.0
    error: str = ""


class Checked(BaseModel):
    """A node, before the pairs. `torch`: why its torch cannot be used."""

    index: int
    time: float
    """When it had read the roster, by its clock."""
    reached: dict[int, Reached]
    gpus: tuple[GpuCheck, ...] = ()
    smi: Smi = Smi()
    torch: str = ""


class Schedule(BaseModel):
    """The rounds of pairs, by index; `locals`: processes (GPUs) of each node that take part."""

    nodes: tuple[Peer, ...]
    rounds: tuple[tuple[tuple[int, int], ...], ...]
    backend: str
    locals: int


class PairResult(BaseModel):
    """What a pair did, as its lower node saw it."""

    a: int
    b: int
    rate: float | None = None
    """Bus bandwidth of an all-reduce, bytes/s."""
    error: str = ""


class Pairs(BaseModel):
    """A node, at the end."""

    index: int
    results: tuple[PairResult, ...] = ()
    error: str = ""


def write(path: Path, value: BaseModel) -> None:
    files.write_text(path, value.model_dump_json())


def read(path: Path, model: type[Model]) -> Model | None:
    """The file's content; None when it is not there (yet), or not what it should be."""
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, ValueError):
        return None


def wait(path: Path, model: type[Model], limit: float) -> Model:
    """The file's content, once it is there; StateError after `limit` seconds."""
    deadline, pause = time.monotonic() + limit, POLL / 2
    while (value := read(path, model)) is None:
        if time.monotonic() > deadline:
            raise StateError(f"no {path.name} within {limit:g} s")
        time.sleep(pause * random.uniform(0.7, 1.3))  # a thousand nodes should not ask in step
        pause = min(0.5, pause * 1.2)
    return value


def collect(
    paths: Mapping[int, Path],
    model: type[Model],
    heard: Callable[[Model], object],
    enough: Callable[[dict[int, Model]], bool],
) -> dict[int, Model]:
    """The files, `heard` of each as it comes, until all are there or `enough` (asked after each look) says so."""
    found: dict[int, Model] = {}
    while True:
        missing = paths.keys() - found.keys()
        for index in missing:
            if (value := read(paths[index], model)) is not None:
                found[index] = value
                heard(value)
        if enough(found) or len(found) == len(paths):
            return found
        time.sleep(POLL + len(missing) / 1000)
