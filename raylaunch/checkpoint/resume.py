"""Going on from the newest commit that verifies, if it belongs to the same order of samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from raylaunch.checkpoint import saver
from raylaunch.checkpoint.events import Resumed
from raylaunch.checkpoint.rank import Rank
from raylaunch.errors import RunError


def resume(session: Rank, group: dist.ProcessGroup, state: Callable[[], dict[str, Any]], facts: dict[str, int]) -> int:
    """Load the newest commit that verifies into `state()`, which is asked for only when there is one; the number of
    steps done so far (0: nothing to load).

    `facts`: what must not change over a run's life, or a step would no longer name the same samples."""
    started = time.monotonic()
    commit = saver.newest(session, group)
    verified = time.monotonic()
    if commit is None:
        return 0
    saved = commit.facts
    changed = [f"{key}: {saved.get(key)} → {now}" for key, now in facts.items() if saved.get(key) != now]
    if changed:
        raise RunError(
            f"the checkpoint {commit.path} was written with different data settings ({', '.join(changed)})",
            "Restore these settings and the data, or use another run name.",
        )
    saver.load(commit, state(), group)
    seconds = {"verifying": round(verified - started, 3), "loading": round(time.monotonic() - verified, 3)}
    session.record(Resumed(commit.step, round(time.monotonic() - started, 3), seconds))
    return commit.step
