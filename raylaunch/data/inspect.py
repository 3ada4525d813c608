"""Some documents of a prepared dataset, as text."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from raylaunch.data import dataset, table, tokenize
from raylaunch.data.dataset import Manifest, Shard
from raylaunch.errors import DataError

SHOWN_TOKENS = 200


@dataclass(frozen=True)
class Sample:
    """One document, its beginning as text; what the loss counts stands between ⟦ and ⟧ in sft."""

    shard: str
    index: int
    source: str
    tokens: int
    text: str


def samples(directory: Path, manifest: Manifest, count: int, seed: int) -> list[Sample]:
    """`count` documents, or rows of a table, each as likely as every other; DataError when the tokenizer is another by
    now."""
    picked = sorted(random.Random(seed).sample(range(manifest.documents), min(count, manifest.documents)))
    if manifest.format == table.FORMAT:
        rows = table.Table(directory)
        return [_row(rows, manifest, number) for number in picked]
    tokenizer = tokenize.load(str(manifest.tokenizer["name"]))
    if tokenizer.sha256 != manifest.tokenizer["sha256"]:
        raise DataError(
            f"tokenizer {tokenizer.name} is not the one that the dataset was made with", "Put that one there again."
        )
    return [_sample(directory, manifest, tokenizer, number) for number in picked]


def _find(manifest: Manifest, number: int) -> tuple[Shard, int]:
    """The shard that holds document `number`, and its index there."""
    for shard in manifest.shards:
        if number < shard.documents:
            return shard, number
        number -= shard.documents
    raise AssertionError("there are not so many")


def _row(rows: table.Table, manifest: Manifest, number: int) -> Sample:
    shard, index = _find(manifest, number)
    values = rows.take([number])
    text = "\n".join(f"{name}: {str(value[0])[:SHOWN_TOKENS]}" for name, value in values.items())
    return Sample(shard.name, index, shard.source, 0, text)


def _sample(directory: Path, manifest: Manifest, tokenizer: tokenize.Tokenizer, number: int) -> Sample:
    shard, index = _find(manifest, number)
    start, stop = dataset.document(directory, shard, index)
    length = min(stop - start, SHOWN_TOKENS)
    tokens = dataset.row(directory, [shard]).read(start, length)
    text = tokenizer.decode(tokens)
    if manifest.format == "sft":
        counted, text, at = dataset.row(directory, [shard], dataset.LOSS).read(start, length), "", 0
        while at < length:
            end = at + 1
            while end < length and counted[end] == counted[at]:
                end += 1
            part = tokenizer.decode(tokens[at:end])
            text, at = text + (f"⟦{part}⟧" if counted[at] else part), end
    return Sample(shard.name, index, shard.source, stop - start, text + (" …" if length < stop - start else ""))
