"""Models of one's own in the trainer's loop, moving averages, and what costs memory or time: each at any size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import own_models
import pytest
import torch
from attempts import Run, Workers, assert_same_curve
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader

from raylaunch.checkpoint import store
from raylaunch.config.schema import Config
from raylaunch.errors import RunError
from raylaunch.trainers import fsdp, safetensors_io

OWN = {"target": "own_models.Tied", "kwargs": {"width": 32, "vocab_size": 264, "layers": 2}}


def saved(run: Run, prefix: str) -> dict[str, torch.Tensor]:
    """The newest commit's tensors under that prefix, whole."""
    commit = store.latest(run.checkpoints)
    assert commit is not None
    reader = FileSystemReader(commit.path)
    metadata = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {n: torch.empty(m.size) for n, m in metadata.items() if n.startswith(prefix)}
    state_dict_loader.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


@pytest.mark.long
@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": "selective"}, {"activation_checkpointing": "full"}])
def test_a_model_of_ones_own_gives_the_same_curve_at_any_size(
    run: Run, tmp_path_factory: pytest.TempPathFactory, text: Path, workers: Workers, more: dict[str, str]
) -> None:
    alone = Run(tmp_path_factory.mktemp("alone"), text, workers)
    for one in (run, alone):
        one.config["model"] = OWN
    alone.train(1)
    run.config["distributed"] = dict(more)
    run.train(3, stop_at=5).train(2)
    assert_same_curve(run, alone)
    assert alone.metrics("loss")[10] < alone.metrics("loss")[1]


@pytest.mark.long
def test_documents_are_kept_apart_by_models_that_can(run: Run) -> None:
    run.config["model"] = OWN
    run.config["data"] |= {"document_mask": True}
    run.config["step_scheduler"] |= {"max_steps": 2}
    run.train(2)
    run.config["model"] = {"target": "own_models:Deaf"}
    with pytest.raises(RunError, match="has no parameter `documents`"):
        fsdp.check(Config.model_validate(run.config))
    run.config["data"] |= {"document_mask": False}
    assert any("264" in line or "69,696" in line for line in fsdp.check(Config.model_validate(run.config)))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"target": "own_models:Unset"}, "Unset has parameters .weight. and no reset_parameters"),
        ({"target": "own_models:none"}, "gave a str, no nn.Module"),
        ({"target": "own_models.Nothing"}, "own_models has no function Nothing"),
        ({"target": "nowhere:Model"}, "cannot import nowhere"),
        ({"target": "own_models:Tied", "kwargs": {"widht": 3}}, "unexpected keyword argument 'widht'"),
    ],
)
def test_what_is_no_model_is_said_before_it_trains(run: Run, model: dict[str, Any], said: str) -> None:
    run.config["model"] = model
    with pytest.raises(RunError, match=said):
        fsdp.check(Config.model_validate(run.config))


