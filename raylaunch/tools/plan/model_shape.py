"""The shape of the model: its parameters as created by `trainers.model` (or transformers' Llama).

    config → Shape → the parameters of a block, and those outside the blocks → counts

A parameter is [rows, columns…]; only the product of the columns matters. Models whose shape is unknown without running
their code are rejected.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raylaunch.config.schema import Config, ModelConfig
from raylaunch.errors import RunError

_OURS = ("trainers.fsdp:", "raylaunch.trainers.fsdp:")
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of transformers with the same blocks as ours: attention and a gated network, each after a norm."""


@dataclass(frozen=True)
class Parameter:
    """[rows, columns…] with `columns` elements per row. `split`: the dimension split by tensor parallel; experts are
    only split by expert parallel. `trained`: it has a gradient."""

    rows: int
    columns: int
    split: Literal["rows", "columns", ""] = ""
    expert: bool = False
    trained: bool = True

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def part(self, tp: int, ep: int) -> Parameter:
        """The part on one worker of a tensor-parallel or expert-parallel group."""
        rows = self.rows // ep if self.expert else self.rows // tp if self.split == "rows" else self.rows
        columns = self.columns // tp if self.split == "columns" else self.columns
        return Parameter(rows, columns, "", self.expert, self.trained)


@dataclass(frozen=True)
class Shape:
    """A decoder. `theirs`: the model is from transformers. `lora`: rank of the adapters, 0: none."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    n_experts: int = 0
    chosen: int = 0
    theirs: bool = False
    tied: bool = False
    biases: int = 0
    """Number of `products` with a bias, from the first."""
    head_norms: bool = False
    """Queries and keys have a norm."""
    lora: int = 0
    dropout: bool = False
    """Dropout on the inputs of the adapters."""
    frozen_width: int = 4
    """Bytes per element of frozen parameters."""

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def products(self) -> list[tuple[int, int]]:
        """The linear layers of a dense block, (out, in)."""
        d, f = self.dim, self.ffn_dim
        attention = [(self.q_dim, d), (self.kv_dim, d), (self.kv_dim, d), (d, self.q_dim)]
        return [*attention, (f, d), (f, d), (d, f)] if not self.n_experts else attention

    @property
    def block(self) -> list[Parameter]:
        """The parameters of one block."""
        d, f = self.dim, self.ffn_dim
        own = not self.lora
        found = [Parameter(d, 1, trained=own), Parameter(d, 1, trained=own)]
        for number, (out, into) in enumerate(self.products):
            found.append(Parameter(out, into, "columns" if number in (3, 6) else "rows", trained=own))
            found += [Parameter(self.lora, into), Parameter(out, self.lora)] if self.lora else []
        found += [Parameter(out, 1, trained=own) for out, _ in self.products[: self.biases]]
        found += [Parameter(self.head_dim, 1, trained=own)] * 2 if self.head_norms else []
        if self.n_experts:
            found.append(Parameter(self.n_experts, d))
            found += [Parameter(self.n_experts, f * d, expert=True)] * 3
        return found

    @property
    def first(self) -> list[Parameter]:
        """Parameters before the blocks: the embedding."""
        return [Parameter(self.vocab_size, self.dim, "rows", trained=not self.lora)]

    @property
    def last(self) -> list[Parameter]:
        """Parameters after the blocks: the norm and, unless it is tied to the embedding, the head."""
        own = not self.lora
        head = [] if self.tied else [Parameter(self.vocab_size, self.dim, "rows", trained=own)]
        return [Parameter(self.dim, 1, trained=own), *head]

    @property
    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: total, trained, and by part."""
        block = self.block
        experts = sum(p.size for p in block if p.expert) * self.n_layers
        blocks = sum(p.size for p in block) * self.n_layers - experts
        outside = [*self.first, *self.last]
        trained = sum(p.size for p in outside if p.trained) + sum(p.size for p in block if p.trained) * self.n_layers
        total = blocks + experts + sum(p.size for p in outside)
        return {
            "total": total, "trained": trained, "blocks": blocks, "experts": experts,
            "embedding": sum(p.size for p in self.first), "head": sum(p.size for p in self.last),
        }  # fmt: skip

    def flops_per_token(self, seq_len: int) -> float:
        """Operations of forward and backward pass: 6 for each parameter that is multiplied with a token, and
        12 * layers * q_dim * seq_len for attention, not halved for a causal mask (Chowdhery et al., PaLM, 2022,
        appendix B). Frozen weights have no gradient and need 4 instead of 6."""
        experts = 3 * self.dim * self.ffn_dim * self.chosen + self.dim * self.n_experts
        products = sum(out * into for out, into in self.products) + experts
        adapters = sum(self.lora * (out + into) for out, into in self.products)
        met = products * self.n_layers + self.vocab_size * self.dim
        attention = 12.0 * self.n_layers * self.q_dim * seq_len
        return (4 if self.lora else 6) * met + 6 * adapters * self.n_layers + attention


def of(config: Config) -> Shape:
    """The shape of the configured model; RunError if it is unknown."""
    if config.trainer.script is not None or not config.trainer.function.startswith(_OURS):
        what = config.trainer.script or config.trainer.function
        raise RunError(
            f"memory cannot be estimated for custom trainers ({what})",
            "To estimate the run time, set --tokens-per-second.",
        )
    model = config.model
    if model.target is not None:
        raise RunError(
            f"model._target_ ({model.target}): memory cannot be estimated for custom models",
            "To check whether it fits, train one step: `raylaunch train` with step_scheduler.max_steps=1.",
        )
    if model.hf is not None:
        return _theirs(model)
    return Shape(
        model.dim, model.n_layers, model.n_heads, model.n_kv_heads, model.dim // model.n_heads, model.ffn_dim,
        model.vocab_size, model.n_experts, model.n_experts_per_token if model.n_experts else 0,
    )  # fmt: skip


def _theirs(model: ModelConfig) -> Shape:
    """The shape in config.json of a local directory."""
    directory = Path(str(model.hf)).expanduser()
    if not directory.is_dir():
        raise RunError(
            f"model.hf: {model.hf} is not a directory, and models on the Hub cannot be estimated",
            "Download the model (`hf download NAME --local-dir DIR`) and set model.hf to the directory.",
        )
    try:
        said: Any = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if said["model_type"] not in LLAMAS:
            raise RunError(
                f"model.hf: models of type {said['model_type']} cannot be estimated",
                f"Supported: {', '.join(LLAMAS)}.",
            )
        heads, dim = int(said["num_attention_heads"]), int(said["hidden_size"])
        return Shape(
            dim, int(said["num_hidden_layers"]), heads, int(said.get("num_key_value_heads") or heads),
            int(said.get("head_dim") or dim // heads), int(said["intermediate_size"]), int(said["vocab_size"]),
            theirs=True, tied=bool(said.get("tie_word_embeddings", False)),
            biases=7 if said.get("mlp_bias") else 4 if said.get("attention_bias") else 3 * (said["model_type"] == "qwen2"),
            head_norms=said["model_type"] == "qwen3", lora=model.lora.rank,
            dropout=model.lora.rank > 0 and model.lora.dropout > 0,
            frozen_width=2 if str(said.get("dtype") or said.get("torch_dtype")) in {"bfloat16", "float16"} else 4,
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        why = f"missing key {error}" if isinstance(error, KeyError) else str(error)
        raise RunError(
            f"model.hf: {directory}/config.json cannot be used: {why}",
            "Use a directory that was written by save_pretrained.",
        ) from error
