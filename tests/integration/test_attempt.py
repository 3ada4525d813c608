"""What we use of Ray without its promise: a Ray version that lacks it has to be noticed here, before users do."""

from __future__ import annotations

import inspect

import ray
from ray._private.state import state
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api import config as v2
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raylaunch.training import attempt


def test_ray_train_is_the_second_version() -> None:
    assert issubclass(TorchTrainer, DataParallelTrainer)
    assert issubclass(attempt.Trainer, TorchTrainer)
    failures = inspect.signature(v2.FailureConfig).parameters
    assert {"max_failures", "controller_failure_limit"} <= failures.keys()
    assert "label_selector" in inspect.signature(v2.ScalingConfig).parameters


def test_a_trainer_shows_its_controller_to_a_method_that_we_replace() -> None:
    """`fit` hands it over on the main thread, and an abort kills it."""
    assert list(inspect.signature(TorchTrainer._register_sigint_handler).parameters) == ["self", "controller"]
    assert "_register_sigint_handler" in inspect.getsource(DataParallelTrainer)
    assert hasattr(TrainController, "run") and hasattr(ray, "kill")
    assert attempt.Trainer._register_sigint_handler is not TorchTrainer._register_sigint_handler


def test_the_callbacks_that_are_left_out_are_still_called_so() -> None:
    source = inspect.getsource(DataParallelTrainer._create_default_callbacks)
    for name in attempt._NOT_NEEDED:
        assert f"{name}(" in source, f"Ray Train makes no {name} any more: is there another in its place?"


def test_draining_nodes_and_placement_groups_can_be_asked_for() -> None:
    assert hasattr(state, "get_draining_nodes")
    assert hasattr(ray, "PlacementGroupID")
    assert list(inspect.signature(attempt.placement_group_table).parameters) == ["placement_group"]