@pytest.mark.long
def test_a_model_of_ones_own_is_exported_for_itself(run: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run.config["model"] = OWN
    run.train(2)
    commit = store.latest(run.checkpoints)
    assert commit is not None
    safetensors_io.export(Config.model_validate(run.config), commit.path, tmp_path / "out")
    model = own_models.Tied(32, 264, 2)
    missing, unexpected = model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    assert missing == ["head.weight"] and not unexpected  # which is the embedding


@pytest.mark.long
def test_a_moving_average_is_what_its_definition_says_across_sizes_and_attempts(run: Run, straight: Run) -> None:
    """Checkpoints of every step give the parameters; the average is computed from them by hand."""
    decay = 0.7
    run.config["optimizer"] = {"lr": 3e-3, "ema": decay}
    run.config["step_scheduler"] |= {
        "ckpt_every_steps": 1,
        "max_steps": 1,
        "warmup_steps": 0,
        "lr_decay_style": "constant",
    }
    run.config["checkpoint"] = {"keep_last_n_checkpoints": 99}
    run.train(2)
    expected = saved(run, "ema.")
    for size, steps in ((3, 3), (1, 5), (2, 6)):
        for step in range(run.config["step_scheduler"]["max_steps"] + 1, steps + 1):
            run.config["step_scheduler"]["max_steps"] = step
            run.train(size)
            now = saved(run, "model.")
            expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
    found = saved(run, "ema.")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
        assert not torch.equal(tensor, now[name]) or "norm" in name


@pytest.mark.long
def test_averages_are_validated_and_exported(run: Run, straight: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run.config["optimizer"] = {"lr": 3e-3, "ema": 0.5}
    run.train(2)
    assert_same_curve(run, straight, rel=1e-6)  # validating the averages leaves the training as it is
    averaged = run.metrics("val_loss_ema")
    assert averaged.keys() == run.metrics("val_loss").keys() and averaged != run.metrics("val_loss")
    config = Config.model_validate(run.config)
    commit = store.latest(run.checkpoints)
    assert commit is not None
    safetensors_io.export(config, commit.path, tmp_path / "ema", ema=True)
    assert torch.equal(
        load_file(tmp_path / "ema" / "model.safetensors")["model.norm.weight"], saved(run, "ema.")["norm.weight"]
    )
    plain = store.latest(straight.checkpoints)
    assert plain is not None
    with pytest.raises(RunError, match="holds no moving average"):
        safetensors_io.export(config, plain.path, tmp_path / "none", ema=True)
    # A run of these averages' weights has their validation loss.
    safetensors_io.export(config, commit.path, tmp_path / "again", ema=True)
    shutil.rmtree(run.directory / "checkpoints")
    run.config["model"] = {"size": "tiny", "init_from": str(tmp_path / "again")}
    run.config["optimizer"] = {"lr": 1e-12, "weight_decay": 0.0}
    run.train(2)
    assert run.metrics("val_loss")[10] == pytest.approx(averaged[10], rel=1e-5)


@pytest.mark.long
def test_offloaded_parameters_give_the_same_curve(run: Run, straight: Run) -> None:
    run.config["distributed"] = {"cpu_offload": True}
    run.train(3)
    assert_same_curve(run, straight)


@pytest.mark.long
def test_float8_is_near_at_any_size(
    run: Run, straight: Run, tmp_path_factory: Any, text: Path, workers: Workers
) -> None:
    """Emulated here. A scale is of a whole tensor, so that sizes differ by rounding alone."""
    other = Run(tmp_path_factory.mktemp("other"), text, workers)
    for one in (run, other):
        one.config["distributed"] = {"float8": True}
    run.train(2)
    other.train(1)
    for key in ("loss", "val_loss"):
        assert run.metrics(key) == pytest.approx(straight.metrics(key), rel=0.02)
        assert run.metrics(key) == pytest.approx(other.metrics(key), rel=0.01)
    assert run.metrics("loss") != straight.metrics("loss")


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", ["full", "selective"])
def test_compiled_blocks_compute_again_what_they_are_told_to(run: Run, straight: Run, how: str) -> None:
    run.config["distributed"] = {"compile": True, "activation_checkpointing": how}
    run.train(2)
    assert_same_curve(run, straight)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_what_was_compiled_is_not_compiled_again(run: Run, straight: Run, tmp_path: Path) -> None:
    """The second attempt has an empty cache of torch's own, as on another node."""
    run.config["distributed"] = {"compile": True}
    run.config["step_scheduler"] |= {"val_every_steps": 2}
    run.train(2, stop_at=4, compile_cache=str(tmp_path / "one"))
    made = sorted((run.directory / "compiled").glob("*/*.bin"))
    assert len(made) == 2  # of training, and of validating
    run.train(2, compile_cache=str(tmp_path / "two"))
    assert run.metrics("loss") == pytest.approx(straight.metrics("loss"), rel=1e-4)
    first, second = (event["misses"] for event in run.events("compiled_for_test"))
    assert first > 0 and second == 0
    assert sorted((run.directory / "compiled").glob("*/*.bin")) == made


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("plan", [{"cp_size": 2}, {"pp_size": 2}, {"ep_size": 2}])
def test_compiled_plans_compute_what_they_do_without(
    run: Run, text: Path, workers: Workers, tmp_path_factory: pytest.TempPathFactory, plan: dict[str, int]
) -> None:
    plain = Run(tmp_path_factory.mktemp("plain"), text, workers)
    for one in (run, plain):
        one.config["distributed"] = dict(plan)
        one.config["model"] |= {"n_experts": 2} if "ep_size" in plan else {}
        one.config["step_scheduler"] |= {"max_steps": 4}
    run.config["distributed"]["compile"] = True
    run.train(2)
    assert_same_curve(run, plain.train(2))
