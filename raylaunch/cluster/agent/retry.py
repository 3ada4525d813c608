"""Work on storage and Slurm that may not answer for a moment, tried again."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from raylaunch.errors import RaylaunchError, StateError

log = logging.getLogger("raylaunch.agent")
T = TypeVar("T")
READ_LIMIT = 30.0
ONE_TRY, AGAIN_PAUSE = 10.0, 1.0
"""Seconds: see `retry_within` and `retry_storage`."""
WRONG_SETUP = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR})
"""What storage says that will say the same at the next try: a person has to hear of it."""


async def retry_within(work: Callable[[], T], limit: float) -> T:
    """Blocking work on what may not answer for a moment (storage, Slurm). A try that fails is repeated for `limit`
    seconds, then its error is raised. One that hangs is left to itself after that, or after ONE_TRY."""
    deadline = time.monotonic() + limit
    while True:
        try:
            return await asyncio.wait_for(asyncio.to_thread(work), max(ONE_TRY, deadline - time.monotonic()))
        except (RaylaunchError, OSError) as error:  # a TimeoutError is an OSError
            if time.monotonic() >= deadline:
                raise
            log.warning("attempt failed, retrying error=%r", str(error))
        await asyncio.sleep(AGAIN_PAUSE)


async def retry_storage(work: Callable[[], Awaitable[T]]) -> T:
    """Work on the cluster directory without which this node cannot begin. A storage that hiccups would end the cluster on
    its first node, and be a strike against any other, so a try that fails is repeated for READ_LIMIT, from the first
    failure on. Unlike with `retry_within`, one that hangs is waited for: a storage that stalls ends nobody, and a claim that
    was left to itself might be made later."""
    until = 0.0
    while True:
        try:
            return await work()
        except (RaylaunchError, OSError) as error:
            until = until or time.monotonic() + READ_LIMIT
            if not may_pass(error) or time.monotonic() >= until:
                raise
            log.warning("attempt failed, retrying error=%r", str(error))
        await asyncio.sleep(AGAIN_PAUSE)


def may_pass(error: RaylaunchError | OSError) -> bool:
    """Whether this is the storage's, and may be over at the next try."""
    cause = error.__cause__ or error
    if isinstance(cause, OSError):
        return cause.errno not in WRONG_SETUP
    return isinstance(error, StateError)  # a file that cannot be read as ours: NFS may show one half
