"""Messages between the command line and the node checks: files in a temporary directory of the state directory.

    DIR/  config.yaml canary   by the command line, before the job
          N.hello.json         by node N: its name, address and facts
          roster.json          by the command line: all nodes that wrote N.hello.json
          N.checked.json       by node N: which peers it reached, its clock against the first node's, its GPUs
          schedule.json        by the command line: the rounds of pairs
          N.pairs.json         by node N: results of its pairs

Each is written once, atomically. Readers open the file itself, because a listing of a shared directory may be stale.
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
"""Maximum number of rounds, and so of partners of a node."""
ROUND_LIMIT = 30.0
"""Seconds for one round of pairs."""
GPU_LIMIT = 120.0
"""Seconds for importing torch (on a thousand nodes, from one file system) and for the GPU test."""
HELLO_LIMIT = 120.0
ORDERS_LIMIT = 240.0
"""Seconds that a node waits for the command line, which may have been killed."""
POLL = 0.1
Model = TypeVar("Model", bound=BaseModel)


class Hello(BaseModel):
    """A node at the start of its checks."""

    index: int
    node: str
    address: str
    interface: str
    port: int
    """Port of its clock server."""
    store: int
    """Port of the store for its pairs."""
    time: float
    facts: MachineFacts
    cpus: int
    memory: int
    object_store: int
    gpus: tuple[str, ...]
    submit: str | None = None
    """Why jobs cannot be submitted from this node; "" if they can, None if not tested."""
    error: str = ""
    """Why this node cannot continue."""


class Peer(BaseModel):
    """The address of a node, for its peers."""

    index: int
    node: str
    address: str
    port: int
    store: int


class PeerList(BaseModel):
    """The participating nodes, by index."""

    nodes: tuple[Peer, ...]


class Reached(BaseModel):
    """A connection to a peer: round trip and clock offset in seconds, or the error."""

    seconds: float = 0.0
    ahead: float = 0.0
    error: str = ""


class GpuCheck(BaseModel):
    """Test result of one GPU. `error`: why it failed."""

    local: int
    name: str = ""
    memory: int = 0
    taken: int = 0
    """Bytes in use before the test."""
    flops: float = 0.0
    error: str = ""


class Checked(BaseModel):
    """Results of a node before the pairs. `torch`: why torch cannot be used."""

    index: int
    time: float
    """When it had read the roster, on its clock."""
    reached: dict[int, Reached]
    gpus: tuple[GpuCheck, ...] = ()
    smi: Smi = Smi()
    torch: str = ""


class Schedule(BaseModel):
    """The rounds of pairs, by index; `locals`: participating processes (GPUs) per node."""

    nodes: tuple[Peer, ...]
    rounds: tuple[tuple[tuple[int, int], ...], ...]
    backend: str
    locals: int


class PairResult(BaseModel):
    """The result of a pair, from one of its nodes."""

    a: int
    b: int
    rate: float | None = None
    """Bus bandwidth of an all-reduce, bytes/s."""
    error: str = ""


class Pairs(BaseModel):
    """Results of a node at the end."""

    index: int
    results: tuple[PairResult, ...] = ()
    error: str = ""


def file(directory: Path, index: int, what: str) -> Path:
    """Where node `index` writes its `hello`, `checked` or `pairs`."""
    return directory / f"{index}.{what}.json"


def write(path: Path, value: BaseModel) -> None:
    files.write_text(path, value.model_dump_json())


def read(path: Path, model: type[Model]) -> Model | None:
    """The file's content; None if it does not exist (yet) or is invalid."""
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, ValueError):
        return None


def wait(path: Path, model: type[Model], limit: float) -> Model:
    """Wait for a file and return its content; StateError after `limit` seconds."""
    deadline, pause = time.monotonic() + limit, POLL / 2
    while (value := read(path, model)) is None:
        if time.monotonic() > deadline:
            raise StateError(f"{path.name} did not appear within {limit:g} s")
        time.sleep(pause * random.uniform(0.7, 1.3))  # a thousand nodes should not ask in step
        pause = min(0.5, pause * 1.2)
    return value


def collect(
    paths: Mapping[int, Path],
    model: type[Model],
    heard: Callable[[Model], object],
    enough: Callable[[dict[int, Model]], bool],
) -> dict[int, Model]:
    """Read the files until all exist or `enough` (called after each round) returns true; `heard` is called for each."""
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
