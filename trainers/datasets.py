"""What a run reads: text of its own, a prepared dataset, or a mixture of several; opened and checked.

A sample is a window of seq_len + 1 tokens; windows start every seq_len tokens. The last val_fraction of each
source is held out, unless `data.validation` names a dataset of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from raylaunch.config.schema import Config, DataConfig
from raylaunch.data import dataset, sample_order
from raylaunch.data.dataset import Manifest, Row
from raylaunch.data.tokenize import Bytes
from raylaunch.errors import RunError
from raylaunch.trainers import text_corpus
from raylaunch.trainers.models import vocabulary
from raylaunch.training.worker.session import Session


@dataclass(frozen=True)
class Source:
    """Tokens in samples: the first `training` of them to train on, the next `validation` held out.

    `counted`: 1 for each token that the loss counts; None: it counts all."""

    tokens: Row
    counted: Row | None
    training: int
    validation: int


@dataclass(frozen=True)
class Data:
    """All that a run reads. `training`: where its steps take their samples from, `quotas[i]` of every
    `sample_order.BLOCK` from source i; `validation`: where its held-out samples lie.

    `separator`: the token that ends a document. `masked`: documents do not see each other. `facts`: what must
    not change over a run's life, or a step would no longer name the same samples."""

    training: tuple[Source, ...]
    validation: tuple[Source, ...]
    quotas: sample_order.Positions
    separator: int
    masked: bool
    facts: dict[str, int]

    @property
    def counts_all(self) -> bool:
        """Every token of every sample counts in the loss."""
        return not self.masked and all(source.counted is None for source in self.training)

    @cached_property
    def validation_samples(self) -> int:
        return sum(source.validation for source in self.validation)


def open_data(config: Config, session: Session) -> Data:
    """Open what the config names; text becomes the run's own token store, made by rank 0 if need be."""
    data = config.data
    manifests = _manifests(config)
    training = {path: manifests[path] for path in data.weights}
    if training:
        sources = tuple(_cut(data, *_rows(path, manifest)) for path, manifest in training.items())
    else:
        store = text_corpus.prepare(
            session.run_dir / "data",
            data.text,
            rank=session.rank,
            attempt=session.attempt,
            silence=config.distributed.comm_timeout,
        )
        sources = (_cut(data, Row([(store.path, store.tokens)])),)
    held_out = sources
    if data.validation is not None:
        tokens, counted = _rows(data.validation, manifests[data.validation])
        held_out = (Source(tokens, counted, 0, sample_count(tokens.count, data.seq_len)),)
    quotas = sample_order.quotas(list(data.weights.values()) or [1.0])
    facts = {
        "global_batch_size": session.global_batch_size,
        "seq_len": data.seq_len,
        "seed": data.seed,
        "training_samples": sum(source.training for source in sources),
    }
    if training:
        facts["data"] = _digest(list(training.values()), quotas)
    return Data(
        sources,
        held_out,
        quotas,
        separator=int(next(iter(manifests.values())).tokenizer["separator"]) if manifests else text_corpus.SEPARATOR,
        masked=_is_masked(data, manifests),
        facts=facts,
    )


def is_masked(config: Config) -> bool:
    """Whether documents do not see each other, as `open_data` will say."""
    return _is_masked(config.data, _manifests(config))


def _is_masked(data: DataConfig, manifests: dict[str, Manifest]) -> bool:
    conversations = any(manifests[path].format == "sft" for path in data.weights)
    return conversations if data.document_mask is None else data.document_mask


def look(config: Config) -> list[str]:
    """What a run would read, a line each, without reading it; RunError for what it cannot use."""
    data, steps = config.data, config.step_scheduler
    manifests = _manifests(config)
    counts = {path: manifests[path].tokens for path in data.weights}
    if not counts:  # a token a byte, and a separator after each file
        counts = {"data": sum(path.stat().st_size + 1 for path in text_corpus.list_files(data.text))}
    lines = []
    for name, tokens in counts.items():
        share = data.weights[name] / sum(data.weights.values()) if data.weights else 1.0
        training, held_out = _split(data, tokens)
        line = f"{name}: {tokens:,} tokens; {training:,} samples of {data.seq_len} to train on, {held_out:,} held out"
        if data.mixture:
            line += f"; {share:.1%} of what is read"
        if steps.global_batch_size is not None:
            epochs = steps.max_steps * steps.global_batch_size * share / training
            line += f"; {steps.max_steps:,} steps are {epochs:.2f} epochs"
        lines.append(line)
    if data.validation is not None:
        samples = sample_count(manifests[data.validation].tokens, data.seq_len)
        lines.append(f"{data.validation}: {samples:,} samples to validate on")
    return lines


def _manifests(config: Config) -> dict[str, Manifest]:
    """Of all prepared datasets that the config names; RunError when they do not go together."""
    data = config.data
    paths = dict.fromkeys([*data.weights, *([data.validation] if data.validation is not None else [])])
    known = vocabulary(config.model) if paths else 0
    manifests = {path: prepared(path, known) for path in paths}
    made_with = {
        path: (manifest.tokenizer["sha256"], manifest.tokenizer["name"]) for path, manifest in manifests.items()
    }
    if not data.weights:
        made_with["data.text"] = (Bytes.sha256, Bytes.name)
    (first, one), *others = made_with.items()
    for path, other in others:
        if other[0] != one[0]:  # the same number would be two words
            raise RunError(
                f"{first} and {path} were prepared with different tokenizers ({one[1]}, {other[1]})",
                "Prepare them with the same tokenizer.",
            )
    return manifests


def prepared(directory: Path | str, vocab_size: int) -> Manifest:
    """A prepared dataset; RunError for one that this model cannot read."""
    manifest = dataset.read(directory)
    if manifest.format == "table":
        raise RunError(
            f"{directory} is a table, not a dataset of tokens", "Read it in your own loop with raylaunch.Table."
        )
    needed = int(manifest.tokenizer["vocab_size"])
    if needed > vocab_size:
        raise RunError(
            f"the tokens of {directory} need a vocabulary of {needed}, the model has {vocab_size}",
            f"Set model.vocab_size to {-(-needed // 64) * 64}, say (a multiple of 64 is quick).",
        )
    return manifest


def sample_count(tokens: int, seq_len: int) -> int:
    """How many samples so many tokens are; RunError for less than one."""
    if tokens <= seq_len:
        raise RunError(
            f"the data holds {tokens} tokens; one sample of data.seq_len {seq_len} needs {seq_len + 1}",
            "Add text or lower data.seq_len.",
        )
    return (tokens - 1) // seq_len


def _rows(path: str, manifest: Manifest) -> tuple[Row, Row | None]:
    """The tokens, and which of them count."""
    counted = dataset.row(path, manifest.shards, dataset.LOSS) if manifest.format == "sft" else None
    return dataset.row(path, manifest.shards), counted


def _cut(data: DataConfig, tokens: Row, counted: Row | None = None) -> Source:
    return Source(tokens, counted, *_split(data, tokens.count))


def _split(data: DataConfig, tokens: int) -> tuple[int, int]:
    fraction = data.val_fraction if data.validation is None else 0.0
    return sample_order.split_validation(sample_count(tokens, data.seq_len), fraction)


def _digest(manifests: list[Manifest], quotas: sample_order.Positions) -> int:
    """48 bits that change with the tokens and the proportions."""
    if len(manifests) == 1:
        return manifests[0].digest
    text = " ".join(f"{manifest.digest}*{quota}" for manifest, quota in zip(manifests, quotas, strict=True))
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
