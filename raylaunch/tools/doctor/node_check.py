"""The check of one node: `python -m raylaunch.tools.doctor.node_check`, a task of the job that `raylaunch doctor --nodes` submits,
or a local process. It announces itself, connects to its peers, checks its GPUs, and measures the bandwidth with one
partner after the other (see `mailbox`). torch runs in separate processes (`benchmarks`), which are killed if they hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raylaunch.cluster.agent.identity import NodeIdentity
from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import RaylaunchError, SlurmError, SlurmUnavailable, StateError
from raylaunch.host import processes
from raylaunch.host.network import interface_of, own_address
from raylaunch.host.ports import Ports, lease_ports
from raylaunch.host.resources import find_resources
from raylaunch.scheduler.slurm import batch_script
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.state import records
from raylaunch.tools.doctor import clock_server, gpu_status, machine_facts, mailbox, pairwise
from raylaunch.tools.doctor.mailbox import Checked, GpuCheck, Hello, PairResult, Pairs, PeerList, Schedule

CANARY_PATIENCE = 10.0


def await_canary(here: NodeIdentity) -> None:
    """Wait until this node can read the file that the login node wrote."""
    deadline = time.monotonic() + CANARY_PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if (here.directory / mailbox.CANARY).read_text() == here.canary:
                return
        if time.monotonic() > deadline:
            raise StateError(f"the state directory is not shared: {here.directory} lacks the file of the login node")
        time.sleep(mailbox.POLL)


@dataclass
class Probes:
    """The processes that use torch, and their output."""

    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    _lines: queue.SimpleQueue[tuple[int, dict[str, Any] | None]] = field(default_factory=queue.SimpleQueue)

    @classmethod
    def start(cls, visible: tuple[str, ...], env: Mapping[str, str]) -> Probes:
        """Start one process per GPU, or one if there are no GPUs."""
        probes = cls()
        for local, gpu in enumerate(visible or ("",)):
            own = {"RAYLAUNCH_PROBE_LOCAL": str(local)}
            own |= {"CUDA_VISIBLE_DEVICES": gpu, "RAYLAUNCH_PROBE_GPU": "1"} if gpu else {}
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "raylaunch.tools.doctor.benchmarks"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**env, **own}, text=True,
            )  # fmt: skip
            probes.processes.append(process)
            threading.Thread(target=probes._listen, args=(local, process), daemon=True).start()
        return probes

    def _listen(self, local: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):  # the rest is what torch prints
                with contextlib.suppress(ValueError):
                    self._lines.put((local, json.loads(line)))
        self._lines.put((local, None))

    def said(self, deadline: float) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Yields (process, line) until the deadline; the line is None if the process ended."""
        while True:
            try:
                yield self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return

    def tell(self, line: str) -> None:
        for process in self.processes:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.write(line + "\n")
                process.stdin.flush()

    def end(self) -> None:
        for process in self.processes:
            process.kill()  # not waited for: a sick GPU may hold it in the kernel


def wants_gpus(config: Config) -> bool:
    """Whether the job has GPUs. Without a request, GPUs listed by nvidia-smi may belong to other jobs."""
    return config.slurm.exclusive or batch_script.gpus_per_node(config.slurm) > 0


def hello(here: NodeIdentity, config: Config, ports: Ports) -> Hello:
    """The first message of this node; `error` if it cannot take part."""
    peer = next((n for n in here.peers if n != here.node), None)
    error = ""
    try:
        address = f"127.0.0.{here.index + 2}" if here.local else own_address(peer, config.cluster.interface)
    except RaylaunchError as wrong:
        address, error = "", wrong.message
    own = find_resources(
        os.environ, len(here.peers) if here.local else 1, config.cluster.object_store_memory,
        look_for_gpus=wants_gpus(config),
    )  # fmt: skip
    key = str(here.directory.parent)  # as long as a cluster's own
    return Hello(
        index=here.index, node=here.node, address=address, interface=interface_of(address) or "" if address else "",
        port=ports.control, store=ports.spare[0], time=time.time(), error=error,
        facts=machine_facts.gather(config.cluster.temp_dir, key, os.environ, str(here.index + 1) if here.local else None),
        cpus=own.cpus, memory=own.memory, object_store=own.object_store, gpus=own.gpus,
        submit=_submits(here, config) if here.index == 0 and not here.local else None,
    )  # fmt: skip


def _submits(here: NodeIdentity, config: Config) -> str | None:
    """Why this node cannot submit jobs; "" if it can, None if Slurm does not respond."""
    try:
        Slurm().check(batch_script.render(config.slurm, "doctor", here.directory, here.canary))
    except SlurmUnavailable as error:
        return None if not isinstance(error.__cause__, OSError) else "sbatch is not installed"
    except SlurmError as error:
        return " ".join(error.message.split())
    return ""


