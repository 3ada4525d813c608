"""Log files as lines with their file, number, rank and host; bounded, whatever the file contains.

Of a long file the beginning and the end are read: the setup, and the failure. Binary data and colours are removed; of a
progress bar (which overwrites its line) the last state remains.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES, TAIL_BYTES = 1 << 18, 1 << 22
LONGEST = 2000
"""Characters of a line that are examined."""

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|[\x00-\x08\x0b\x0c\x0e-\x1f]")
_RANK = re.compile(
    r"^\s*(?:[A-Za-z][\w.-]*: (?=\[))?(?:\[rank(?P<a>\d+)\]:?|\[(?:default)?(?P<b>\d+)\]:|(?P<c>\d+): |\[[\w.-]+:(?P<d>\d+)\]:?"
    r"|\(RayTrainWorker[^)]*?rank=(?P<e>\d+)[^)]*\))"
)
_SAID_RANK = re.compile(r"\b[Rr]ank[ =:]*(\d+)\b|\[[Rr]ank (\d+)\]|\[PG [^]]*Rank (\d+)\]")
_HOST = re.compile(
    r"[Nn]ode failure on ([\w.-]+)|slurmstepd-([\w.-]+): |slurmstepd: error: .*? ON ([\w.-]+) CANCELLED"
    r"|srun: error: ([A-Za-z][\w.-]*): task|\bhost[ =:]+([A-Za-z][\w.-]*)|\bip=([\d.]+)|\bnode=([A-Za-z][\w.-]*)"
    r"|[Oo]n node ([A-Za-z][\w.-]*)"
)


@dataclass(frozen=True)
class Line:
    """One line. `rank` and `host`: its origin, if the line or its file states it."""

    file: str
    number: int
    text: str
    rank: int | None = None
    host: str | None = None


def lines(path: Path, rank: int | None = None, host: str | None = None) -> Iterator[Line]:
    """The lines of the file. OSError if it cannot be read."""
    size = path.stat().st_size
    with path.open("rb") as source:
        if size <= HEAD_BYTES + TAIL_BYTES:
            yield from _cut(path, source.read(), 1, rank, host)
            return
        begin = source.read(HEAD_BYTES)
        yield from _cut(path, begin[: begin.rfind(b"\n") + 1], 1, rank, host)
        left = size - TAIL_BYTES
        number = 1 + begin.count(b"\n")
        source.seek(HEAD_BYTES)
        while (at := source.tell()) < left and (block := source.read(min(1 << 20, left - at))):
            number += block.count(b"\n")
        tail = source.read()
        cut = tail.find(b"\n") + 1
        yield from _cut(path, tail[cut:], number + 1, rank, host)


def _cut(path: Path, data: bytes, number: int, rank: int | None, host: str | None) -> Iterator[Line]:
    for offset, raw in enumerate(data.split(b"\n")):
        last = raw.rstrip(b"\r").rpartition(b"\r")[2]  # what a progress bar showed in the end
        text = _ESCAPES.sub("", last[: 4 * LONGEST].decode(errors="replace"))[:LONGEST].rstrip()
        if text:
            yield Line(os.fspath(path), number + offset, text, _rank_of(text, rank), _host_of(text) or host)


def _rank_of(text: str, default: int | None) -> int | None:
    """From the prefix of the line, else from the file, else from the text of the line."""
    rank = None
    while (found := _RANK.match(text)) is not None:  # torchrun's and srun's before the program's own, which knows best
        rank, text = int(next(group for group in found.groups() if group is not None)), text[found.end() :]
    if rank is not None:
        return rank
    if default is not None:
        return default
    said = _SAID_RANK.search(text)
    return None if said is None else int(next(group for group in said.groups() if group is not None))


def _host_of(text: str) -> str | None:
    found = _HOST.search(text)
    return None if found is None else next(group for group in found.groups() if group is not None)


def body(text: str) -> str:
    """The line without its rank prefixes, with its indentation."""
    while (found := _RANK.match(text)) is not None:
        text = text[found.end() :]
    return text


def unprefixed(text: str) -> str:
    """The line without its rank prefixes and indentation."""
    rest = body(text)
    return rest if rest == text else rest.lstrip(" ")
