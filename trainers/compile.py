"""What torch.compile has made, kept in the run directory: an attempt after a fault, or on another node, does not
compile again.

A file for each time that rank 0 (or the first of a group) had something new, mostly one, which every worker reads once
(torch's own cache, a file a kernel, stays on each node). torch can add to what it has once given away, but reads only
the last part of that back (2.13): it is made to begin anew after each file.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.compiler._cache import CacheArtifactManager

from raylaunch.training.worker.session import Session

_COUNTED = {
    "inductor": ("fxgraph_cache_hit", "fxgraph_cache_miss"),
    "aot_autograd": ("autograd_cache_hit", "autograd_cache_miss"),
}


class Compiled:
    """RUN_DIR/compiled/KIND/*.bin; KIND: what the results depend on beside the code, as torch's keys do.

    `groups`: those that a block communicates in. The code holds their names, which differ from worker to worker and
    from size to size, and torch's own keys do not tell them apart (2.13: a worker was given code with a group that
    it is not in); with the names in the key, such code is kept and found for the workers of each group alone."""

    def __init__(
        self, session: Session, device: torch.device, groups: Sequence[dist.ProcessGroup], *, wanted: bool
    ) -> None:
        self._wanted = wanted
        self._writes = all(dist.get_rank(group) == 0 for group in groups) if groups else session.rank == 0
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        tag = " ".join(group.group_name for group in groups)
        self._directory = session.run_dir / "compiled" / _digest(f"{torch.__version__} {name} {tag}")
        self._asked = 0
        if wanted:
            torch.compiler.config.cache_key_tag = tag

    def load(self) -> None:
        """Before anything is compiled."""
        if self._wanted:
            for path in sorted(self._directory.glob("*.bin")):
                torch.compiler.load_cache_artifacts(path.read_bytes())
            CacheArtifactManager.clear()

    def keep(self) -> None:
        """After a step; writes what is new. (What was found in torch's cache may be another rank's work: it counts.)"""
        if not self._wanted or not self._writes or self._asked == (asked := _asked()):
            return
        self._asked = asked
        made = torch.compiler.save_cache_artifacts()
        if made is None:
            return
        data, info = made
        CacheArtifactManager.clear()
        keys = sorted((kind, sorted(keys)) for kind, keys in info.artifacts.items())
        path = self._directory / f"{_digest(str(keys))}.bin"
        if path.exists():
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".part-{os.getpid()}")
        part.write_bytes(data)
        part.replace(path)


def _asked() -> int:
    """How often this process has asked torch's cache for something."""
    return sum(counters[owner][key] for owner, keys in _COUNTED.items() for key in keys)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
