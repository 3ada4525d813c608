"""Where documents come from: files as pieces of work of about one size, and the documents in each.

`list_files` expands what a person names; `pieces` cuts the files, the same way on every machine and for any
number of workers: small text files together, JSON lines by byte ranges, Parquet by row groups. `documents`
reads one piece. A bad document is a `BadDocument` in the stream; what to do about it is the caller's choice.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from raylaunch.data import paths, storage
from raylaunch.data.storage import File
from raylaunch.errors import DataError, first_line

Format = Literal["text", "jsonl", "parquet", "sft", "table"]
_SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}


@dataclass(frozen=True)
class Piece:
    """A part of the input: whole `files`, or [start, stop) of one: bytes of JSON lines, row groups of Parquet."""

    format: Format
    files: tuple[str, ...]
    start: int
    stop: int
    bytes: int

    @property
    def source(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}" + (f" [{self.start}, {self.stop})" if self.start or self.stop else "")


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used, and where it stands."""

    where: str
    why: str


Document = bytes | str | list[dict[str, str]]
"""Raw text, text, or the messages of a conversation ({"role", "content"})."""


def list_files(entries: list[str]) -> list[File]:
    """The files that the entries name (files, directories, globs, URLs): entry by entry, sorted within each, no file
    twice."""
    found: dict[File, None] = {}
    for entry in entries:
        try:
            is_url = storage.is_url(entry)
            matches = storage.listed(entry) if is_url else [File.of(path) for path in paths.matching(entry)]
        except OSError as error:
            raise DataError(
                f"input: cannot read {error.filename}: {error.strerror or error}",
                "Make it readable for you, or leave it out.",
            ) from error
        if not matches:
            raise DataError(f"input: nothing matches {paths.sought(entry)}", "Give files, directories or globs.")
        found.update(dict.fromkeys(matches))
    return list(found)


def pieces(inputs: list[File], format_: Format | None, size: int) -> list[Piece]:
    """The input in pieces of about `size` bytes, in order. `format_`: of all files; None: by their names."""
    out: list[Piece] = []
    texts: list[tuple[str, int]] = []

    def flush() -> None:
        if texts:
            out.append(Piece("text", tuple(name for name, _ in texts), 0, 0, sum(n for _, n in texts)))
            texts.clear()

    for file in inputs:
        path, length = Path(file.name.partition("?")[0]), file.size
        kind = format_ or _guess(path)
        if kind == "text":
            texts.append((file.name, length))
            if sum(n for _, n in texts) >= size:
                flush()
            continue
        flush()
        if kind in {"parquet", "table"}:
            out += _row_groups(file.name, kind, size)
        elif path.suffix in _COMPRESSED:  # cannot be entered in the middle
            out.append(Piece(kind, (file.name,), 0, 0, length))
        else:
            cuts = [*range(0, max(1, length), size), length]
            out += [Piece(kind, (file.name,), a, b, b - a) for a, b in itertools.pairwise(cuts)]
    flush()
    return out


def _guess(path: Path) -> Format:
    suffix = path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix
    return _SUFFIXES.get(suffix, "text")


def _row_groups(name: str, kind: Format, size: int) -> list[Piece]:
    try:
        metadata = pq.ParquetFile(storage.opened(name)).metadata
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{name} is not a Parquet file: {first_line(error)}", "Set --format, or omit it to detect the format."
        ) from error
    out, start, filled = [], 0, 0
    for index in range(metadata.num_row_groups):
        filled += metadata.row_group(index).total_byte_size
        if filled >= size or index == metadata.num_row_groups - 1:
            out.append(Piece(kind, (name,), start, index + 1, filled))
            start, filled = index + 1, 0
    return out


def documents(piece: Piece, column: str) -> Iterator[Document | BadDocument]:
    """The documents of a piece; empty ones are left out. `column`: of the text, in JSON lines and Parquet."""
    try:
        match piece.format:
            case "text":
                for name in piece.files:
                    if text := _open(name).read():
                        yield text
            case "parquet":
                yield from _parquet(piece, column)
            case "jsonl" | "sft":
                yield from _json_lines(piece, column)
            case "table":
                raise AssertionError("its rows are no documents")
    except (OSError, pa.ArrowInvalid, EOFError) as error:
        raise _unreadable(piece, error) from error


def rows(piece: Piece) -> pa.Table:
    """The rows of a piece of a table."""
    try:
        groups = list(range(piece.start, piece.stop))
        return pq.ParquetFile(storage.opened(piece.files[0])).read_row_groups(groups)
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(piece, error) from error


def _unreadable(piece: Piece, error: Exception) -> DataError:
    return DataError(f"cannot read {piece.files[0]}: {first_line(error)}", "Is that file whole?")


def _open(name: str) -> Any:
    raw = storage.opened(name)
    kind = _COMPRESSED.get(Path(name.partition("?")[0]).suffix)
    return pa.CompressedInputStream(raw, kind) if kind else raw


def _parquet(piece: Piece, column: str) -> Iterator[Document | BadDocument]:
    name = piece.files[0]
    file = pq.ParquetFile(storage.opened(name))
    if column not in file.schema_arrow.names:
        raise _no_column(name, column, file.schema_arrow.names)
    row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
    groups = list(range(piece.start, piece.stop))
    for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[column]):
        for value in batch.column(0).to_pylist():
            row += 1
            if value is not None and not isinstance(value, str | bytes):
                yield BadDocument(f"{name}: row {row}", f"column {column} holds no text")
            elif value:
                yield value


def _json_lines(piece: Piece, column: str) -> Iterator[Document | BadDocument]:
    name, at = piece.files[0], piece.start
    source = io.BufferedReader(_open(name), 1 << 20)
    if at:
        source.seek(at - 1)
        at += len(source.readline()) - 1  # the line that began before is the last piece's
    while (piece.stop == 0 or at < piece.stop) and (line := source.readline()):
        where, at = f"{name}: byte {at}", at + len(line)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            yield BadDocument(where, f"no JSON: {error}")
            continue
        yield from _document(record, piece.format, column, where)


def _document(record: Any, format_: Format, column: str, where: str) -> Iterator[Document | BadDocument]:
    if not isinstance(record, dict):
        yield BadDocument(where, "no JSON object")
        return
    if format_ == "jsonl":
        text = record.get(column)
        if not isinstance(text, str):
            known = ", ".join(map(str, list(record)[:8]))
            yield BadDocument(where, f"no text in {column!r} (there are: {known})")
        elif text:
            yield text
        return
    messages = record.get("messages")
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
    if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
        yield BadDocument(where, 'neither "messages" of {"role", "content"} nor "prompt" and "completion"')
    elif not any(m["role"] == "assistant" for m in messages):
        yield BadDocument(where, "no answer in it (role assistant)")
    else:
        yield [{"role": m["role"], "content": m["content"]} for m in messages]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _no_column(name: str, column: str, columns: list[str]) -> DataError:
    return DataError(f"{name} has no column {column!r}; it has: {', '.join(columns)}", "Name the text's one: --column.")
