"""Our decoder is a Llama, or a Mixtral with its experts: what Hugging Face calls its parameters and its shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raylaunch.config.schema import Config, ModelConfig
from raylaunch.errors import RunError

_BLOCK = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj", "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm", "feed_forward.router": "block_sparse_moe.gate",
}  # fmt: skip
_OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_SHAPE = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "ffn_dim": "intermediate_size", "vocab_size": "vocab_size",
}  # fmt: skip
_MIXTRAL = {"n_experts": "num_local_experts", "n_experts_per_token": "num_experts_per_tok"}
_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}
_EPS = 1e-5


def name_of(ours: str) -> str:
    """A parameter's name in `transformers`' LlamaForCausalLM."""
    stem, _, leaf = ours.rpartition(".")
    if stem.startswith("blocks."):
        _, number, rest = stem.split(".", 2)
        return f"model.layers.{number}.{_BLOCK[rest]}.{leaf}"
    return f"{_OUTSIDE[stem]}.{leaf}"


def experts_of(ours: str, count: int) -> list[str] | None:
    """Mixtral has each expert's weights by themselves: their names, for a parameter that is all of them."""
    stem, _, leaf = ours.rpartition(".")
    if not stem.endswith(".experts"):
        return None
    number = stem.split(".")[1]
    return [f"model.layers.{number}.block_sparse_moe.experts.{e}.{_EXPERT[leaf]}.weight" for e in range(count)]


def check(directory: Path, config: ModelConfig) -> None:
    """RunError when the weights there are not this model's."""
    theirs = description(directory)
    kind = theirs.get("model_type")
    if kind not in {"llama", "mixtral"}:
        raise RunError(
            f"{directory} holds a model of type {kind}; model.init_from knows llama and mixtral",
            "Give it as model.hf instead: any causal language model of transformers.",
        )
    rope = theirs.get("rope_parameters") or {}
    scaling = theirs.get("rope_scaling") or rope
    turned = scaling.get("rope_type") or scaling.get("type") or "default"  # `type` is the older word
    biased = theirs.get("attention_bias") or theirs.get("mlp_bias")
    needed: dict[str, Any] = {ours: theirs.get(name) for ours, name in _SHAPE.items()}
    needed |= {ours: theirs.get(name) if kind == "mixtral" else 0 for ours, name in _MIXTRAL.items()}
    if kind == "llama":
        del needed["n_experts_per_token"]
    needed["n_kv_heads"] = needed["n_kv_heads"] or needed["n_heads"]
    needed["rope_theta"] = float(theirs.get("rope_theta") or rope.get("rope_theta") or 10000.0)
    wrong = {key: value for key, value in needed.items() if getattr(config, key) != value}
    if wrong:
        fits = ", ".join(f"{key}: {value}" for key, value in needed.items())
        raise RunError(
            f"the weights in {directory} do not match the shape of model: {', '.join(wrong)}", f"Set model: {{{fits}}}."
        )
    window = theirs.get("sliding_window")
    if turned != "default" or abs(float(theirs.get("rms_norm_eps", _EPS)) - _EPS) > 1e-9 or biased or window:
        raise RunError(
            f"{directory} has a scaled RoPE ({turned}), another epsilon, biases or a sliding window ({window}), which "
            "the decoder has not",
            "Give it as model.hf instead: any causal language model of transformers.",
        )


def is_tied(directory: Path) -> bool:
    """The embedding is the head, too."""
    return bool(description(directory).get("tie_word_embeddings"))


def described(config: Config, dtype: str) -> dict[str, Any]:
    """The config.json of an export."""
    model = config.model
    name, kind = "LlamaForCausalLM", "llama"
    more: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
    if model.n_experts:
        name, kind, more = "MixtralForCausalLM", "mixtral", {"sliding_window": None}
        more |= {theirs: getattr(model, ours) for ours, theirs in _MIXTRAL.items()}
    return {
        "architectures": [name], "model_type": kind, **more, "hidden_act": "silu", "rms_norm_eps": _EPS,
        **{theirs: getattr(model, ours) for ours, theirs in _SHAPE.items()},
        "head_dim": model.dim // model.n_heads, "max_position_embeddings": config.data.seq_len,
        "rope_theta": model.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": False, "torch_dtype": dtype,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def description(directory: Path) -> dict[str, Any]:
    """The config.json there."""
    try:
        return dict(json.loads((directory / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{directory} has no config.json that can be read: {error}",
            "Specify a directory written by save_pretrained.",
        ) from error
