"""Requests: what the command line, a driver or a batch script asks of the head, as files. Each kind is a class.

    requests/NAME.json            asked: written beside and renamed, so it is whole
    requests/NAME.taken-00000007  taken by the head of incarnation 7; renamed, so one head has it
    (gone)                        what it asks for is done, or is in duties.json
    requests/NAME.bad             nobody understands it: for people

A head takes a request, does what it says, writes duties.json with the request's name in `taken`, looks whether it
was replaced meanwhile, and only then deletes the file. Whatever happens between two of these steps:

- It dies before duties.json is written: the next head finds a file of a lower incarnation, takes it and does it.
- It dies after that: the next head finds the file, and its name in duties.json: it deletes the file, no more.
- It is replaced before it deletes: it leaves the file. Its successor claimed first and read duties.json then; so
  either that has the request's name, or the successor does what it asks for.
- It is replaced before it takes, and does not know: it takes what its successor takes from it again. It may do once
  more what it is asked for, but it remembers nothing (duties.json is not written by a fenced head) and ends.
- A file cannot be read (the storage hiccups): it stays, and is tried again. What is no request becomes NAME.bad: a
  file that is not JSON or too large, a pipe, a link. No file keeps the others from being taken.

Names begin with the time, and requests are done in the order of their names. The batch script's (walltime.json) has a
fixed name: while one of it is taken, another waits; and a head forgets what it finds in `taken` when no file of it is
left (`unfinished`), or the next one of that name would be deleted unheard.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from raylaunch.checkpoint import fence
from raylaunch.config.schema.base import check_name
from raylaunch.errors import first_problem
from raylaunch.state import files, records
from raylaunch.timing import SAVE_LIMIT

log = logging.getLogger("raylaunch.requests")

SIZE_LIMIT = 1 << 16
_TAKEN = re.compile(r"\.taken-([0-9]+)")


Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class _Ask(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class RunAsk(_Ask):
    """`train`: queue this run."""

    kind: Literal["run"] = "run"
    run: Annotated[str, AfterValidator(check_name)]


class ScaleAsk(_Ask):
    """`scale`: keep this many nodes."""

    kind: Literal["scale"] = "scale"
    nodes: int = Field(ge=0, le=1_000_000)


class DownAsk(_Ask):
    """`down`: end the cluster."""

    kind: Literal["down"] = "down"
    save_limit: Seconds = SAVE_LIMIT
    """In which the run has to save."""


class StrikeAsk(_Ask):
    """A driver: this node broke an attempt."""

    kind: Literal["strike"] = "strike"
    node: str
    reason: str


class DrainAsk(_Ask):
    """`watch`: the run must leave this node, which ends then."""

    kind: Literal["drain"] = "drain"
    node: str
    reason: str


class DrainedAsk(_Ask):
    """A driver: no attempt uses this node any more."""

    kind: Literal["drained"] = "drained"
    node: str


class WalltimeAsk(_Ask):
    """The base job's script: Slurm announced the end of the time, or preemption."""

    kind: Literal["walltime"] = "walltime"
    allocation: str | None = Field(None, validation_alias=AliasChoices("allocation", "life"))
    """Which one (see `records.Head`). Scripts of an earlier version call it `life`."""


class NoticeAsk(_Ask):
    """A joiner's script: the same for its job."""

    kind: Literal["notice"] = "notice"
    job: str


Ask = RunAsk | ScaleAsk | DownAsk | StrikeAsk | DrainAsk | DrainedAsk | WalltimeAsk | NoticeAsk
_ASK: TypeAdapter[Ask] = TypeAdapter(Annotated[Ask, Field(discriminator="kind")])


def ask(cluster: Path, what: Ask) -> Path:
    """Ask something of the cluster's head; the file, which is renamed when a head takes it. Raises StateError."""
    name = f"{time.time():.6f}-{what.kind}-{uuid.uuid4().hex[:6]}.json"
    path = cluster / records.REQUESTS / name
    files.write_json(path, what.model_dump())
    return path


@dataclass(frozen=True)
class Request:
    """One that a head has taken. `values` may be anything: see `what`."""

    name: str
    values: dict[str, Any]
    path: Path

    @property
    def what(self) -> Ask:
        """What it asks for; ValueError for what no head understands."""
        try:
            return _ASK.validate_python(self.values)
        except ValidationError as error:
            raise ValueError(first_problem(error)) from error

    def done(self) -> None:
        """What it asks for is remembered."""
        self.path.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """It asks for nothing that there is."""
        _set_aside(self.path, self.name)


def take(cluster: Path, incarnation: int, known: Collection[str] = ()) -> list[Request]:
    """Take what lies there, also what an older head took and did not finish; the oldest first. `known`: the names of
    those that this head has taken already and keeps. Nothing, where this head was replaced."""
    if records.is_fenced(cluster, incarnation):
        return []
    found, names = [], set(known)
    for name, path in _lying(cluster, incarnation):
        if name not in names and (request := _take(name, path, incarnation)) is not None:
            found.append(request)
        names.add(name)
    return found


def unfinished(cluster: Path, incarnation: int, names: Iterable[str]) -> list[str]:
    """Those of these names that heads up to this one took, and whose files are left. Each file is looked for, since a
    listing on NFS may hide it, and a request that is forgotten here is done again."""
    folder, numbers = cluster / records.REQUESTS, range(incarnation, 0, -1)
    return [name for name in names if any(fence.is_there(folder / _taken_name(name, n)) for n in numbers)]


def _lying(cluster: Path, incarnation: int) -> list[tuple[str, Path]]:
    """What was asked, and what heads up to this one took: (name, file), by name, the taken ones first."""
    found = []
    for path in records.listed(cluster / records.REQUESTS):
        taken = _TAKEN.fullmatch(path.suffix)
        if path.name.startswith("."):
            continue
        if path.suffix == ".json" or (taken is not None and int(taken[1]) <= incarnation):
            found.append((path.stem, taken is None, path))
    return [(name, path) for name, _, path in sorted(found)]


def _taken_name(name: str, incarnation: int) -> str:
    return f"{name}.taken-{incarnation:08d}"


def _take(name: str, path: Path, incarnation: int) -> Request | None:
    mine = path.with_name(_taken_name(name, incarnation))
    try:
        if path != mine:
            path.rename(mine)
        values = json.loads(_read(mine))
        if "kind" not in values:
            raise ValueError("it has no kind")
        return Request(name, values, mine)
    except FileNotFoundError:  # another head was quicker, or the listing is old
        return None
    except OSError as error:
        _say_once("a request cannot be read, and is tried again", mine, str(error))
        return None
    except (ValueError, TypeError, RecursionError) as error:
        _say_once("not a request", mine, str(error))
        _set_aside(mine, name)
        return None


def _read(path: Path) -> bytes:
    """Of a plain file of a request's size; ValueError for anything else. It waits for nobody, as a pipe would."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("not a regular file")
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as source:
        text = source.read(SIZE_LIMIT + 1)
    if len(text) > SIZE_LIMIT:
        raise ValueError(f"it is larger than {SIZE_LIMIT} bytes")
    return text


def _set_aside(path: Path, name: str) -> None:
    try:
        path.rename(path.with_name(f"{name}.bad"))
    except OSError as error:
        _say_once("a request could not be set aside", path, str(error))


@functools.lru_cache(256)
def _say_once(what: str, path: Path, error: str) -> None:
    """Requests are looked for three times a second."""
    log.error("%s path=%s error=%r", what, path, error)
