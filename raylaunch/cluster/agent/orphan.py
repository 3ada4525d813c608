"""The job whose head is dead: one survivor cancels it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Mapping

from raylaunch.cluster.agent.identity import NodeIdentity
from raylaunch.cluster.agent.retry import READ_LIMIT, retry_within
from raylaunch.errors import RaylaunchError
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.state.members import Members

log = logging.getLogger("raylaunch.agent")
CANCEL_LIMIT = 120.0


async def give_back_orphaned(here: NodeIdentity, terminated: asyncio.Event, env: Mapping[str, str]) -> None:
    """End a job whose head is dead: with `--no-kill` Slurm would keep its nodes until the wall time.

    One survivor does it, the next one half a second later if the first could not, and so on. A head
    that has written that we are lost has outlived us: then it is we who are cut off.
    """
    try:
        table = await retry_within(functools.partial(Members.read, here.directory), READ_LIMIT)
        row = table.node(here.node)
        disowned = row is not None and row.state == "lost"  # the head's last word on us
    except Exception as error:  # noqa: BLE001  whatever is wrong with it: the job would keep its nodes
        log.warning("members.json cannot be read error=%r", str(error))
        disowned = False
    if disowned:
        log.warning("the head has marked this node as lost: not cancelling the job")
        return
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(terminated.wait(), 0.5 * here.index)
        return
    try:
        await retry_within(functools.partial(Slurm().cancel, [env["SLURM_JOB_ID"]]), CANCEL_LIMIT)
    except (RaylaunchError, OSError) as error:
        log.error("the job could not be cancelled error=%r", str(error))
