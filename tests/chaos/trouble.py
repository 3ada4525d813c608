"""Trainers that get into trouble: ours, with something done before a step. Named in a test's config."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import gate
import torch
from gate import before_each_step
from torch import Tensor

from raylaunch.config.schema import Config
from raylaunch.trainers import fsdp
from raylaunch.training.worker.session import Session

AT = 12
"""The step before which it happens: 11 are done, 10 are committed where every fifth is."""


def exit_once(config: Config, session: Session) -> None:
    """Rank 1 of the first attempt exits with 1, without a word."""

    def deed(session: Session, step: int) -> None:
        if (session.attempt, session.rank, step) == (1, 1, AT - 1):
            os._exit(1)

    before_each_step(config, session, deed)


def hang_once(config: Config, session: Session) -> None:
    """Rank 1 of the first attempt sleeps for ever before a collective."""

    def deed(session: Session, step: int) -> None:
        if (session.attempt, session.rank, step) == (1, 1, AT - 1):
            _sleeps_here()

    before_each_step(config, session, deed)


def _sleeps_here() -> None:
    time.sleep(10_000)


def broken(config: Config, session: Session) -> None:
    """A bug: the same error at the same step, each time."""

    def deed(session: Session, step: int) -> None:
        if step == AT - 1:
            raise ValueError("a bug in somebody's code")

    before_each_step(config, session, deed)


def grows(config: Config, session: Session) -> None:
    """Rank 1 of the first attempt takes memory until somebody stops it, once the gate is open."""

    def deed(session: Session, step: int) -> None:
        if (session.attempt, session.rank, step) == (1, 1, AT - 1):
            while step >= gate.allowed(session.run_dir):
                time.sleep(0.02)
            kept = []
            while True:
                kept.append(bytearray(b"x" * (16 << 20)))

    before_each_step(config, session, deed)


def not_a_number(config: Config, session: Session) -> None:
    """The loss of one batch is no number; that of all others is."""
    steps: list[int] = []
    plain: Callable[..., Tensor] = fsdp.summed_loss

    def summed_loss(*arguments: Any) -> Tensor:
        loss = plain(*arguments)
        return loss * torch.nan if steps[-1] == AT - 1 and session.rank == 0 else loss

    fsdp.summed_loss = summed_loss
    before_each_step(config, session, lambda session, step: steps.append(step))
