"""Weights in Hugging Face's layout, in and out.

`load` fills a sharded model, each rank reading the rows that are its own. `export` writes a committed checkpoint as
consolidated safetensors, some gigabytes at a time, with what else the model's own loader needs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor

from raylaunch.config.schema import Config
from raylaunch.errors import RunError, StateError
from raylaunch.trainers import models
from raylaunch.trainers.models import LanguageModel
from raylaunch.trainers.parallel import own_part

SHARD_BYTES = 4 << 30


@torch.no_grad()
def load(model: LanguageModel, named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Fill these sharded parameters from the model's `weights`; each rank reads its own rows only."""
    assert model.weights is not None
    model.check_weights()
    with _Files(model.weights) as files:
        for name, parameter in named:
            assert isinstance(parameter, DTensor)
            here, parts = own_part(parameter), model.their_parts(name)
            if parts is None:
                parameter.to_local().copy_(files.read(model.source(name), here))
            else:
                for own, theirs in zip(parameter.to_local(), parts[here[0]], strict=True):
                    own.copy_(files.read(theirs, here[1:]))


def export(config: Config, checkpoint: Path, to: Path, dtype: str = "float32", *, ema: bool = False) -> list[Path]:
    """Write a committed checkpoint's parameters, or their moving averages, as `to`, a new directory that the model's
    own loader reads (for adapters: peft's); its files."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise RunError("export needs safetensors", "pip install 'raylaunch[hf]'") from error
    with torch.device("meta"):
        model = models.make(config)
    reader, which = FileSystemReader(checkpoint), "ema." if ema else "model."
    sizes = {
        name.removeprefix(which): torch.Size(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(which) and hasattr(entry, "size")
    }
    if not sizes:
        raise RunError(f"{checkpoint} holds no moving average", "It was saved without optimizer.ema.")
    kind: torch.dtype = getattr(torch, dtype)
    groups = list(_groups(sizes, kind.itemsize))
    part = to.with_name(f".{to.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        index: dict[str, str] = {}
        stem = model.describe(config, part, dtype)
        for number, names in enumerate(groups, 1):
            state: dict[str, Any] = {which + name: torch.empty(sizes[name]) for name in names}
            state_dict_loader.load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
            file = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else f"{stem}.safetensors"
            tensors: dict[str, Tensor] = {}
            for name in names:
                whole, parts = state[which + name].to(kind), model.their_parts(name)
                if parts is None:
                    tensors[model.their_name(name)] = whole
                else:  # a file has no two views of one memory
                    tensors |= {theirs: part.clone() for theirs, part in zip(parts, whole, strict=True)}
            save_file(tensors, part / file, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, file)
        if len(groups) > 1:
            total = sum(size.numel() * kind.itemsize for size in sizes.values())
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
            (part / f"{stem}.safetensors.index.json").write_text(text)
        part.rename(to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return sorted(to.iterdir())


def _groups(sizes: dict[str, torch.Size], itemsize: int) -> Iterator[list[str]]:
    """Names whose tensors fill a file each."""
    group: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if group and filled + size.numel() * itemsize > SHARD_BYTES:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size.numel() * itemsize
    yield group


class _Files:
    """The safetensors files of a directory: name → the file that holds it, memory-mapped."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._stack = directory, ExitStack()
        self._owner: dict[str, Any] = {}

    def __enter__(self) -> _Files:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise RunError("pretrained weights need safetensors", "pip install 'raylaunch[hf]'") from error
        paths = sorted(self._directory.glob("*.safetensors"))
        if not paths:
            raise StateError(
                f"{self._directory} has no *.safetensors", "Specify a directory written by save_pretrained."
            )
        for path in paths:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._owner |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """That part of a tensor; RunError when there is none of that name."""
        if name not in self._owner:
            raise RunError(f"{self._directory} has no {name}", "Check that these are the weights of this model.")
        found: Tensor = self._owner[name].get_slice(name)[part]
        return found
