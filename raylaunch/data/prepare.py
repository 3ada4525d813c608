"""Documents → a prepared dataset, in parallel, resumable.

plan: the input in pieces (`sources.pieces`), written down → each piece one shard, in a process of its own →
the manifest. A shard that is finished stays, so that the same command goes on where it was cut off; other input
or another tokenizer is refused. Every worker holds one record batch and one document in memory.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from raylaunch.data import chat, dataset, sources, table, tokenize
from raylaunch.data.dataset import Manifest, Shard, ShardWriter
from raylaunch.data.sources import BadDocument, Format, Piece
from raylaunch.data.storage import File
from raylaunch.errors import DataError, UsageError
from raylaunch.host import locks, processes
from raylaunch.state import files

PIECE_BYTES = 64 << 20
"""Input bytes of a shard, about."""
SHOWN = 5
"""Bad documents that are named, of each shard."""


@dataclass(frozen=True)
class PrepareRequest:
    """What a person asked for."""

    inputs: list[str]
    out: Path
    tokenizer: str = "bytes"
    format: Format | None = None
    column: str = "text"
    skip_bad: bool = False
    piece_bytes: int = PIECE_BYTES
    chat_template: str = chat.AUTO


@dataclass(frozen=True)
class PrepareProgress:
    """Bytes of input that are done, of all; bad documents that were left out, as far as they are named."""

    done: int
    total: int
    bad: tuple[BadDocument, ...] = ()


def prepare(request: PrepareRequest, workers: int, tell: Callable[[PrepareProgress], None]) -> Manifest:
    """Make the dataset, or finish it; DataError for input that cannot be used, UsageError for a directory
    with something else in it."""
    inputs = sources.list_files(request.inputs)
    pieces = sources.pieces(inputs, request.format, request.piece_bytes)
    formats = {piece.format for piece in pieces}
    if "sft" in formats and len(formats) > 1:
        raise UsageError("conversations and plain text in one dataset", "Prepare them into a dataset each.")
    tokenizer = tokenize.load(request.tokenizer)
    template = chat.load(request.chat_template, tokenizer) if "sft" in formats else None
    plan = _plan(request, inputs, pieces, tokenizer)
    if template is not None:
        plan["chat_template"] = template.sha256
    files.make_dir(request.out)
    with _alone(request.out):
        _same_plan(request.out, plan)
        shards = _shards(request, pieces, workers, tell)
        if table.FORMAT in formats:
            table.check(request.out, shards)
        kind = next((kind for kind in ("sft", table.FORMAT) if kind in formats), "text")
        manifest = Manifest(kind, tokenize.dtype(tokenizer), plan["tokenizer"], tuple(shards))
        if not manifest.documents:
            raise DataError("the input contains no documents", "Every file is empty, or every document was skipped.")
        manifest.write(request.out)
    return manifest


def _plan(
    request: PrepareRequest, inputs: list[File], pieces: list[Piece], tokenizer: tokenize.Tokenizer
) -> dict[str, Any]:
    return {
        "version": dataset.VERSION,
        "files": [[file.name, file.size, file.stamp] for file in inputs],
        "tokenizer": {
            "name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "separator": tokenizer.separator,
            "sha256": tokenizer.sha256,
        },
        "format": request.format,
        "column": request.column,
        "skip_bad": request.skip_bad,
        "pieces": [asdict(piece) for piece in pieces],
    }  # fmt: skip


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    with locks.held(out / ".lock") as is_ours:
        if not is_ours:
            raise UsageError(f"another `raylaunch data prepare` writes {out}", "Wait for it, or end it.")
        yield


def _same_plan(out: Path, plan: dict[str, Any]) -> None:
    plan = json.loads(json.dumps(plan))
    before = files.read_json(out / dataset.PLAN)
    if before == plan:
        return
    others = [path.name for path in out.iterdir() if path.name != ".lock"]
    if before is None and others:
        raise UsageError(f"{out} has other things in it ({others[0]})", "Name a directory of its own with --out.")
    if before is None or not any(out.glob("shard-*.json")):  # nothing came of what was begun
        files.write_json(out / dataset.PLAN, plan)
    else:
        differs = ", ".join(key for key in plan if before.get(key) != plan[key])
        raise UsageError(
            f"{out} was made from something else (different: {differs})",
            "Name another directory with --out, or remove this one.",
        )


def _shards(
    request: PrepareRequest, pieces: list[Piece], workers: int, tell: Callable[[PrepareProgress], None]
) -> list[Shard]:
    """One shard a piece; those that are there already are kept."""
    found: dict[int, Shard] = {}
    for number in range(len(pieces)):
        record = files.read_json(request.out / f"{_name(number)}.json")
        if record is not None and all((request.out / name).exists() for name in record["size"]):
            found[number] = Shard(**record)
    total, bad = sum(piece.bytes for piece in pieces), []
    done = sum(pieces[number].bytes for number in found)
    tell(PrepareProgress(done, total))
    missing = [number for number in range(len(pieces)) if number not in found]
    if not missing:
        return [found[number] for number in range(len(pieces))]
    context = multiprocessing.get_context("spawn")  # forking what has threads (Arrow's) is not safe
    with ProcessPoolExecutor(max(1, min(workers, len(missing))), context, processes.die_with_parent) as pool:
        waiting: dict[Future[tuple[Shard, list[BadDocument]]], int] = {
            pool.submit(_make, request, number, pieces[number]): number for number in missing
        }
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    number = waiting.pop(future)
                    found[number], named = future.result()
                    done += pieces[number].bytes
                    bad += named
                    tell(PrepareProgress(done, total, tuple(bad)))
        except BrokenProcessPool as error:
            raise DataError(
                "a worker was killed", "Out of memory? Fewer --workers need less. Run it again to go on."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [found[number] for number in range(len(pieces))]


def _name(number: int) -> str:
    return f"shard-{number:05d}"


@cache
def _tokenizer(spec: str) -> tokenize.Tokenizer:
    return tokenize.load(spec)


@cache
def _template(spec: str, tokenizer: str) -> chat.Template | None:
    return chat.load(spec, _tokenizer(tokenizer))


def _make(request: PrepareRequest, number: int, piece: Piece) -> tuple[Shard, list[BadDocument]]:
    """One piece → one shard, in a worker."""
    bad: list[BadDocument] = []
    try:
        if piece.format == table.FORMAT:
            shard = table.write(request.out, _name(number), piece.source, sources.rows(piece))
        else:
            shard, bad = _tokens(request, number, piece)
    except OSError as error:
        raise DataError(
            f"cannot write {request.out}: {error.strerror or error}", "Is there space? Run it again to go on."
        ) from error
    files.write_json(request.out / f"{shard.name}.json", asdict(shard))
    return shard, bad


def _tokens(request: PrepareRequest, number: int, piece: Piece) -> tuple[Shard, list[BadDocument]]:
    """A piece's documents as tokens."""
    tokenizer = _tokenizer(request.tokenizer)
    columns = (dataset.TOKENS, dataset.LOSS) if piece.format == "sft" else (dataset.TOKENS,)
    template = _template(request.chat_template, request.tokenizer) if piece.format == "sft" else None
    separator = np.array([tokenizer.separator], tokenize.dtype(tokenizer))
    bad: list[BadDocument] = []
    skipped = 0
    writer = ShardWriter(request.out, _name(number), tokenize.dtype(tokenizer), columns)
    try:
        for document in sources.documents(piece, request.column):
            found = document if isinstance(document, BadDocument) else _encode(tokenizer, template, document, piece)
            if isinstance(found, BadDocument):
                if not request.skip_bad:
                    raise DataError(f"{found.where}: {found.why}", "Mend it, or leave such documents out: --skip-bad.")
                skipped += 1
                bad += [found] if len(bad) < SHOWN else []
                continue
            tokens, loss = found  # the end of an answer is to be learned as well, but a template has its own
            loss = None if loss is None else np.append(loss, np.uint8(template is None))
            writer.add(np.concatenate([tokens, separator]), loss)
        return writer.close(piece.source, skipped), bad
    except BaseException:
        writer.abandon()
        raise


def _encode(
    tokenizer: tokenize.Tokenizer, template: chat.Template | None, document: sources.Document, piece: Piece
) -> Any:
    """(tokens, loss or None), or Bad."""
    try:
        if isinstance(document, list) and template is not None:
            assert isinstance(tokenizer, tokenize.PretrainedTokenizer)
            return template.encode(tokenizer, document)
        if isinstance(document, list):
            return tokenize.conversation(tokenizer, document)
        return tokenizer.encode(document), None
    except DataError as error:
        return BadDocument(piece.source, error.message)
