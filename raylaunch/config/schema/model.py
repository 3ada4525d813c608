"""`model:` what is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raylaunch.config.schema.base import Line, NotNegative, Positive, Section, Share

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 192},
    "1M": {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 384},
    "10M": {"dim": 320, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 864},
    "125M": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "ffn_dim": 2048},
    "1B": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 8192},
    "8B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 14336},
}


class LoraConfig(Section):
    """`model.lora:` train low-rank adapters (PEFT's LoRA) of the model that `model.hf` names, and save only these."""

    rank: NotNegative = 0
    """Rank of the LoRA adapters. 0: train the whole model. Example: `16`."""
    alpha: Positive | None = None
    """LoRA scaling factor. Default: twice the rank. Example: `32`."""
    dropout: Share = 0.0
    """Dropout probability in the adapters. Example: `0.05`."""
    target_modules: list[Line] = Field(default_factory=list)
    """Modules that get adapters. Default: all linear layers except the head. Example: `[q_proj, v_proj]`."""


class ModelConfig(Section):
    """`model:` the model: a Llama-style decoder, a model of `transformers` (`hf`), or your own module (`_target_`)."""

    hf: Line | None = None
    """Train a causal language model of `transformers` in place of the built-in decoder: a directory or a name on the
    Hugging Face Hub. Needs `raylaunch[hf]`. Example: `Qwen/Qwen2.5-0.5B`."""
    hf_init: Literal["pretrained", "random"] = "pretrained"
    """Start from the pretrained weights of `model.hf`, or from random ones. Example: `random`."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    target: Annotated[str, Field(pattern=r"^[\w.]+[.:]\w+$", examples=["package.module:function"])] | None = None
    """Train your own module in place of the built-in decoder: a function or class that returns an `nn.Module` from
    tokens [B, S] to logits [B, S, vocab_size]. Written as `_target_`; all other keys of the section are its arguments.
    Example: `my_package.models:build`."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `model.target`. Example: `{width: 512}`."""
    size: Literal["tiny", "1M", "10M", "125M", "1B", "8B"] = "1M"
    """Named shape of the built-in decoder. The keys below override single dimensions. Example: `125M`."""
    dim: Positive = 128
    """Hidden dimension. Must be a multiple of `model.n_heads`. Example: `768`."""
    n_layers: Positive = 4
    """Number of transformer blocks. Example: `12`."""
    n_heads: Positive = 4
    """Number of attention heads. Example: `12`."""
    n_kv_heads: Positive = 2
    """Number of key and value heads (grouped-query attention). Example: `4`."""
    ffn_dim: Positive = 384
    """Hidden dimension of the feed-forward layers. Example: `2048`."""
    vocab_size: Annotated[int, Field(ge=257)] = 264
    """Vocabulary size. Byte-level text needs 257 (the bytes and one separator); 264 is divisible by eight. Example:
    `32000`."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary position embedding. Example: `500000.0`."""
    n_experts: NotNegative = 0
    """Experts per block (mixture of experts), each of size `model.ffn_dim`. 0: dense. Example: `8`."""
    n_experts_per_token: Positive = 2
    """Experts that process each token. Example: `1`."""
    router_aux_loss: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the load-balancing loss of the experts. Example: `0.02`."""
    init_from: Line | None = None
    """Start from the weights in this directory, in Hugging Face's Llama layout (`config.json`, `*.safetensors`).
    Example: `/shared/llama-1b`."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, values: Any) -> Any:
        """A named size gives the shape; keys that are written win over it."""
        if isinstance(values, dict):
            size = values.get("size", "1M")
            return {**(SIZES.get(size, {}) if isinstance(size, str) else {}), **values}
        return values

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.dim % self.n_heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of n_heads ({self.n_heads})")
        if (self.dim // self.n_heads) % 2:
            raise ValueError(f"dim / n_heads ({self.dim // self.n_heads}) must be even: RoPE turns pairs")
        if self.hf is not None and self.target is not None:
            raise ValueError("hf and _target_: give one of them")
        if (self.hf is not None or self.target is not None) and (self.init_from is not None or self.n_experts):
            raise ValueError("hf and _target_ cannot be combined with init_from or n_experts")
        if self.lora.rank and self.hf is None:
            raise ValueError("lora needs model.hf")
        if self.n_experts and self.n_experts_per_token > self.n_experts:
            raise ValueError(f"n_experts_per_token ({self.n_experts_per_token}) exceeds n_experts ({self.n_experts})")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        return self
