"""Modules and config keys that were called otherwise, where users' files or processes that outlive an upgrade still do.

An import of a former name gives the module itself: its classes exist once. `python -m` works, too: the scripts of
clusters that live, and agents that were started before the upgrade, start their processes by these names.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

_IN_CODE_OF_USERS = {
    "loop": "trainers.loop",
    "session": "training.worker.session",
    "trainers.average": "trainers.ema",
    "trainers.compiling": "trainers.compile",
    "trainers.context": "trainers.context_parallel",
    "trainers.corpus": "trainers.text_corpus",
    "trainers.data": "trainers.batches",
    "trainers.experts": "trainers.expert_parallel",
    "trainers.hf": "trainers.safetensors_io",
    "trainers.llama": "trainers.llama_weights",
    "trainers.metrics": "trainers.step_metrics",
    "trainers.model": "trainers.decoder",
    "trainers.own": "trainers.user_model",
    "trainers.pipeline": "trainers.pipeline_parallel",
    "trainers.pretrained": "trainers.transformers_model",
    "trainers.recompute": "trainers.activation_checkpointing",
    "trainers.snapshots": "trainers.memory_snapshot",
    "trainers.wrapped": "trainers.module_wrapper",
}
_IN_LIVING_PROCESSES = {
    "alerts.follow": "observe.alerts.sender",
    "checkpoint.process": "checkpoint.save_process",
    "driver": "training.driver",
    "export": "training.export",
    "keeper": "cluster.agent.supervisor",
    "metrics.serve": "observe.prometheus.exporter",
    "preflight.node": "tools.doctor.node_check",
    "pulse": "training.worker.heartbeat",
    "raystart": "cluster.agent.ray_start",
    "tracking.follow": "observe.trackers.uploader",
    "worker": "training.worker.main",
}
KEYS = {
    "elastic.backoff": "restart_backoff",
    "elastic.grow_after": "scale_up_delay",
    "elastic.hold_timeout": "min_nodes_timeout",
    "elastic.max_same_error": "max_identical_errors",
    "alerts.held_after": "below_min_after",
    "alerts.stall_least": "stall_min_seconds",
}
"""Config keys: a former one, with its section → its name now."""
_PACKAGES = {
    "alerts": "observe.alerts",
    "metrics": "observe.prometheus",
    "preflight": "tools.doctor",
    "tracking": "observe.trackers",
}
"""Their parents, which `python -m` imports first."""
NAMES = {
    f"raylaunch.{old}": f"raylaunch.{new}"
    for old, new in {**_IN_CODE_OF_USERS, **_IN_LIVING_PROCESSES, **_PACKAGES}.items()
}


def install() -> None:
    """Have `import` know them, after all that is found otherwise."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if fullname not in NAMES:
            return None
        now = importlib.util.find_spec(NAMES[fullname])
        assert now is not None
        return ModuleSpec(fullname, _Alias(now), origin=now.origin)


class _Alias(Loader):
    """Loads a module that has another name now."""

    def __init__(self, now: ModuleSpec) -> None:
        self._now = now

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return importlib.import_module(self._now.name)

    def exec_module(self, module: ModuleType) -> None:
        """It is imported already; that it has a second name does not become its own."""
        module.__spec__ = self._now

    def get_code(self, _fullname: str) -> CodeType | None:
        """For `python -m`."""
        loader = self._now.loader
        return loader.get_code(self._now.name) if loader is not None and hasattr(loader, "get_code") else None
