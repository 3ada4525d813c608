"""What can be found wrong with a run before nodes are held for it: `raylaunch train CFG --check`.

The trainer's module is imported here, and asked by its `check(config)`, if it has one: lines that say what will
happen, or an error. Importing it brings torch with it, which the command line otherwise does without.
"""

from __future__ import annotations

import math

from raylaunch.config import secrets, user_code
from raylaunch.config.schema import Config
from raylaunch.errors import RunError
from raylaunch.state import runs
from raylaunch.training import policy


def check(config: Config) -> list[str]:
    """What will happen, a line each; the first thing that is wrong is raised."""
    config = runs.with_absolute_paths(config)
    runs.check_script(config.trainer)
    runs.check_trackers(config)
    secrets.resolved(config.alerts)
    user_code.function(config.trainer)
    own = getattr(user_code.module(config.trainer), "check", None)
    lines = list(own(config)) if callable(own) else []
    return [f"trainer: {config.trainer.script or config.trainer.function}", *_sizes(config), *lines]


def _sizes(config: Config) -> list[str]:
    steps, per_node = config.step_scheduler, config.slurm.ntasks_per_node
    if config.trainer.script is not None or per_node is None:
        return []
    model_parallel_size = config.distributed.model_parallel
    workers = policy.usable(config.slurm.max_nodes, per_node, model_parallel_size) * per_node // model_parallel_size
    if not workers:
        raise RunError(
            f"{config.slurm.max_nodes} nodes of {per_node} workers are fewer than distributed.tp_size * cp_size = "
            f"{model_parallel_size}",
            "Raise slurm.nodes, or change the plan.",
        )
    size = steps.global_batch_size or steps.local_batch_size * (steps.grad_acc_steps or 1) * workers
    share = math.ceil(size / workers)
    passes = math.ceil(share / steps.local_batch_size)
    who = "workers" if model_parallel_size == 1 else f"groups of {model_parallel_size} workers"
    return [f"batch: {size} samples a step; {workers} {who} take {share} each, in {passes} passes at most"]
