"""What `up` looks at on each node, beside what its agent needs anyway (canary, ports, temp directory, GPUs by number).
All of it takes milliseconds, but for the GPUs' driver, which is asked while Ray starts. A node that fails is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
from asyncio.subprocess import PIPE, STDOUT

from raylaunch.errors import BringUpError
from raylaunch.text import size

SHM_LEAST = 32 << 20
GPU_LIMIT = 30.0
"""Seconds for nvidia-smi to answer."""
FILES_LEAST, FILES_WANTED = 1024, 65536
SKEW = 5.0
"""Seconds that a node's clock may differ from the head's without a word. (Nothing here depends on clocks: it is no
reason to leave a node out, the more so as the head's may be the wrong one.)"""


def check_limits(node: str) -> None:
    """Raise the limit of open files as far as we may, and look at /dev/shm. BringUpError where Ray could not live."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
    if soft not in {resource.RLIM_INFINITY} and soft < wanted:  # Slurm hands on what the login shell had
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    enough(node, shutil.disk_usage("/dev/shm").free, max(soft, wanted) if soft != resource.RLIM_INFINITY else wanted)


def enough(node: str, shm: int, files: int) -> None:
    """BringUpError when shared memory (bytes) or open files are too few. Pure."""
    if shm < SHM_LEAST:
        raise BringUpError(
            f"/dev/shm on {node} has only {size(shm)} free",
            "Delete the files of dead jobs in it (`ls -l /dev/shm` on that node), or exclude the node with slurm.exclude.",
        )
    if files < FILES_LEAST:
        raise BringUpError(
            f"a process on {node} may open only {files} files",
            "Ask for a higher hard limit (ulimit -Hn), also on the login node: Slurm propagates it.",
        )


def clock(ahead: float) -> str:
    """What to say of a clock that is `ahead` seconds before the head's; "" when it is near enough."""
    return (
        ""
        if abs(ahead) <= SKEW
        else f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the head's"
    )


async def gpu_trouble(limit: float = GPU_LIMIT) -> str:
    """Why the GPUs of this node cannot be used, by nvidia-smi; "" when they answer, or where there is no nvidia-smi."""
    if await asyncio.to_thread(shutil.which, "nvidia-smi") is None:  # $PATH may lead to shared storage
        return ""
    process = await asyncio.create_subprocess_exec("nvidia-smi", "-L", stdout=PIPE, stderr=STDOUT)
    try:
        out, _ = await asyncio.wait_for(process.communicate(), limit)
    except TimeoutError:
        process.kill()
        with contextlib.suppress(TimeoutError):  # it may hang in the driver
            await asyncio.wait_for(process.wait(), 1.0)
        return f"nvidia-smi did not end within {limit:g} s"
    if process.returncode != 0:
        return f"nvidia-smi says: {' '.join(out.decode(errors='replace').split())[:300]}"
    return ""
