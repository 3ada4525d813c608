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
    """`model.lora:` train small adapters of a model of `model.hf`, and save only them (peft's LoRA)."""

    rank: NotNegative = 0
    """0: train the model itself."""
    alpha: Positive | None = None
    """Default: twice the rank."""
    dropout: Share = 0.0
    target_modules: list[Line] = Field(default_factory=list)
    """Default: all linear ones but the head."""


class ModelConfig(Section):
    """`model:` a Llama-style decoder; `size` names a shape, the other keys override it. Or `hf`."""

    hf: Line | None = None
    """In place of the decoder: a causal language model of transformers, by path or by name. Needs raylaunch[hf]."""
    hf_init: Literal["pretrained", "random"] = "pretrained"
    """Begin with its weights, or with fresh ones of its shape."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    target: Annotated[str, Field(pattern=r"^[\w.]+[.:]\w+$", examples=["package.module:function"])] | None = None
    """In place of the decoder: a function or class that makes a module from tokens [B, S] to logits [B, S, vocab_size].
    Written as `_target_`, all other keys of the section are its arguments."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """The arguments of target."""
    size: Literal["tiny", "1M", "10M", "125M", "1B", "8B"] = "1M"
    dim: Positive = 128
    n_layers: Positive = 4
    n_heads: Positive = 4
    n_kv_heads: Positive = 2
    ffn_dim: Positive = 384
    vocab_size: Annotated[int, Field(ge=257)] = 264
    """Bytes and one separator are 257; 264 divides by eight."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    n_experts: NotNegative = 0
    """A mixture of so many experts in each block, each of ffn_dim; 0: none."""
    n_experts_per_token: Positive = 2
    router_aux_loss: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the loss that balances the load of the experts."""
    init_from: Line | None = None
    """Begin with these weights: a directory in Hugging Face's Llama layout (config.json, *.safetensors)."""

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
            raise ValueError("hf and _target_ go without init_from and n_experts: they are whole models")
        if self.lora.rank and self.hf is None:
            raise ValueError("lora is for a model of model.hf")
        if self.n_experts and self.n_experts_per_token > self.n_experts:
            raise ValueError(f"n_experts_per_token ({self.n_experts_per_token}) exceeds n_experts ({self.n_experts})")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        return self
