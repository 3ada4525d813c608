"""A prepared dataset: documents as tokens, in Arrow files that training reads memory-mapped.

    DIR/manifest.json            what the dataset is; the last file written: with it, the dataset is there
    DIR/shard-00000.arrow        column `tokens` (and `loss` in sft), in record batches of BATCH_TOKENS but the last
    DIR/shard-00000.ends.arrow   column `end`: where each document ends, in tokens from the shard's beginning
    DIR/shard-00000.json         the shard's counts and checksums; the last of its three files
    DIR/plan.json                what is made from what (`prepare`)

Each document ends with the separator. Files are written beside, fsynced and renamed; a reader sees a whole
dataset or none.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raylaunch.data import storage
from raylaunch.errors import DataError, StateError
from raylaunch.state import files

VERSION = 1
BATCH_TOKENS = 1 << 22
"""Tokens a record batch: 8 or 16 MiB of them, the memory that a writer needs."""
MANIFEST, PLAN = "manifest.json", "plan.json"
TOKENS, LOSS, END = "tokens", "loss", "end"

Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Shard:
    """One shard. `source`: where its documents came from; `sha256` and `size` (bytes) by file name."""

    name: str
    source: str
    tokens: int
    documents: int
    answered: int
    """Tokens that the loss counts; all of them but in sft."""
    skipped: int
    """Bad documents that were left out."""
    size: dict[str, int]
    sha256: dict[str, str]
    offsets: dict[str, list[int]] = field(default_factory=dict)
    """By column: where in the file the values of each record batch begin, for reading without mapping."""


@dataclass(frozen=True)
class Manifest:
    """A dataset. `tokenizer`: its name, vocab_size, separator and sha256."""

    format: str
    dtype: str
    tokenizer: dict[str, Any]
    shards: tuple[Shard, ...]
    version: int = VERSION

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def skipped(self) -> int:
        return sum(shard.skipped for shard in self.shards)

    @property
    def digest(self) -> int:
        """48 bits that change with the tokens."""
        digests = "".join(shard.sha256[f"{shard.name}.arrow"] for shard in self.shards)
        return int(hashlib.sha256(digests.encode()).hexdigest()[:12], 16)

    def write(self, directory: Path) -> None:
        record = asdict(self) | {"tokens": self.tokens, "documents": self.documents, "skipped": self.skipped}
        files.write_json(directory / MANIFEST, record)


def read(directory: Path | str) -> Manifest:
    """The dataset there; DataError when there is none, or a file of it is missing or has another size. (Files at a
    URL are not looked at one by one.)"""
    hint = "Create it with `raylaunch data prepare`. An interrupted preparation resumes with the same command."
    is_here = not storage.is_url(str(directory))
    try:
        record = files.read_json(Path(directory) / MANIFEST) if is_here else _fetched(str(directory))
    except StateError as error:
        raise DataError(error.message, error.hint) from error
    if record is None:
        raise DataError(f"{directory} holds no prepared dataset (no {MANIFEST})", hint)
    if record.get("version") != VERSION:
        raise DataError(
            f"{directory} is a dataset of version {record.get('version')}, this raylaunch reads {VERSION}",
            "Prepare it again.",
        )
    shards = tuple(Shard(**shard) for shard in record["shards"])
    for shard in shards if is_here else ():
        for name, size in shard.size.items():
            path = Path(directory) / name
            found = path.stat().st_size if path.exists() else None
            if found != size:
                what = "missing" if found is None else f"{found} bytes instead of {size}"
                raise DataError(
                    f"{path} is {what}", f"Remove {storage.join(directory, MANIFEST)} and {shard.name}.*, then prepare."
                )
    return Manifest(record["format"], record["dtype"], record["tokenizer"], shards)


def _fetched(url: str) -> Any:
    """The manifest's record; None when there is none."""
    try:
        return json.loads(storage.read(storage.join(url, MANIFEST)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {url}: {error}", "Is the address right, and may you read it?") from error


def verify(directory: Path, manifest: Manifest) -> list[str]:
    """The files whose content is not what was written, by their checksums."""

    def sha256(name: str) -> str:
        with (directory / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return [name for shard in manifest.shards for name, digest in shard.sha256.items() if sha256(name) != digest]


class Row:
    """One column of several Arrow files as one row, memory-mapped and opened when it is needed.

    `parts`: (name, tokens) of each, in record batches of BATCH_TOKENS but the last. `far`: a read takes long, and
    several at a time take no longer."""

    far = False

    def __init__(self, parts: Sequence[tuple[Path | str, int]], column: str = TOKENS) -> None:
        self._names, self._column = [str(name) for name, _ in parts], column
        self._starts = [0, *itertools.accumulate(count for _, count in parts)]
        self.count = self._starts[-1]
        self._files: dict[int, pa.ipc.RecordBatchFileReader] = {}
        self._batches: dict[tuple[int, int], npt.NDArray[Any]] = {}

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """`length` tokens from `start`: a view of a mapped file, or a copy across batches or files."""
        pieces = []
        while length:
            file = bisect.bisect_right(self._starts, start) - 1
            batch, offset = divmod(start - self._starts[file], BATCH_TOKENS)
            assert file < len(self._names), "the window leaves the row"
            length_here = min(length, BATCH_TOKENS - offset, self._starts[file + 1] - start)
            piece = self._piece(file, batch, offset, length_here)
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _piece(self, file: int, batch: int, offset: int, length: int) -> npt.NDArray[Any]:
        return self._batch(file, batch)[offset : offset + length]

    def _batch(self, file: int, batch: int) -> npt.NDArray[Any]:
        if (file, batch) not in self._batches:
            if file not in self._files:
                self._files[file] = mapped(self._names[file])
                count = self._starts[file + 1] - self._starts[file]
                assert self._files[file].num_record_batches == -(-count // BATCH_TOKENS)
            column = self._files[file].get_batch(batch).column(self._column)
            self._batches[file, batch] = column.to_numpy(zero_copy_only=True)
        return self._batches[file, batch]


class FarRow(Row):
    """The same of files at URLs: each read asks for the bytes of its window, and nothing is kept. `offsets`: of each
    file, where its record batches' values begin."""

    far = True

    def __init__(self, parts: Sequence[tuple[Path | str, int]], column: str, offsets: Sequence[list[int]]) -> None:
        super().__init__(parts, column)
        self._offsets = offsets
        self._opened: dict[int, tuple[storage.Ranges, np.dtype[Any]]] = {}

    def _piece(self, file: int, batch: int, offset: int, length: int) -> npt.NDArray[Any]:
        try:
            if file not in self._opened:
                kind = pa.ipc.open_file(storage.opened(self._names[file])).schema.field(self._column).type
                self._opened[file] = storage.Ranges(self._names[file]), np.dtype(kind.to_pandas_dtype())
            ranges, dtype = self._opened[file]
            at = self._offsets[file][batch] + offset * dtype.itemsize
            return np.frombuffer(ranges.read(length * dtype.itemsize, at), dtype)
        except OSError as error:
            raise DataError(f"cannot read {self._names[file]}: {error}") from error


def row(directory: Path | str, shards: Sequence[Shard], column: str = TOKENS) -> Row:
    """The tokens (or another column) of these shards, one after the other."""
    parts = [(storage.join(directory, f"{shard.name}.arrow"), shard.tokens) for shard in shards]
    if not storage.is_url(str(directory)):
        return Row(parts, column)
    if not all(column in shard.offsets for shard in shards):
        raise DataError(f"{directory} was prepared by an older raylaunch", "Prepare it again to read it from there.")
    return FarRow(parts, column, [shard.offsets[column] for shard in shards])


def mapped(path: Path | str) -> pa.ipc.RecordBatchFileReader:
    """An Arrow file, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path)))


def document(directory: Path, shard: Shard, index: int) -> tuple[int, int]:
    """Where document `index` of a shard begins and ends, its separator included."""
    ends = mapped(directory / f"{shard.name}.ends.arrow").get_batch(0).column(END)
    return (ends[index - 1].as_py() if index else 0), ends[index].as_py()


class ShardWriter:
    """Writes one shard; `close` makes it count. Memory: one record batch, and 8 bytes a document."""

    def __init__(self, directory: Path, name: str, dtype: npt.DTypeLike, columns: tuple[str, ...]) -> None:
        self._directory, self._name, self._columns = directory, name, columns
        self._schema = pa.schema(
            [(TOKENS, pa.from_numpy_dtype(np.dtype(dtype))), *((LOSS, pa.uint8()) for _ in columns[1:])]
        )
        self._buffers = [np.empty(BATCH_TOKENS, dtype), *(np.empty(BATCH_TOKENS, np.uint8) for _ in columns[1:])]
        self._filled = self._tokens = self._answered = 0
        self._ends: list[int] = []
        self._sink = HashingFile(self._temporary(".arrow"))
        self._out = pa.ipc.new_file(self._sink, self._schema)

    def add(self, tokens: Tokens, loss: npt.NDArray[np.uint8] | None = None) -> None:
        """One document, its separator included. `loss`: 1 for each token that the loss counts."""
        parts = [tokens, loss] if len(self._columns) == 2 else [tokens]
        at = 0
        while at < len(tokens):
            room = min(len(tokens) - at, BATCH_TOKENS - self._filled)
            for buffer, part in zip(self._buffers, parts, strict=True):
                assert part is not None
                buffer[self._filled : self._filled + room] = part[at : at + room]
            self._filled, at = self._filled + room, at + room
            if self._filled == BATCH_TOKENS:
                self._flush()
        self._tokens += len(tokens)
        self._answered += int(loss.sum()) if loss is not None else len(tokens)
        self._ends.append(self._tokens)

    def close(self, source: str, skipped: int) -> Shard:
        """Finish the shard's files; its record."""
        self._flush()
        self._out.close()
        self._sink.finish()
        ends = HashingFile(self._temporary(".ends.arrow"))
        batch = pa.record_batch([pa.array(self._ends, pa.int64())], names=[END])
        with pa.ipc.new_file(ends, batch.schema) as out:
            out.write_batch(batch)
        ends.finish()
        sinks = {f"{self._name}.arrow": self._sink, f"{self._name}.ends.arrow": ends}
        shard = Shard(
            self._name, source, self._tokens, len(self._ends), self._answered, skipped,
            {name: sink.size for name, sink in sinks.items()}, {name: sink.sha256 for name, sink in sinks.items()},
            self._offsets(),
        )  # fmt: skip
        for suffix in (".arrow", ".ends.arrow"):
            self._temporary(suffix).replace(self._directory / f"{self._name}{suffix}")
        return shard

    def _offsets(self) -> dict[str, list[int]]:
        """Where the columns' values lie in the file that is written."""
        mapped = pa.memory_map(str(self._temporary(".arrow")))
        base = mapped.read_buffer(1).address
        file = pa.ipc.open_file(mapped)
        batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        return {name: [b.column(name).buffers()[1].address - base for b in batches] for name in self._columns}

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._sink.close()
        for suffix in (".arrow", ".ends.arrow"):
            self._temporary(suffix).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> Path:
        return self._directory / f".{self._name}{suffix}.tmp"

    def _flush(self) -> None:
        if self._filled:
            arrays = [pa.array(buffer[: self._filled]) for buffer in self._buffers]
            self._out.write_batch(pa.record_batch(arrays, schema=self._schema))
            self._filled = 0


class HashingFile:
    """A file that knows its size and sha256 when it is finished. (Arrow writes it from front to back.)"""

    closed = False

    def __init__(self, path: Path) -> None:
        self._out: IO[bytes] = path.open("wb")
        self._digest, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._digest.update(view)
        self.size += view.nbytes
        return self._out.write(view)

    def flush(self) -> None:
        self._out.flush()

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        self._out.close()

    def finish(self) -> None:
        """Durable on disk."""
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
