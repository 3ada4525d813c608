"""A causal language model of Hugging Face's transformers, by name or by path: its code, in our loop.

Its weights are read shard by shard. With `model.lora.rank`, peft's adapters are all that is trained and saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raylaunch.config.schema import Config, ModelConfig
from raylaunch.errors import RunError, first_line
from raylaunch.trainers.module_wrapper import Wrapped

_NEEDED = "pip install 'raylaunch[hf]'"
_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.jinja")
_ADAPTER = "lora_"


def description(model: ModelConfig) -> Any:
    """The model's own config; RunError where there is none."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise RunError("model.hf needs transformers", _NEEDED) from error
    try:
        return AutoConfig.from_pretrained(str(model.hf)).get_text_config()
    except (OSError, ValueError) as error:
        raise RunError(
            f"model.hf: no config of {model.hf}: {first_line(error)}",
            "Specify a directory written by save_pretrained, or a model name on the Hugging Face hub (set HF_TOKEN for gated models).",
        ) from error


class PretrainedModel(Wrapped):
    """`inner` is the model of transformers, or peft's around it."""

    def __init__(self, config: ModelConfig, recompute: str = "none") -> None:
        from transformers import AutoModelForCausalLM

        theirs = description(config)

        def make() -> nn.Module:
            build: Any = AutoModelForCausalLM.from_config
            inner: nn.Module = build(theirs, attn_implementation="sdpa")
            inner = _with_adapters(inner, config) if config.lora.rank else inner
            for parameter in inner.parameters():
                if parameter.requires_grad:  # in what their config names, bfloat16 as a rule, updates are rounded away
                    parameter.data = parameter.data.float()
            return inner

        super().__init__(make)
        self._config, self._theirs = config, theirs
        inner: Any = self.inner
        if recompute != "none":
            enable = getattr(inner, "activation_checkpointing_enable", None)  # its newer name
            (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})
            inner.enable_input_require_grads() if config.lora.rank else None

    @property
    def weights(self) -> Path | None:  # type: ignore[override]
        """Downloaded, if it is a name."""
        return self._directory if self._config.hf_init == "pretrained" else None

    @cached_property
    def _directory(self) -> Path:
        name = str(self._config.hf)
        if Path(name).is_dir():
            return Path(name)
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(_FILES)))

    @property
    def layers(self) -> Sequence[nn.Module]:
        lists = [m for m in self.inner.modules() if isinstance(m, nn.ModuleList)]
        return list(next(m for m in lists if len(m) == self._theirs.num_hidden_layers))

    def forward(self, tokens: Tensor, documents: Tensor | None = None, rows: int | None = None) -> Tensor:
        given: dict[str, Tensor] = {}
        if documents is not None:
            same = documents[:, None, :, None] == documents[:, None, None, :]
            places = torch.arange(tokens.shape[1], device=tokens.device)
            begins = torch.where(documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0, places, 0)
            given = {"attention_mask": same.tril(), "position_ids": places - begins.cummax(dim=1).values}
        logits: Tensor = self.inner(input_ids=tokens, use_cache=False, **given).logits
        return logits

    def init_std(self, name: str) -> float | None:
        if "lora_A" in name:
            return 1 / math.sqrt(3 * self._theirs.hidden_size)  # the variance of peft's uniform one
        if "lora_B" in name or name.endswith("bias"):
            return 0.0
        owner = self.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Embedding) or self.get_parameter(name).ndim >= 2:
            return float(self._theirs.initializer_range)
        return None

    def is_fresh(self, name: str) -> bool:
        return self.weights is None or _ADAPTER in name

    def check_weights(self) -> None:
        if self.weights is not None and not any(self.weights.glob("*.safetensors")):
            raise RunError(f"{self.weights} has no *.safetensors", "Save the model again with save_pretrained(…).")

    def their_name(self, name: str) -> str:
        plain = name.removeprefix("inner.").replace(".default.", ".")
        if not self._config.lora.rank or _ADAPTER in name:
            return plain
        return plain.removeprefix("base_model.model.").replace(".base_layer.", ".")

    def describe(self, config: Config, to: Path, dtype: str) -> str:
        if config.model.lora.rank:
            adapted: Any = self.inner
            adapted.peft_config["default"].save_pretrained(str(to))
            return "adapter_model"
        self._theirs.save_pretrained(str(to))
        for path in self._directory.glob("*"):
            if path.name.startswith(("tokenizer", "special_tokens", "generation_config", "chat_template")):
                (to / path.name).write_bytes(path.read_bytes())
        return "model"


def _with_adapters(inner: Any, config: ModelConfig) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RunError("model.lora needs peft", _NEEDED) from error
    own = config.lora
    try:
        made = LoraConfig(
            r=own.rank, lora_alpha=own.alpha or 2 * own.rank, lora_dropout=own.dropout, task_type="CAUSAL_LM",
            target_modules=own.target_modules or "all-linear", base_model_name_or_path=str(config.hf),
        )  # fmt: skip
        return get_peft_model(inner, made)
    except ValueError as error:
        raise RunError(f"model.lora: {error}", "Use module names of this model in lora.target_modules.") from error
