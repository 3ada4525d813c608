"""Time limits that depend on each other: what has to hold between them, and that a change which breaks it is found."""

from __future__ import annotations

import ast

import pytest

from raylaunch import timing
from raylaunch.cluster.head import allocation_policy, node_duty
from raylaunch.config.schema import Config

LIMITS = {name: value for name, value in vars(timing).items() if isinstance(value, float)}


def test_they_go_together() -> None:
    assert timing.broken(LIMITS) == []


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("PING_LIMIT", 2), ("PING_EVERY", 2), ("VERDICT", 0.5), ("TERM_LIMIT", 2), ("TERM_PATIENCE", 0.5), ("ENDING_LIMIT", 2),
        ("TELL_LIMIT", 2), ("TREE_LIMIT", 3), ("PATIENCE", 0.5), ("FOLLOW_LIMIT", 0.25), ("ASK_LIMIT", 2), ("SAVE_LIMIT", 0.5),
    ],
)  # fmt: skip
def test_a_change_of_one_alone_is_found(name: str, factor: float) -> None:
    """`factor`: by which somebody who knows nothing of the others changes it."""
    assert timing.broken({**LIMITS, name: LIMITS[name] * factor})


def test_no_limit_stands_here_alone() -> None:
    """One that nothing depends on belongs where it is used."""
    named = {node.id for text in timing.RELATIONS for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert named == set(LIMITS)


def test_slurm_s_notice_leaves_time_to_save_and_to_end() -> None:
    notice = float(Config().slurm.signal.partition("@")[2])
    assert allocation_policy.budget(0.0) <= notice


def test_down_waits_for_a_job_that_is_being_submitted() -> None:
    assert node_duty.TURN_LIMIT < timing.DOWN_LIMIT
