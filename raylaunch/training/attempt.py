"""One worker group of one size on chosen nodes, from its start to its end, through Ray Train.

Each worker is pinned to its node by Ray's own node id: Ray may still believe in a node that we know
to be dead. `abort` ends the group at once by ending Ray Train's controller, which owns it; Ray Train
itself would first wait for the answer of a dead worker. What the group had reserved is given back by
us: a placement group pinned to a dead node is rescheduled by Ray for ever, and keeps its places on
the others (seen: Ray Train's own cleaner comes too late, or not at all).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from raylaunch.state.records import WORKER_RESOURCE
from raylaunch.training.failure_cause import classify
from raylaunch.training.policy import AttemptOutcome
from raylaunch.training.worker import main
from raylaunch.training.worker_group import Newest, RayNode, WorkerGroupSpec

log = logging.getLogger("raylaunch.attempt")

NODE_LABEL = "ray.io/node-id"


class ConnectedRay:
    """The cluster's Ray, to which this process is connected (see `worker_group.Ray`)."""

    def __init__(self) -> None:
        self._newest = Newest()

    def alive(self) -> Mapping[str, RayNode]:
        rows: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        return self._newest.of(rows)

    def draining(self) -> frozenset[str]:
        """The nodes that Ray itself drains (`ray drain-node`)."""
        from ray._private.state import state  # no public way asks the GCS without the dashboard

        ids = set(state.get_draining_nodes())
        return frozenset(node.name for node in self.alive().values() if node.id in ids) if ids else frozenset()

    def group(self, order: WorkerGroupSpec) -> TrainerGroup:
        """With all places free: between two attempts nobody has any."""
        give_back()
        return TrainerGroup(_trainer(order))


class TrainerGroup:
    """One TorchTrainer (see `worker_group.Group`)."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def fit(self) -> AttemptOutcome | None:
        assert threading.current_thread() is threading.main_thread(), "fit shows its controller there only"
        try:
            self._trainer.fit()
        except (TrainingFailedError, RayError) as error:
            log.exception("attempt failed name=%s", self._trainer.run_config.name)
            return classify(error)
        return None

    def abort(self) -> None:
        self._trainer.abort()


_NOT_NEEDED = {"DatasetsCallback", "PlacementGroupCleanerCallback"}


class Trainer(TorchTrainer):
    """A TorchTrainer that can be ended from another thread."""

    _controller: Any = None
    _aborted = False

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray Train hands its controller to this method; SIGINT we leave alone."""
        self._controller = controller
        if self._aborted:
            self.abort()

    def _create_default_callbacks(self) -> list[Any]:
        """Without the two that start a process of their own for nothing here: Ray Data's (there are no
        datasets) and the cleaner of placement groups (`give_back` does that). Each costs the head seconds
        of imports in every recovery."""
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [c for c in callbacks if type(c).__name__ not in _NOT_NEEDED]

    def abort(self) -> None:
        """End the controller, and with it the workers and what they hold; `fit` then raises."""
        self._aborted = True
        if self._controller is None:  # not made yet
            return
        with contextlib.suppress(RayError, ValueError):  # it has ended already
            ray.kill(self._controller)
        give_back()


def give_back() -> None:
    """Free the places of every worker group; between two attempts there is none that may have any."""
    table: dict[str, dict[str, Any]] = placement_group_table()
    for hex_id, row in table.items():
        ours = any(WORKER_RESOURCE in bundle for bundle in row["bundles"].values())
        if ours and row["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(hex_id))))


if not hasattr(TorchTrainer, "_register_sigint_handler"):
    log.warning("this version of Ray does not expose its controller: a lost node is detected when Ray Train notices it")
if not hasattr(TorchTrainer, "_create_default_callbacks"):
    log.warning("this version of Ray does not expose its callbacks: it starts processes that are not needed")


def _trainer(order: WorkerGroupSpec) -> Trainer:
    """Each worker pinned to its node."""
    gpus = all(node.gpus for node in order.nodes)
    places = [{NODE_LABEL: node.id} for node in order.nodes for _ in range(order.workers_per_node)]
    return Trainer(
        main.main,
        train_loop_config={"spec": order.spec},
        torch_config=TorchConfig(backend=order.backend, timeout_s=order.comm_timeout),
        scaling_config=ScalingConfig(
            num_workers=len(places),
            use_gpu=gpus,
            resources_per_worker={WORKER_RESOURCE: 1, **({"GPU": 1} if gpus else {})},
            label_selector=places,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # the V1 class of that name
            name=order.name,
            storage_path=str(order.storage),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