def checked(here: NodeIdentity, roster: PeerList, probes: Probes, visible: int) -> Checked:
    """Connect to the first node and to the partners of all rounds, and collect the results of the GPU tests."""
    began = time.time()
    order = [place.index for place in roster.nodes]
    mine = order.index(here.index)
    rounds = pairwise.rounds(len(order), mailbox.PARTNERS)
    wanted = {0, *(p for p in pairwise.partners(mine, rounds) if p is not None)} - {mine}
    reached = clock_server.ask_all([roster.nodes[i] for i in sorted(wanted)], here.canary)
    found: dict[int, GpuCheck] = {}
    waiting = set(range(len(probes.processes)))
    torch, smi = "", None
    for local, line in probes.said(time.monotonic() + mailbox.GPU_LIMIT):
        if line is None or "ready" in line:
            waiting.discard(local)
            torch = torch or ("" if line else "the test process ended without output")
        elif "torch" in line:
            torch = str(line["torch"])
        elif "busy" in line and smi is None:  # under load, so that throttling shows
            smi = gpu_status.ask()
        elif "gpu" in line:
            found[local] = GpuCheck.model_validate(line["gpu"])
        if not waiting:
            break
    silent = f"no answer within {mailbox.GPU_LIMIT:g} s"
    if not visible:
        torch = silent if waiting else torch
    elif not torch:
        found = {local: found.get(local, GpuCheck(local=local, error=silent)) for local in range(visible)}
        smi = smi or gpu_status.ask()
    rows = tuple(found[local] for local in sorted(found))
    return Checked(index=here.index, time=began, reached=reached, gpus=rows, smi=smi or gpu_status.Smi(), torch=torch)


def paired(here: NodeIdentity, schedule: Schedule, probes: Probes) -> Pairs:
    """Measure with one partner after the other; returns the results until the end of the last round."""
    mine = sum(here.index in pair for one in schedule.rounds for pair in one)
    if not mine:
        return Pairs(index=here.index)
    for process in probes.processes[schedule.locals :]:
        process.kill()
    probes.tell(json.dumps({"schedule": schedule.model_dump(), "index": here.index}))
    results: list[PairResult] = []
    error = ""
    for local, line in probes.said(time.monotonic() + (len(schedule.rounds) + 1) * mailbox.ROUND_LIMIT):
        if local == 0 and line is None:
            error = "the test process ended"
            break
        if local == 0 and line is not None and "pair" in line:
            results.append(PairResult.model_validate(line["pair"]))
        if len(results) == mine:
            break
    else:
        error = "time limit reached"
    return Pairs(index=here.index, results=tuple(results), error=error)


def check(here: NodeIdentity) -> None:
    """Run all checks in order; StateError if the command line is gone."""
    await_canary(here)
    config = loader.load_resolved(here.directory / mailbox.CONFIG)
    lease = lease_ports()
    said = hello(here, config, lease.ports)
    if said.error:
        mailbox.write(mailbox.file(here.directory, here.index, "hello"), said)
        return
    server = clock_server.serve(said.address, said.port, here.canary)
    network = {"GLOO_SOCKET_IFNAME": said.interface} if said.interface else {}
    network |= {"NCCL_SOCKET_IFNAME": config.cluster.interface} if config.cluster.interface else {}
    threads = str(max(1, said.cpus // max(1, len(said.gpus))))
    # With blocking waits a time-out is an exception of ours to report, not an abort by NCCL's watchdog.
    own = {"OMP_NUM_THREADS": threads, "TORCH_NCCL_BLOCKING_WAIT": "1", **network, **os.environ}
    probes = Probes.start(said.gpus, own)
    try:
        mailbox.write(mailbox.file(here.directory, here.index, "hello"), said)
        roster = mailbox.wait(here.directory / mailbox.ROSTER, PeerList, mailbox.ORDERS_LIMIT)
        if here.index not in {place.index for place in roster.nodes}:
            return
        mailbox.write(
            mailbox.file(here.directory, here.index, "checked"), checked(here, roster, probes, len(said.gpus))
        )
        schedule = mailbox.wait(here.directory / mailbox.SCHEDULE, Schedule, mailbox.ORDERS_LIMIT)
        mailbox.write(mailbox.file(here.directory, here.index, "pairs"), paired(here, schedule, probes))
    finally:
        probes.end()
        server.shutdown()
        lease.close()


def main() -> int:
    processes.become_subreaper()
    here = NodeIdentity.from_environment(os.environ)
    code = 0
    try:
        check(here)
    except (RaylaunchError, OSError) as error:
        text = error.message if isinstance(error, RaylaunchError) else f"{type(error).__name__}: {error}"
        print(f"{records.FAILED_LINE} {here.node}: {' '.join(text.split())}", flush=True)
        code = 1
    processes.end_tree(os.getpid(), keep_root=True, limit=2.0)
    return code


if __name__ == "__main__":
    sys.exit(main())
