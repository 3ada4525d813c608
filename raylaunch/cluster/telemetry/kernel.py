"""What this node's kernel says that bears on the job: processes ended for memory, and GPUs' Xid errors.

From /dev/kmsg, where that may be read (root, or `kernel.dmesg_restrict=0`). The kernel is the machine's: of other
people's processes, and of this user's other jobs, nothing is told.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any

_OOM = re.compile(r"oom-kill:.*?task_memcg=(?P<cgroup>[^,]*),task=(?P<task>[^,]*),pid=(?P<pid>\d+),uid=(?P<uid>\d+)")
"""mm/oom_kill.c, dump_oom_summary (Linux 5.0 and later)."""
_XID = re.compile(r"NVRM: (?P<what>Xid \([^)]*\): .*)")
"""NVIDIA's driver; docs.nvidia.com/deploy/xid-errors."""
_RECORD = 8192


class KernelLog:
    """The kernel's words from now on; none where they may not be read."""

    def __init__(self, job: str, path: str = "/dev/kmsg") -> None:
        self._job, self._fd = job, -1
        with contextlib.suppress(OSError):
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._fd, 0, os.SEEK_END)

    def news(self) -> list[dict[str, Any]]:
        """Since the last call: events without their node."""
        found = []
        while self._fd >= 0:
            try:
                record = os.read(self._fd, _RECORD)
            except BrokenPipeError:  # some were overwritten before we read them
                continue
            except OSError:
                break
            if not record:
                break
            found += [event for line in record.decode(errors="replace").splitlines() if (event := self._event(line))]
        return found

    def _event(self, line: str) -> dict[str, Any] | None:
        if (oom := _OOM.search(line)) and int(oom["uid"]) == os.getuid() and self._may_be_ours(oom["cgroup"]):
            return {"kind": "oom_kill", "pid": int(oom["pid"]), "task": oom["task"]}
        if xid := _XID.search(line):
            return {"kind": "gpu_trouble", "what": xid["what"][:200]}
        return None

    def _may_be_ours(self, cgroup: str) -> bool:
        """Not another job's. (Slurm names a job's cgroup job_ID.)"""
        return "/job_" not in cgroup or not self._job or f"/job_{self._job}/" in f"{cgroup}/"
