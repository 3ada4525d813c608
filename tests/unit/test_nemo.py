"""A config in NeMo AutoModel's manner: what carries over, and what is named as left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import ConfigError

TEXT = """
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler:
  global_batch_size: 64
  local_batch_size: 8
  ckpt_every_steps: 1000
  val_every_steps: 10
  num_epochs: 1
dist_env: {backend: nccl, timeout_minutes: 1}
rng: {_target_: nemo_automodel.components.training.rng.StatefulRNG, seed: 1111, ranked: true}
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: meta-llama/Llama-3.2-1B
  torch_dtype: bf16
checkpoint: {enabled: true, checkpoint_dir: /shared/checkpoints, model_save_format: safetensors, save_consolidated: true}
distributed:
  _target_: nemo_automodel.components.distributed.fsdp2.FSDP2Manager
  dp_size: none
  tp_size: 1
  cp_size: 1
  sequence_parallel: false
peft: {_target_: nemo_automodel.components._peft.lora.PeftConfig, dim: 8, alpha: 32, match_all_linear: true}
loss_fn: {_target_: nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy}
dataset: {_target_: nemo_automodel.components.datasets.llm.hellaswag.HellaSwag, path_or_dataset: rowan/hellaswag, split: train}
packed_sequence: {packed_sequence_size: 0}
dataloader: {_target_: torchdata.stateful_dataloader.StatefulDataLoader, shuffle: true}
optimizer: {_target_: torch.optim.Adam, betas: [0.9, 0.999], eps: 1e-8, lr: 1.0e-5, weight_decay: 0}
lr_scheduler: {lr_decay_style: cosine, min_lr: 1.0e-6}
wandb: {project: mine, entity: us, name: first, save_dir: /tmp/here}
slurm:
  job_name: tuning
  nodes: 2
  ntasks_per_node: 8
  time: 04:00:00
  account: a
  partition: batch
  container_image: nvcr.io/nvidia/nemo:dev
  hf_home: /shared/hf
  hf_token: hf_secret
  wandb_key: ${WANDB_API_KEY}
  extra_mounts: [/lustre]
"""


def load(directory: Path, text: str) -> tuple[Config, list[str]]:
    path, told = directory / "theirs.yaml", []
    path.write_text(text)
    return loader.load(path, user_file=None, tell=told.append), told


def test_what_means_the_same_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key")
    config, _ = load(tmp_path, TEXT)
    steps = config.step_scheduler
    assert (steps.global_batch_size, steps.local_batch_size, steps.ckpt_every_steps) == (64, 8, 1000)
    assert steps.lr_decay_style == "cosine"
    assert config.model.hf == "meta-llama/Llama-3.2-1B" and config.model.hf_init == "pretrained"
    assert (config.model.lora.rank, config.model.lora.alpha) == (8, 32)
    assert config.data.seed == 1111 and config.distributed.comm_timeout == 60
    assert config.distributed.strategy == "fsdp" and config.checkpoint.save_consolidated
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (1e-5, [0.9, 0.999], 0)
    assert (config.wandb.project, config.wandb.entity, config.wandb.name) == ("mine", "us", "first")
    slurm = config.slurm
    assert (slurm.job_name, slurm.nodes, slurm.ntasks_per_node, slurm.time) == ("tuning", "2", 8, "04:00:00")
    assert slurm.env == {"HF_HOME": "/shared/hf", "WANDB_API_KEY": "${WANDB_API_KEY}"}


def test_what_means_nothing_here_is_named_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key")
    _, told = load(tmp_path, TEXT)
    said = "\n".join(told)
    for key in (
        "recipe", "step_scheduler.num_epochs", "dist_env.backend", "rng.ranked", "model.torch_dtype", "peft.match_all_linear",
        "distributed.sequence_parallel", "dataset._target_", "dataset.split", "packed_sequence.packed_sequence_size",
        "dataloader.shuffle", "lr_scheduler.min_lr", "wandb.save_dir", "slurm.container_image", "slurm.hf_token",
        "slurm.extra_mounts",
    ):  # fmt: skip
        assert f": {key}" in said, key
    assert "hf_secret" not in said and "theirs.yaml:7: step_scheduler.num_epochs" not in said
    assert any(line.startswith(f"{tmp_path}/theirs.yaml:8: step_scheduler.num_epochs") for line in told)
    for quiet in ("checkpoint.enabled", "checkpoint.model_save_format", "distributed.dp_size", "optimizer._target_"):
        assert f": {quiet}" not in said


def test_what_is_wrong_is_wrong_in_such_a_file_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"theirs\.yaml:2: slurm\.nodse: unknown key; did you mean nodes"):
        load(tmp_path, "slurm:\n  nodse: 2\ndataset: {path: x}\n")
    _, told = load(tmp_path, "optimizer: {_target_: torch.optim.SGD}\n")
    assert "torch.optim.SGD is not known here" in told[0]


def test_our_own_files_are_not_touched(tmp_path: Path) -> None:
    assert load(tmp_path, "slurm: {nodes: 2}\n")[1] == []
