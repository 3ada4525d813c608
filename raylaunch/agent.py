"""The agent: the supervisor of one node, a task of the job's wide srun step (or a local process).

Flow: check that the cluster directory is the shared one → lease ports, make the temp directory →
the first node takes the head's duties and publishes where it is, the others wait for that and
connect → start Ray → report → watch Ray, the head and the signals → end everything that was started.
An agent ends its own process tree and nothing else; it saves nothing, least of all in a signal handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import hostlist

from raylaunch import configfile, hosts, layout, processes, raynode, state
from raylaunch.config import Config
from raylaunch.errors import BringUpError, RaylaunchError, StateError
from raylaunch.head import HeadDuties
from raylaunch.layout import Cluster, Head
from raylaunch.link import Link, Refused
from raylaunch.raynode import RayNode, RayProcess
from raylaunch.slurm import script as slurm_script
from raylaunch.slurm.client import Slurm

log = logging.getLogger("raylaunch.agent")

CANARY_PATIENCE = 10.0  # NFS shows a new file late
HEAD_PATIENCE = 300.0
CONNECT_PATIENCE = 20.0
RAY_PATIENCE = 120.0
RAY_TRIES = 3
RESTART_BACKOFF = 30.0
DASHBOARD_PATIENCE = 15.0


@dataclass(frozen=True)
class Here:
    """Who this agent is: its node, its place in the job, its cluster."""

    directory: Path
    canary: str
    node: str
    index: int
    peers: tuple[str, ...]
    local: bool

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Here:
        """From what the batch script, or the local backend, set."""
        directory, canary = Path(env["RAYLAUNCH_CLUSTER_DIR"]), env["RAYLAUNCH_CANARY"]
        if "RAYLAUNCH_LOCAL_INDEX" in env:
            index, count = int(env["RAYLAUNCH_LOCAL_INDEX"]), int(env["RAYLAUNCH_LOCAL_COUNT"])
            names = tuple(f"local{i + 1}" for i in range(count))
            return cls(directory, canary, names[index], index, names, local=True)
        nodes = tuple(hostlist.expand_hostlist(env["SLURM_JOB_NODELIST"]))
        return cls(directory, canary, hosts.node_name(env), int(env["SLURM_NODEID"]), nodes, local=False)

    @property
    def is_head(self) -> bool:
        return self.index == 0


async def check_canary(here: Here) -> Cluster:
    """The cluster's record, once it is certain that this node sees the same directory as the others."""
    deadline = time.monotonic() + CANARY_PATIENCE
    while True:
        with contextlib.suppress(OSError, StateError):
            cluster = Cluster.read(here.directory)
            if (here.directory / layout.CANARY_FILE).read_text() == here.canary and cluster is not None:
                return cluster
        if time.monotonic() > deadline:
            raise StateError(
                f"the state directory is not shared: {here.directory} on {here.node} is not what `raylaunch up` wrote",
                "Set cluster.state_dir (or --state-dir) to a directory that all nodes and the login node share.",
            )
        await asyncio.sleep(0.2)


async def wait_for_head(here: Here) -> Head:
    """The head's record of this life of the cluster."""
    deadline = time.monotonic() + HEAD_PATIENCE
    pause = 0.05
    while True:
        head = Head.read(here.directory)
        if head is not None and head.canary == here.canary:
            return head
        if (here.directory / layout.ENDED_FILE).exists():
            raise BringUpError("the head could not start")
        if time.monotonic() > deadline:
            raise BringUpError(f"no head within {HEAD_PATIENCE:g} s", f"See {here.directory / layout.LOGS}.")
        await asyncio.sleep(pause * random.uniform(0.7, 1.3))  # a thousand nodes should not ask in step
        pause = min(0.5, pause * 1.2)


