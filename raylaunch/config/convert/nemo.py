"""Configurations in the manner of NeMo AutoModel: its keys under our names.

A file that has a `_target_`, or a section that only NeMo has, is one. Its keys that mean the same here are moved;
each that means nothing here is named in a note with what to write instead. Everything else is left to be judged as
in any other file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from raylaunch.config.yaml_items import LocatedValue

TARGET = "_target_"
_THEIRS = (
    "dataset", "validation_dataset", "dataloader", "validation_dataloader", "packed_sequence", "loss_fn", "dist_env",
    "rng", "lr_scheduler", "clip_grad_norm", "peft", "recipe",
)  # fmt: skip
_MOVED = {
    "rng.seed": "data.seed",
    "lr_scheduler.lr_decay_style": "step_scheduler.lr_decay_style",
    "lr_scheduler.lr_warmup_steps": "step_scheduler.warmup_steps",
    "clip_grad_norm.max_norm": "optimizer.max_grad_norm",
    "model.pretrained_model_name_or_path": "model.hf",
    "peft.dim": "model.lora.rank",
    "peft.alpha": "model.lora.alpha",
    "peft.dropout": "model.lora.dropout",
    "slurm.hf_home": "slurm.env.HF_HOME",
    "slurm.hf_token": "slurm.env.HF_TOKEN",
    "slurm.wandb_key": "slurm.env.WANDB_API_KEY",
}
_PREPARE = "prepare it (`raylaunch data prepare`) and name it in data.prepared"
_CONTAINER = "raylaunch starts no container: run `raylaunch up` where its environment is"
_LEFT_OUT = {
    "dataset": _PREPARE,
    "validation_dataset": "prepare it, and name it in data.validation",
    "dataloader": "data is read ahead in a thread; step_scheduler.local_batch_size says how many samples at a time",
    "validation_dataloader": "step_scheduler.val_batches says how much is validated on",
    "packed_sequence": "samples are always packed, to data.seq_len; see data.document_mask",
    "loss_fn": "the loss is cross-entropy over the tokens that count",
    "recipe": "trainer: names the function that trains",
    "rng": "random numbers follow from data.seed, step and rank",
    "peft": "model.lora is what there is",
    "lr_scheduler": "step_scheduler has warmup_steps, lr_decay_style, lr_decay_steps and min_lr_ratio",
    "dist_env": "the backend follows from the device; distributed.comm_timeout is in seconds",
    "clip_grad_norm": "optimizer.max_grad_norm",
    "model.torch_dtype": "parameters are float32, and computed with in distributed.dtype",
    "model.attn_implementation": "torch's scaled_dot_product_attention it is",
    "model.use_liger_kernel": "raylaunch has no alternative kernels",
    "model.use_sdpa_patching": "raylaunch has no alternative kernels",
    "model.trust_remote_code": "code from the hub is not run",
    "optimizer.foreach": "AdamW is fused",
    "optimizer.fused": "AdamW is fused",
    "checkpoint.enabled": "checkpoints are always saved",
    "checkpoint.model_save_format": "checkpoints are torch's; save_consolidated writes safetensors at the end",
    "distributed.dp_size": "it follows from the workers",
    "distributed.dp_replicate_size": "strategy: hsdp has a replica on each node",
    "distributed.sequence_parallel": "it goes with tp_size",
    "step_scheduler.num_epochs": "max_steps says how long",
    "wandb.save_dir": "it lies in the run directory",
    "slurm.container_image": _CONTAINER,
    "slurm.extra_mounts": _CONTAINER,
    "slurm.nemo_mount": _CONTAINER,
    "slurm.job_dir": "cluster.state_dir is where logs lie",
    "slurm.master_port": "ports are leased",
}
_SILENT = {
    "checkpoint.enabled": "true", "checkpoint.model_save_format": "safetensors", "distributed.dp_size": "none",
    "distributed.dp_replicate_size": "1",
}  # fmt: skip
"""Values of these that say what is so anyway."""
_STRATEGIES = {"fsdp2": "fsdp", "megatronfsdp": "fsdp", "megatron_fsdp": "fsdp", "ddp": "ddp"}
_SECRETS = {"slurm.hf_token", "slurm.wandb_key"}

Tell = Callable[[str], None]


def is_theirs(item: LocatedValue) -> bool:
    """A file in NeMo's manner."""
    if not isinstance(item.value, dict):
        return False
    sections = [child for child in item.value.values() if isinstance(child.value, dict)]
    return any(key in item.value for key in _THEIRS) or any(TARGET in section.value for section in sections)


def translate(item: LocatedValue, tell: Tell) -> LocatedValue:
    """The same with our keys, as far as it goes; `tell` gets a line for each key that is left out."""
    out = LocatedValue(item.place, {})
    for key, child in item.value.items():
        if isinstance(child.value, dict) and child.value:
            for name, value in child.value.items():
                _one(out, f"{key}.{name}", value, tell)
        else:
            _one(out, key, child, tell)
    return out


def _one(out: LocatedValue, key: str, item: LocatedValue, tell: Tell) -> None:
    section, _, name = key.partition(".")
    if name == TARGET:
        return _target(out, section, item, tell)
    if key == "dist_env.timeout_minutes" and isinstance(item.value, int):
        seconds = 60 * item.value
        return _put(out, "distributed.comm_timeout", replace(item, value=seconds, text=str(seconds)))
    if key in _SECRETS and "${" not in item.text:
        return tell(f"{item.place.label}: {key}: a secret does not belong into a file: export it, and write ${{NAME}}")
    if key in _MOVED:
        return _put(out, _MOVED[key], item)
    if section == "distributed" and name in {"tp_size", "cp_size"} and item.text.lower() in {"none", "null", ""}:
        return None
    why = _LEFT_OUT.get(key) or (_LEFT_OUT.get(section) if section in _THEIRS else None)
    if why is None:
        return _put(out, key, item)
    if item.text.lower() != _SILENT.get(key):
        tell(f"{item.place.label}: {key} is left out: {why}")
    return None


def _target(out: LocatedValue, section: str, item: LocatedValue, tell: Tell) -> None:
    """`_target_` names a class or function: what that says in our words."""
    name = str(item.value).rpartition(".")[2]
    plain = name.lower().removesuffix("manager")
    if section == "distributed" and plain in _STRATEGIES:
        _put(out, "distributed.strategy", replace(item, value=_STRATEGIES[plain], text=_STRATEGIES[plain]))
    elif section == "model" and name in {"from_pretrained", "from_config"}:
        how = "pretrained" if name == "from_pretrained" else "random"
        _put(out, "model.hf_init", replace(item, value=how, text=how))
    elif section == "model":
        _put(out, f"model.{TARGET}", item)
    elif section not in _THEIRS and not (section == "optimizer" and plain in {"adam", "adamw", "fusedadam"}):
        tell(f"{item.place.label}: {section}.{TARGET}: {item.value} is not known here")
    elif section in {"dataset", "validation_dataset"}:
        tell(f"{item.place.label}: {section}.{TARGET} is left out: {_LEFT_OUT[section]}")


def _put(out: LocatedValue, key: str, item: LocatedValue) -> None:
    *path, last = key.split(".")
    here = out.value
    for part in path:
        here = here.setdefault(part, LocatedValue(item.place, {})).value
    here[last] = item
