"""The cluster directory before there is a head: whether it is shared, whose turn it is to lead, where the head is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time

from raylaunch.cluster.agent.identity import NodeIdentity
from raylaunch.cluster.agent.retry import may_pass
from raylaunch.errors import BringUpError, StateError
from raylaunch.state import records
from raylaunch.state.records import Cluster, Head, IncarnationClaim
from raylaunch.timing import CANARY_PATIENCE

log = logging.getLogger("raylaunch.agent")
HEAD_PATIENCE = 300.0


def _cluster_if_shared(here: NodeIdentity) -> Cluster | None:
    """The cluster's record; None while the canary beside it is not the one that `up` wrote. Blocking."""
    with contextlib.suppress(OSError, StateError):
        if (here.directory / records.CANARY_FILE).read_text() == here.canary:
            return Cluster.read(here.directory)
    return None


async def check_canary(here: NodeIdentity) -> Cluster:
    """The cluster's record, once it is certain that this node sees the same directory as the others."""
    deadline = time.monotonic() + CANARY_PATIENCE
    while True:
        if (cluster := await asyncio.to_thread(_cluster_if_shared, here)) is not None:
            return cluster
        if time.monotonic() > deadline:
            raise StateError(
                f"the state directory is not shared: {here.directory} on {here.node} is not what `raylaunch up` wrote",
                "Set cluster.state_dir (or --state-dir) to a directory that all nodes and the login node share.",
            )
        await asyncio.sleep(0.2)


async def wait_for_head(here: NodeIdentity) -> Head:
    """The record of the head of this life and allocation. A look that fails is one that saw nothing."""
    deadline = time.monotonic() + HEAD_PATIENCE
    pause = 0.05
    while True:
        try:
            head = await asyncio.to_thread(Head.read, here.directory)
            if head is not None and not here.is_over(head):
                return head
            if await asyncio.to_thread((here.directory / records.ENDED_FILE).exists):
                raise BringUpError("the head could not start")
        except (StateError, OSError) as error:
            if not may_pass(error) or time.monotonic() > deadline:
                raise
            log.warning("cannot look for the head, retrying error=%r", str(error))
        if time.monotonic() > deadline:
            raise BringUpError(f"no head within {HEAD_PATIENCE:g} s", f"See {here.directory / records.LOGS}.")
        await asyncio.sleep(pause * random.uniform(0.7, 1.3))  # a thousand nodes should not ask in step
        pause = min(0.5, pause * 1.2)


def read_token(here: NodeIdentity) -> str:
    """The cluster's secret. Blocking."""
    try:
        return (here.directory / records.TOKEN_FILE).read_text().strip()
    except FileNotFoundError as error:
        raise BringUpError("the cluster has ended already") from error


def claim(here: NodeIdentity, number: int) -> bool:
    """Claim to begin this allocation as the head of that incarnation; False when somebody else has. Blocking.

    It may be repeated after a failure, with the same number. The claim that failed may have been made all the same: the
    storage's answer got lost, or the file beside it could not be removed. So one that is there may be ours, and nobody
    would ever lead if we took it for another's. Nobody else's has our node and allocation: that begins once, by its
    first node, where one agent comes after the other. (The next number would do as well, but not where the claim was
    not made: `records.is_fenced` wants no gaps.)
    """
    if records.claim(here.directory, number, here.node, here.allocation):
        return True
    made = IncarnationClaim.read(here.directory, number)
    return made is not None and (made.node, made.allocation) == (here.node, here.allocation)