class Agent:
    """The life of one node."""

    def __init__(self, here: Here, cluster: Cluster, config: Config) -> None:
        self.here, self.cluster, self.config = here, cluster, config
        self.token_file = here.directory / layout.TOKEN_FILE
        try:
            self.token = self.token_file.read_text().strip()
        except FileNotFoundError as error:
            raise BringUpError("the cluster has ended already") from error
        self.ray_log = here.directory / layout.LOGS / f"{here.node}-ray.log"
        self.temp = hosts.temp_dir(config.cluster.temp_dir, str(here.directory), here.index + 1 if here.local else None)
        peer = next((n for n in here.peers if n != here.node), None)
        self.address = f"127.0.0.{here.index + 2}" if here.local else hosts.address(peer, config.cluster.interface)
        # Without an own GPU request, what nvidia-smi lists on a shared node is other people's.
        asked = here.local or config.slurm.exclusive or slurm_script.gpus_per_node(config.slurm) > 0
        self.resources = hosts.resources(
            os.environ, len(here.peers) if here.local else 1, config.cluster.object_store_memory, look_for_gpus=asked
        )
        gpus, workers = len(self.resources.gpus), cluster.workers_per_node
        if gpus < workers and (gpus or (asked and not here.local and not config.slurm.exclusive)):
            raise BringUpError(
                f"{gpus} GPUs on {here.node} for {workers} workers",
                "Check the node's GPUs (nvidia-smi), slurm.gpus_per_node and slurm.ntasks_per_node.",
            )
        self.workers_cpus = max(1, self.resources.cpus // cluster.workers_per_node)
        self.lease = self._lease(skip=0)
        self.end = asyncio.Event()
        self.terminated = asyncio.Event()
        self.may_join = asyncio.Event()
        self.state = "starting"
        self.orphaned = False
        self.claimed = False
        self.reason = ""
        self.link: Link | None = None
        self.duties: HeadDuties | None = None

    @property
    def env(self) -> dict[str, str]:
        """The environment of what this agent starts."""
        interface = self.config.cluster.interface
        base = {"NCCL_SOCKET_IFNAME": interface, **os.environ} if interface else os.environ
        return raynode.environment(base, self.token_file, self.temp, self.address, self.lease.ports, self.workers_cpus)

    def _lease(self, skip: int) -> hosts.PortLease:
        return hosts.lease_ports(f"{os.getuid()} {self.here.directory} {self.here.node}", skip)

    def stop(self, reason: str) -> None:
        """Begin to end; the first reason counts."""
        if not self.end.is_set():
            self.reason = reason
            log.info("ending reason=%r", reason)
            self.end.set()

    async def live(self) -> None:
        """This node's part, until it is cancelled; raises what kept the node from starting."""
        hosts.claim_temp_dir(self.temp)
        self.claimed = True
        ray = await RayProcess.prepare(self.env, self.ray_log)
        if self.here.is_head:
            notice = float(self.config.slurm.signal.partition("@")[2])
            self.duties = HeadDuties(
                self.here.directory, self.cluster, self._as_head(), self.token, self.env, notice, self.stop
            )
            await self.duties.open()
        head = await wait_for_head(self.here)
        self.link = await self._connect(head)
        listener = asyncio.create_task(self._listen(self.link, head))
        try:
            await self._keep_ray(ray, head)
        finally:
            listener.cancel()

    def _as_head(self) -> Head:
        ports = self.lease.ports
        return Head(
            canary=self.cluster.canary, incarnation=self.cluster.incarnation, node=self.here.node,
            hostname=socket.gethostname(), address=self.address, control_port=ports.control,
            gcs=f"{self.address}:{ports.gcs}", dashboard_port=ports.dashboard, time=time.time(),
        )  # fmt: skip

    def info(self) -> dict[str, object]:
        """What the head should know of this node."""
        base = self.lease.ports.base
        return {
            "state": self.state, "address": self.address, "hostname": socket.gethostname(), "pid": os.getpid(),
            "ports": [base, base + hosts.PORT_BLOCK - 1], "temp_dir": str(self.temp),
            "resources": self.resources.as_dict(), "error": None,
        }  # fmt: skip

    async def _connect(self, head: Head) -> Link:
        """Connect to the head; its refusal is final, its silence is not at once."""
        deadline = time.monotonic() + CONNECT_PATIENCE
        while True:
            try:
                return await Link.connect(
                    head.address, head.control_port, self.token, head.incarnation, self.here.node, self.info()
                )
            except Refused as error:
                raise BringUpError(f"the head refused this node: {error}") from error
            except OSError as error:
                if time.monotonic() > deadline:
                    raise BringUpError(
                        f"cannot reach the head {head.node} at {head.address}:{head.control_port}: {error or 'time-out'}",
                        "Check the network between the nodes, or name the right one with cluster.interface.",
                    ) from error
                await asyncio.sleep(0.3)

    async def _listen(self, link: Link, head: Head) -> None:
        """Follow the head's orders; without a head there is nothing to live for (yet: elections come)."""
        while True:
            try:
                while (order := await link.orders()) != "end":
                    if order == "join":
                        self.may_join.set()
                self.stop("the head's order")
                return
            except (ConnectionError, OSError) as error:
                log.warning("connection to the head lost error=%r", str(error))
            try:
                link = self.link = await self._connect(head)  # a hiccup of the network is no end
                link.tell(state=self.state)
            except BringUpError as error:
                self.orphaned = True
                self.stop(f"the head is gone: {error.message}")
                return

    def _tell(self, now: str, **info: object) -> None:
        """Tell the head how this node stands."""
        self.state = now
        if self.link is not None:
            self.link.tell(state=now, **info)

    async def _keep_ray(self, ray: RayProcess, head: Head) -> None:
        """Start Ray, and start it again when it ends; the head's own is not replaceable in place."""
        failures, has_run = 0, False
        while True:
            node = RayNode(
                self.here.node, self.address, self.lease.ports, self.resources, self.temp,
                self.cluster.workers_per_node, None if self.here.is_head else head.gcs,
            )  # fmt: skip
            if not self.here.is_head:
                # Ray itself would ask for its head, and when it is not there yet, sleep for seconds.
                await self.may_join.wait()
            await ray.begin(node)
            began = time.monotonic()
            if await self._has_started(ray):
                log.info("ray started seconds=%.2f ports=%d-%d", time.monotonic() - began, *self.info()["ports"])  # type: ignore[misc]
                self._tell("ready", error=None)
                has_run = True
                if self.duties is not None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self.duties.enough.wait(), DASHBOARD_PATIENCE)
                    ray.start_dashboard()
                status = await ray.exited()
                words = ray.own_words(self.temp)
                if time.monotonic() - began > 10 * RESTART_BACKOFF:
                    failures = 0
            else:
                words = ray.own_words(self.temp)
                status = await self._give_up(ray)
            failures += 1
            log.warning("ray ended status=%s failures=%d words=%r", status, failures, words)
            if (self.here.is_head and has_run) or (not has_run and failures >= RAY_TRIES):
                raise BringUpError(f"Ray on {self.here.node} ended ({raynode.described(status)}): {words}")
            self._tell("restarting", error=words)
            await asyncio.sleep(min(RESTART_BACKOFF, 0.5 * 2 ** (failures - 1)))
            await asyncio.to_thread(self._fresh_ground, has_run, failures)
            self._tell("restarting", ports=self.info()["ports"])
            ray = await RayProcess.prepare(self.env, self.ray_log)

    def _fresh_ground(self, has_run: bool, failures: int) -> None:
        """What the next start needs: nothing left of the last one, and other ports if these may be why."""
        processes.end_tree(os.getpid(), keep_root=True)
        hosts.claim_temp_dir(self.temp)
        if not has_run and not self.here.is_head:  # the head's ports are published already
            self.lease.close()
            self.lease = self._lease(skip=failures)

    async def _has_started(self, ray: RayProcess) -> bool:
        """Whether Ray came up: it says so, ends, or is out of time."""
        started, exited = asyncio.create_task(ray.started.wait()), asyncio.create_task(ray.exited())
        await asyncio.wait({started, exited}, timeout=RAY_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        exited.cancel()
        return ray.started.is_set()

    async def _give_up(self, ray: RayProcess) -> int:
        """End a Ray that did not start, and say with what status."""
        await asyncio.to_thread(processes.end_tree, ray.pid)
        return await ray.exited()

    async def close(self) -> None:
        """End everything of ours on this node, and tell the head whether that worked."""
        if self.duties is not None:
            try:
                await self.duties.close()
            except (RaylaunchError, OSError) as error:  # a full disk must not keep processes alive
                log.error("the head could not end in order error=%r", str(error))
        left = await asyncio.to_thread(processes.end_tree, os.getpid(), True)
        if self.claimed:  # else it may be somebody else's
            shutil.rmtree(self.temp, ignore_errors=True)
            left += self.temp.exists()
        if self.link is not None:
            self.link.tell(state="ended", left=left)
            self.link.close()
        if self.duties is not None:
            try:
                self.duties.write_end(self.reason, left)
            except (RaylaunchError, OSError) as error:
                log.error("the end could not be written error=%r", str(error))
        self.lease.close()
        log.info("ended reason=%r left=%d", self.reason, left)


async def give_back_orphaned(here: Here, terminated: asyncio.Event, env: Mapping[str, str]) -> None:
    """End a job whose head is dead: with `--no-kill` Slurm would keep its nodes until the wall time.

    One survivor does it, the next one half a second later if the first could not, and so on. A head
    that has written that we are lost has outlived us: then it is we who are cut off.
    """
    table = state.read_json(here.directory / layout.MEMBERS_FILE) or {"nodes": []}
    if any(row["name"] == here.node and row["state"] == "lost" for row in table["nodes"]):
        log.warning("the head holds this node for lost: leaving quietly")
        return
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(terminated.wait(), 0.5 * here.index)
        return
    try:
        await asyncio.to_thread(Slurm().cancel, [env["SLURM_JOB_ID"]])
    except RaylaunchError as error:
        log.error("the job could not be given back error=%r", str(error))


async def supervise(here: Here) -> int:
    """One agent from its first check to its last; the exit code."""
    agent: Agent | None = None
    failure: Exception | None = None
    try:
        cluster = await check_canary(here)
        _log_to(here.directory / layout.LOGS / f"{here.node}.log")
        config = configfile.load_resolved(here.directory / layout.CONFIG_FILE)
        agent = Agent(here, cluster, config)
        _handle_signals(agent)
        work, end = asyncio.create_task(agent.live()), asyncio.create_task(agent.end.wait())
        await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
        end.cancel()
        results = await asyncio.gather(work, end, return_exceptions=True)
        if isinstance(results[0], Exception):  # a CancelledError is not one
            failure = results[0]
    except (RaylaunchError, OSError) as error:
        failure = error
    if failure is not None:
        if agent is not None and agent.duties is not None:
            agent.duties.exit_code = 1
        _report(here, agent, failure)
    if agent is not None:
        await agent.close()
        if agent.orphaned and not here.local:
            await give_back_orphaned(here, agent.terminated, os.environ)
        if failure is None:
            return agent.duties.exit_code if agent.duties else 0
    return 1


def _report(here: Here, agent: Agent | None, failure: Exception) -> None:
    """Say why this node cannot go on: to the head, in the cluster directory, and in the job's output."""
    text = (
        " ".join(str(failure).split())
        if isinstance(failure, RaylaunchError)
        else f"{type(failure).__name__}: {failure}"
    )
    log.error("failed error=%r", text, exc_info=None if isinstance(failure, RaylaunchError) else failure)
    print(f"{layout.FAILED_LINE} {here.node}: {text}", flush=True)
    with contextlib.suppress(StateError):  # a directory that is not shared cannot take it: the line above does
        state.write_json(here.directory / layout.NODES / f"{here.node}.json", {"node": here.node, "error": text})
        if here.is_head and (agent is None or agent.duties is None):  # nobody else will say that it is over
            layout.write_end(here.directory, here.canary, text, {}, [], exit_code=1)
    if agent is not None:
        agent.stop(text)
        if agent.link is not None:
            agent.link.tell(state="failed", error=text)


def _handle_signals(agent: Agent) -> None:
    """SIGTERM and SIGINT end the node; SIGUSR1 is Slurm's notice that time runs out."""
    loop = asyncio.get_running_loop()

    def terminate(name: str) -> None:
        agent.terminated.set()
        agent.stop(f"signal {name}")

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, terminate, number.name)

    def out_of_time() -> None:
        if agent.duties is not None:
            agent.duties.out_of_time()

    loop.add_signal_handler(signal.SIGUSR1, out_of_time)


def _log_to(path: Path) -> None:
    logging.basicConfig(
        filename=path, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
    )


def main() -> int:
    """Entry point of `python -m raylaunch.agent`."""
    processes.become_subreaper()
    os.umask(0o077)
    return asyncio.run(supervise(Here.from_environment(os.environ)))


if __name__ == "__main__":
    sys.exit(main())
