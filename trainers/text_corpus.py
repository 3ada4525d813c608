"""Text files → one memory-mapped Arrow file of tokens, built once per run.

Rank 0 streams the files, in an order that depends on nothing but their names, into
`tokens.arrow.tmp-ATTEMPT` (one uint16 column: a token a byte, SEPARATOR after each document),
renames it into place and then writes `manifest.json`: the marker that the store is finished. The
others wait for the marker by looking for it, with no collective, so that no process-group time-out
can end a long build; they see rank 0's error or its silence. A finished store is reused.
Refused: entries that match nothing, unreadable files, a store that was made from other text.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raylaunch.config.schema import STDLIB
from raylaunch.data import dataset, paths
from raylaunch.errors import RaylaunchError, RunError
from raylaunch.state import files

SEPARATOR = 256
STORE_FILE = "tokens.arrow"
MANIFEST_FILE = "manifest.json"

_READ_BYTES = 1 << 20
_SKIPPED_IN_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_BEAT_SECONDS = 5.0


@dataclass(frozen=True)
class Store:
    """A finished store: where it is and how many tokens it holds."""

    path: Path
    tokens: int


def prepare(directory: Path, text: list[str], *, rank: int, attempt: int, silence: float) -> Store:
    """The run's token store, built by rank 0 if it is not there yet.

    `silence`: seconds without a sign of life from rank 0 after which the others give up.
    """
    if (store := find(directory, text)) is not None:
        return store
    if rank == 0:
        return _build_or_say_why(directory, text, attempt)
    return _wait(directory, text, attempt, silence)


def find(directory: Path, text: list[str]) -> Store | None:
    """The finished store in `directory`, or None; RunError when it is damaged or of other text."""
    manifest = files.read_json(directory / MANIFEST_FILE)
    if manifest is None:
        return None
    path = directory / STORE_FILE
    hint = f"Remove {directory} to build it again (in other words: start a new run)."
    if manifest["text"] != text:
        raise RunError(f"{directory} was built from data.text {manifest['text']}, not {text}", hint)
    size = path.stat().st_size if path.exists() else None
    if size != manifest["size"]:
        raise RunError(f"{path} is damaged: {size} bytes instead of {manifest['size']}", hint)
    return Store(path, manifest["tokens"])


def build(directory: Path, text: list[str], attempt: int, beat: Callable[[], None] = lambda: None) -> Store:
    """Write the store and its manifest; `beat` is called every now and then."""
    texts = list_files(text)
    files.make_dir(directory)
    path, temporary = directory / STORE_FILE, directory / f"{STORE_FILE}.tmp-{attempt}"
    documents: list[dict[str, Any]] = []
    digest, tokens = hashlib.sha256(), 0
    try:
        with temporary.open("wb") as sink:
            schema = pa.schema([(dataset.TOKENS, pa.uint16())])
            with pa.ipc.new_file(sink, schema) as writer:
                for batch in _batches(_chunks(texts, documents, beat)):
                    writer.write_batch(pa.record_batch([pa.array(batch)], schema=schema))
                    digest.update(batch.tobytes())
                    tokens += len(batch)
            sink.flush()
            os.fsync(sink.fileno())
            size = sink.tell()
        if not documents:
            raise RunError(f"every file of data.text {text} is empty", "Give files that contain text.")
        temporary.replace(path)
    except OSError as error:
        raise RunError(
            f"cannot write {temporary}: {error.strerror or error}",
            "The data directory lies in the run directory: check space, quota and permissions there.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    files.write_json(
        directory / MANIFEST_FILE,
        {
            "text": text,
            "tokens": tokens,
            "size": size,
            "sha256": digest.hexdigest(),
            "separator": SEPARATOR,
            "documents": documents,
        },
    )
    return Store(path, tokens)


def list_files(text: list[str]) -> list[Path]:
    """The files that the entries of data.text name: entry by entry, sorted within each, no file twice."""
    listed: dict[Path, None] = {}
    for entry in text:
        try:
            found = _stdlib_files() if entry == STDLIB else paths.matching(entry)
        except OSError as error:
            raise _unreadable(error) from error
        if not found:
            raise RunError(
                f"data.text: nothing matches {repr(entry) if entry == STDLIB else paths.sought(entry)}",
                "Give files, directories or globs that exist on every node, as absolute paths, or `stdlib:`.",
            )
        listed.update(dict.fromkeys(found))
    return list(listed)


def _stdlib_files() -> list[Path]:
    return paths.walk(Path(sysconfig.get_path("stdlib")), lambda p: p.suffix == ".py", _SKIPPED_IN_STDLIB)


def _unreadable(error: OSError) -> RunError:
    return RunError(
        f"data.text: cannot read {error.filename}: {error.strerror or error}",
        "Make it readable, or remove it from data.text.",
    )


def _chunks(
    texts: list[Path], documents: list[dict[str, Any]], beat: Callable[[], None]
) -> Iterator[npt.NDArray[np.uint16]]:
    """The files' bytes as tokens, piece by piece; a line of `documents` for each that is not empty."""
    for path in texts:
        length = 0
        try:
            with path.open("rb") as source:
                while piece := source.read(_READ_BYTES):
                    length += len(piece)
                    beat()
                    yield np.frombuffer(piece, dtype=np.uint8).astype(np.uint16)
        except OSError as error:
            raise _unreadable(error) from error
        if length:
            documents.append({"path": str(path), "bytes": length})
            yield np.array([SEPARATOR], dtype=np.uint16)


