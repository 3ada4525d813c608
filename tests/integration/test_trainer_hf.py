"""Models and weights of others: Llamas in our decoder, any causal model of transformers in our loop, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import GLOBAL_BATCH_SIZE, Run, Workers, assert_same_curve
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.nn import functional as F

from raylaunch.checkpoint import store
from raylaunch.config.schema import Config
from raylaunch.errors import RunError
from raylaunch.state import files
from raylaunch.trainers import batches, datasets, fsdp, models, safetensors_io

pytestmark = pytest.mark.long


def a_llama(directory: Path, **changes: Any) -> Any:
    """A small model of `transformers`' own making, of the shape of `tiny`, saved there."""

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = {
        "vocab_size": 264, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))
    model.save_pretrained(directory, max_shard_size="100KB")
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_others_come_in_and_go_out_and_give_the_same_logits(run: Run, tmp_path: Path, tied: bool) -> None:

    from transformers import AutoModelForCausalLM

    theirs = a_llama(tmp_path / "llama", tie_word_embeddings=tied)
    run.config["model"]["init_from"] = str(tmp_path / "llama")
    run.config["optimizer"] = {"lr": 1e-12, "weight_decay": 0.0}
    run.config["step_scheduler"] |= {"max_steps": 2, "val_every_steps": 0}
    run.train(3)
    (commit,) = store.committed(run.checkpoints)
    written = safetensors_io.export(Config.model_validate(run.config), commit.path, tmp_path / "out")
    assert [path.name for path in written] == ["config.json", "model.safetensors"]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(0, 264, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(ours(tokens).logits, theirs(tokens).logits, atol=1e-6)
    assert run.metrics("loss")[1] != pytest.approx(5.576, abs=1e-3)  # not fresh ones


@pytest.mark.parametrize("plan", [{}, {"ep_size": 2}])
def test_a_mixtral_comes_in_and_goes_out_and_gives_the_same_logits(
    run: Run, tmp_path: Path, plan: dict[str, int]
) -> None:
    """Its experts are files' tensors each, and shards of one tensor here."""
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    theirs = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=264, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-5, rope_theta=10000.0,
            sliding_window=None, tie_word_embeddings=False,
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "mixtral", max_shard_size="100KB")
    run.config["model"] |= {"init_from": str(tmp_path / "mixtral"), "n_experts": 4}
    run.config["optimizer"] = {"lr": 1e-12, "weight_decay": 0.0}
    run.config["step_scheduler"] |= {"max_steps": 2, "val_every_steps": 0}
    run.config["distributed"] = dict(plan)
    run.train(4 if plan else 3)
    (commit,) = store.committed(run.checkpoints)
    safetensors_io.export(Config.model_validate(run.config), commit.path, tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(ours) is MixtralForCausalLM
    tokens = torch.randint(0, 264, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(ours(tokens).logits, theirs(tokens).logits, atol=1e-6)
    run.config["model"]["n_experts"] = 8
    with pytest.raises(RunError, match="do not match the shape of model: n_experts"):
        fsdp.check(Config.model_validate(run.config))


def test_a_trained_model_gives_the_same_loss_in_transformers(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(safetensors_io, "SHARD_BYTES", 100_000)
    config = Config.model_validate(run.config)
    run.train(2)
    commit = store.latest(run.checkpoints)
    assert commit is not None
    written = {path.name for path in safetensors_io.export(config, commit.path, tmp_path / "out")}
    assert len(written) > 3 and "model.safetensors.index.json" in written
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plan = batches.Plan(32, config.data.seed, GLOBAL_BATCH_SIZE, 2, 0, 1)
    total = count = 0.0
    for batch in batches.Loader(datasets.open_data(config, run.session()), plan, pin=False).validation(4):
        with torch.no_grad():
            logits = model(batch.inputs).logits
        total += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
        )
        count += batch.counted
    assert total / count == pytest.approx(run.metrics("val_loss")[10], rel=1e-5)


def test_weights_that_do_not_fit_say_what_would(run: Run, tmp_path: Path) -> None:
    a_llama(tmp_path / "wide", hidden_size=128)
    run.config["model"]["init_from"] = str(tmp_path / "wide")
    assert all("do not match the shape of model: dim" in error for error in run.attempt(2))
    (tmp_path / "wide" / "config.json").unlink()
    assert all("no config.json" in error for error in run.attempt(2))


def a_qwen(directory: Path) -> Path:
    """With tied embeddings, and norms of queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(2)
    config = Qwen3Config(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def val_loss(run: Run, model: Any) -> float:
    """What a model of transformers makes of the run's held-out samples."""
    config = Config.model_validate(run.config)
    total = count = 0.0
    plan = batches.Plan(32, config.data.seed, GLOBAL_BATCH_SIZE, 2, 0, 1)
    for batch in batches.Loader(datasets.open_data(config, run.session()), plan, pin=False).validation(4):
        with torch.no_grad():
            logits = model(batch.inputs).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"))
        count += batch.counted
    return total / count


def newest(run: Run) -> Path:
    commit = store.latest(run.checkpoints)
    assert commit is not None
    return commit.path


def test_a_model_of_transformers_is_the_same_at_any_size(run: Run, tmp_path: Path, workers: Workers) -> None:
    from transformers import AutoModelForCausalLM

    run.config["model"] = {"hf": str(a_qwen(tmp_path / "qwen"))}
    run.config["distributed"] = {"activation_checkpointing": "full"}
    other = Run(tmp_path / "other", tmp_path, workers)
    files.make_dir(other.directory)
    other.config = {**run.config, "distributed": {"strategy": "ddp"}}
    run.config["step_scheduler"]["warmup_steps"] = 4
    assert_same_curve(run.train(3, stop_at=5).train(2), other.train(1))
    assert run.metrics("loss")[1] > 5.4 and run.metrics("loss")[10] < run.metrics("loss")[1] - 0.1
    config = Config.model_validate(run.config)
    safetensors_io.export(config, newest(run), tmp_path / "out")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert val_loss(run, trained) == pytest.approx(run.metrics("val_loss")[10], rel=1e-5)


def test_a_model_of_transformers_begins_with_its_weights_or_fresh(run: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run.config["model"] = {"hf": str(a_qwen(tmp_path / "qwen"))}
    run.config["step_scheduler"] |= {"max_steps": 1, "val_every_steps": 1, "warmup_steps": 1}
    run.config["optimizer"] = {"lr": 1e-12}
    run.train(2)
    theirs = val_loss(run, AutoModelForCausalLM.from_pretrained(tmp_path / "qwen"))
    assert run.metrics("val_loss")[1] == pytest.approx(theirs, rel=1e-5)
    fresh = Run(tmp_path / "fresh", tmp_path, run._workers)
    files.make_dir(fresh.directory)
    fresh.config = {**run.config, "model": {**run.config["model"], "hf_init": "random"}}
    fresh.train(1)
    assert fresh.metrics("val_loss")[1] != pytest.approx(theirs, rel=1e-3)
    assert fresh.metrics("val_loss")[1] == pytest.approx(5.58, abs=0.2)


def test_adapters_alone_are_trained_and_saved(run: Run, tmp_path: Path, workers: Workers) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run.config["model"] = {"hf": str(a_qwen(tmp_path / "qwen")), "lora": {"rank": 4}}
    assert "of them trained" in fsdp.check(Config.model_validate(run.config))[0]
    other = Run(tmp_path / "other", tmp_path, workers)
    files.make_dir(other.directory)
    other.config = run.config
    assert_same_curve(run.train(2, stop_at=5).train(3), other.train(1))
    assert run.metrics("loss")[10] < run.metrics("loss")[1] - 0.05
    safetensors_io.export(Config.model_validate(run.config), newest(run), tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen")
    before = val_loss(run, base)
    after = val_loss(run, PeftModel.from_pretrained(base, str(tmp_path / "out")))
    assert after == pytest.approx(run.metrics("val_loss")[10], rel=1e-5) and after < before
    names = FileSystemReader(newest(run)).read_metadata().state_dict_metadata
    assert names and all("lora_" in name for name in names)


def test_documents_do_not_see_each_other_in_a_model_of_transformers(tmp_path: Path) -> None:
    config = Config.model_validate({"model": {"hf": str(a_qwen(tmp_path / "qwen"))}})
    model = models.make(config)
    torch.manual_seed(0)
    for parameter in model.to_empty(device="cpu").parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.settle(12, torch.device("cpu"))
    tokens = torch.randint(0, 264, (1, 12))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        both = model(tokens, documents)
        apart = torch.cat([model(tokens[:, :5]), model(tokens[:, 5:])], dim=1)
    assert torch.allclose(both, apart, atol=1e-5)


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no config of .*nothing"):
        fsdp.check(Config.model_validate({"model": {"hf": str(tmp_path / "nothing")}}))
    lora = {"hf": str(a_qwen(tmp_path / "qwen")), "lora": {"rank": 4, "target_modules": ["nope"]}}
    with pytest.raises(RunError, match=r"model\.lora: .*nope"):
        fsdp.check(Config.model_validate({"model": lora}))
