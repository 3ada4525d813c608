"""Mixtures of experts: what they compute, and that it is the same wherever they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import Run, Workers, assert_same_curve
from torch import Tensor
from torch.nn import functional as F

from raylaunch.config.schema import ModelConfig
from raylaunch.trainers.expert_parallel import MixtureOfExperts


@pytest.fixture
def mixture() -> MixtureOfExperts:
    torch.manual_seed(0)
    made = MixtureOfExperts(ModelConfig(dim=16, ffn_dim=8, n_experts=4, n_experts_per_token=2))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def plainly(mixture: MixtureOfExperts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token, and the balance loss of each sequence, by the formulas."""
    experts, out, losses = mixture.experts, torch.zeros_like(x), []
    for row in range(x.shape[0]):
        load, mean = torch.zeros(4), torch.zeros(4)
        for at in range(x.shape[1]):
            token = x[row, at]
            scores = (mixture.router.weight @ token).softmax(0)
            best = scores.topk(2).indices
            for expert in best:
                hidden = F.silu(experts.gate[expert] @ token) * (experts.up[expert] @ token)
                out[row, at] = out[row, at] + scores[expert] / scores[best].sum() * (experts.down[expert] @ hidden)
                load[expert] += 1 / (2 * x.shape[1])
            mean = mean + scores / x.shape[1]
        losses.append(4 * (load * mean).sum())
    return out, torch.stack(losses)


def test_it_computes_what_the_formulas_say(mixture: MixtureOfExperts) -> None:
    x = torch.randn(3, 5, 16)
    real = torch.tensor([1.0, 1.0, 0.0])  # the last row is padding
    mixture.balance = 0.7
    aim = torch.randn(3, 5, 16)
    out = mixture(x, real)
    (out * aim).sum().backward()
    found = {name: parameter.grad for name, parameter in mixture.named_parameters()}
    mixture.zero_grad()
    expected, losses = plainly(mixture, x)
    ((expected * aim).sum() + 0.7 * losses[:2].sum()).backward()
    assert torch.allclose(out, expected, atol=1e-6)
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None and found[name] is not None
        assert torch.allclose(found[name], parameter.grad, atol=1e-5), name


@pytest.fixture(scope="module")
def straight_mixture(tmp_path_factory: pytest.TempPathFactory, text: Path, workers: Workers) -> Run:
    """One worker, with a balance loss that is felt."""
    return with_experts(Run(tmp_path_factory.mktemp("mixture"), text, workers)).train(1)


def with_experts(run: Run) -> Run:
    run.config["model"] |= {"n_experts": 4, "router_aux_loss": 0.5}
    return run


@pytest.mark.long
@pytest.mark.parametrize(
    ("plan", "world_size"),
    [({}, 3), ({"ep_size": 2, "activation_checkpointing": "full"}, 2), ({"ep_size": 4, "cp_size": 2}, 4)],
    ids=str,
)
def test_the_curve_is_the_same_wherever_they_are(
    run: Run, straight_mixture: Run, plan: dict[str, Any], world_size: int
) -> None:
    with_experts(run).config["distributed"] = plan
    assert_same_curve(run.train(world_size), straight_mixture)


@pytest.mark.long
def test_saved_under_one_plan_and_resumed_under_another(run: Run, straight_mixture: Run) -> None:
    with_experts(run).config["distributed"] = {"ep_size": 2, "strategy": "hsdp"}
    run.train(4, local_world_size=2, stop_at=5)
    run.config["distributed"] = {}
    assert_same_curve(run.train(3), straight_mixture)


@pytest.mark.long
def test_the_balance_loss_evens_the_load_out(run: Run, straight_mixture: Run) -> None:
    with_experts(run).config["model"]["router_aux_loss"] = 0.0
    assert run.train(1).metrics("loss") != straight_mixture.metrics("loss")
