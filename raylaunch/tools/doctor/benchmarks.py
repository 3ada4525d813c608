"""The parts of a node check that need torch: the GPU test, and all-reduce with one partner node after the other.

    python -m raylaunch.tools.doctor.benchmarks    a process per GPU (or one per node), under `node_check`

It prints JSON lines: the result of its GPU, then `ready`; reads the schedule as one line; prints one line per pair. It
is a separate process because a broken GPU or network can hang it: `node_check` then kills it and keeps its output.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from raylaunch.errors import first_line
from raylaunch.host.processes import die_with_parent
from raylaunch.tools.doctor.mailbox import ROUND_LIMIT, PairResult, Schedule

BUSY = 2.0
"""Seconds of matmul: long enough for thermal or power throttling to start."""
PATTERN = 0x5A
LARGEST = {"nccl": 256 << 20, "gloo": 32 << 20}
STEPS = 3
"""Each may use a full time limit: connecting to the partner's store, the group's rendezvous, an all-reduce."""
MEASURED = 0.5
"""Approximate seconds of measured all-reduce."""


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def check_gpu(torch: Any) -> dict[str, Any]:
    """Fill most of the free memory and read it back, then multiply for BUSY seconds: the same matrices must give the
    same bits. Returns sizes in bytes and operations per second. Exceptions of torch are not caught."""
    device = torch.device("cuda", 0)
    free, total = torch.cuda.mem_get_info(device)
    found = {"name": torch.cuda.get_device_name(device), "memory": total, "taken": total - free}
    blocks = [torch.full((1 << 30,), PATTERN, dtype=torch.uint8, device=device) for _ in range(int(free * 0.9) >> 30)]
    # Not by comparing, which would need as much memory again.
    if any(int(extreme) != PATTERN for block in blocks for extreme in torch.aminmax(block)):
        return {**found, "error": "memory test failed: data read differs from data written"}
    del blocks
    torch.cuda.empty_cache()
    side = 8192 if total > 16 << 30 else 2048
    kind = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    first = a @ b
    torch.cuda.synchronize()
    say(busy=True)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < BUSY:
        for _ in range(8):
            again = a @ b
        torch.cuda.synchronize()
        done += 8
    took = time.perf_counter() - began
    if not torch.equal(first, again):
        return {**found, "error": "a repeated matrix multiplication gave a different result"}
    return {**found, "flops": 2 * side**3 * done / took}


def bus_bandwidth(dist: Any, torch: Any, device: Any, largest: int) -> float:
    """Bus bandwidth of an all-reduce in the current group in bytes/s: bytes/time · 2(n-1)/n, as in nccl-tests. The size
    is chosen so that an all-reduce takes about 50 ms. The result is the fastest quartile of several runs, so that other
    load on the CPUs does not count."""

    def once(buffer: Any) -> float:
        began = time.perf_counter()
        dist.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def slowest(seconds: float) -> float:
        """The maximum over all ranks, so that all use the same count."""
        value = torch.tensor([seconds], dtype=torch.float64, device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)

    size = dist.get_world_size()
    small = torch.zeros(1 << 18, device=device)
    once(small)
    took = slowest(min(once(small) for _ in range(3)))
    count = max(1 << 18, min(largest, int((1 << 20) * 0.05 / took))) // 4
    buffer = torch.zeros(count, device=device)
    took = slowest(once(buffer))
    times = sorted(once(buffer) for _ in range(max(3, min(20, int(MEASURED / took)))))
    return float(count * 4 / slowest(times[len(times) // 4]) * 2 * (size - 1) / size)


class Pairing:
    """Runs the pairs of this process, round by round."""

    def __init__(self, schedule: Schedule, index: int, local: int) -> None:
        self.schedule, self.index, self.local = schedule, index, local
        self.places = {place.index: place for place in schedule.nodes}
        self._began = time.monotonic()

    def run(self, dist: Any, torch: Any) -> Iterator[PairResult]:
        """Measure with one partner after the other; yields the result of each pair."""
        own = None
        if self.local == 0:
            place = self.places[self.index]
            listening = socket.create_server((place.address, place.store), backlog=1024)
            own = dist.TCPStore(place.address, listening.getsockname()[1], None, True, wait_for_workers=False,
                                master_listen_fd=listening.detach())  # fmt: skip
        for number, pairs in enumerate(self.schedule.rounds):
            pair = next((pair for pair in pairs if self.index in pair), None)
            if pair is not None:
                yield self._meet(dist, torch, number, pair, own)

    def _meet(self, dist: Any, torch: Any, number: int, pair: tuple[int, int], own: Any) -> PairResult:
        a, b = pair
        # In each earlier round, the partner may have waited for a node that is gone. So the end of a round is
        # counted from the start of the first one: a partner that is only late is still awaited.
        left = self._began + (number + 1) * ROUND_LIMIT - time.monotonic()
        limit = timedelta(seconds=max(1.0, left / STEPS))
        place, locals_ = self.places[a], self.schedule.locals
        device = torch.device("cuda", 0) if self.schedule.backend == "nccl" else torch.device("cpu")
        try:
            mine = own if own is not None and a == self.index else None
            store = mine or dist.TCPStore(place.address, place.store, None, False, timeout=limit)
            store.set_timeout(limit)
            dist.init_process_group(
                self.schedule.backend, store=dist.PrefixStore(f"{number}", store), timeout=limit,
                rank=(0 if self.index == a else locals_) + self.local, world_size=2 * locals_,
            )  # fmt: skip
            return PairResult(a=a, b=b, rate=bus_bandwidth(dist, torch, device, LARGEST[self.schedule.backend]))
        except (RuntimeError, OSError, ValueError) as error:  # torch.distributed's own are RuntimeErrors
            return PairResult(a=a, b=b, error=first_line(error)[:300])
        finally:
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                dist.destroy_process_group()


def _guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except (RuntimeError, AssertionError, OSError, ValueError) as error:  # CUDA's errors are RuntimeErrors
        return {"error": first_line(error)[:300]}


def main() -> None:
    die_with_parent()
    local = int(os.environ["RAYLAUNCH_PROBE_LOCAL"])
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        say(torch=first_line(error)[:300])
        return
    if os.environ.get("RAYLAUNCH_PROBE_GPU"):
        if torch.version.cuda is None and torch.version.hip is None:
            say(torch=f"version {torch.__version__} is built without CUDA, but this node has GPUs")
            return
        say(gpu={"local": local, **_guarded(lambda: check_gpu(torch))})
    say(ready=True)
    line = sys.stdin.readline()
    if not line:
        return
    orders = json.loads(line)
    for result in Pairing(Schedule.model_validate(orders["schedule"]), orders["index"], local).run(dist, torch):
        say(pair=result.model_dump())


if __name__ == "__main__":
    main()