def _batches(chunks: Iterator[npt.NDArray[np.uint16]]) -> Iterator[npt.NDArray[np.uint16]]:
    """Pieces of any size → batches of exactly dataset.BATCH_TOKENS, but the last."""
    batch, filled = np.empty(dataset.BATCH_TOKENS, dtype=np.uint16), 0
    for chunk in chunks:
        while len(chunk):
            part = chunk[: dataset.BATCH_TOKENS - filled]
            batch[filled : filled + len(part)] = part
            filled, chunk = filled + len(part), chunk[len(part) :]
            if filled == dataset.BATCH_TOKENS:
                yield batch
                filled = 0
    if filled:
        yield batch[:filled]


def _build_or_say_why(directory: Path, text: list[str], attempt: int) -> Store:
    """Build; on failure leave the reason where the waiting ranks look for it."""
    files.make_dir(directory)
    progress, last = _progress_file(directory, attempt), 0.0

    def beat() -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _BEAT_SECONDS:
            last = now
            files.write_json(progress, {"beat": now})

    try:
        beat()
        store = build(directory, text, attempt, beat)
    except RaylaunchError as error:
        files.write_json(progress, {"error": error.message, "hint": error.hint})
        raise
    progress.unlink(missing_ok=True)
    return store


def _wait(directory: Path, text: list[str], attempt: int, silence: float) -> Store:
    """Look for the finished store until it is there, rank 0 reports an error, or falls silent.

    Silence is judged by this node's clock: clocks of different nodes are not compared."""
    pause, last, heard = 0.02, None, time.monotonic()
    while True:
        if (store := find(directory, text)) is not None:
            return store
        progress = files.read_json(_progress_file(directory, attempt))
        if progress is not None and "error" in progress:
            raise RunError(f"rank 0: {progress['error']}", progress["hint"])
        if progress != last:
            last, heard = progress, time.monotonic()
        if time.monotonic() - heard > silence:
            raise RunError(
                f"no sign of life from rank 0, which builds {directory}, for {silence:.0f} s",
                "See rank 0's log; is the run directory on a file system that all nodes share?",
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 2.0)


def _progress_file(directory: Path, attempt: int) -> Path:
    return directory / f"building-{attempt}.json"
