"""The agent: the supervisor of one node, a task of the job's wide srun step (or a local process).

Flow: check that the cluster directory is the shared one → lease ports, make the temp directory →
the first node takes the head's duties and publishes where it is, the others wait for that and
connect → start Ray → report → watch Ray, the head and the signals → end everything that was started.
A lost head is looked for (`head_search`); under a newer one, Ray starts afresh. To stop being the head, an
agent ends with AGAIN, and its keeper starts another one.
An agent ends its own process tree and nothing else; it saves nothing, least of all in a signal handler.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from dataclasses import asdict

from raylaunch.cluster.agent import ray_process, self_check
from raylaunch.cluster.agent.cluster_files import claim, wait_for_head
from raylaunch.cluster.agent.identity import NodeIdentity
from raylaunch.cluster.agent.node_setup import NodeSetup
from raylaunch.cluster.agent.ray_keeper import RayKeeper
from raylaunch.cluster.agent.ray_process import RayProcess
from raylaunch.cluster.agent.retry import retry_storage
from raylaunch.cluster.head import HeadController
from raylaunch.cluster.head.context import Replaced
from raylaunch.cluster.membership.control_channel import AlreadyHere, Closed, ControlClient, ControlServer, Refused
from raylaunch.cluster.membership.head_search import HeadSearch
from raylaunch.cluster.telemetry import sample
from raylaunch.config.schema import Config
from raylaunch.errors import BringUpError, RaylaunchError
from raylaunch.host import processes
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.state import records
from raylaunch.state.members import NodeInfo
from raylaunch.state.records import Cluster, Head
from raylaunch.timing import ALREADY_LIMIT, COMPANY_PATIENCE, CONNECT_PATIENCE

log = logging.getLogger("raylaunch.agent")
AGAIN = 75
"""The exit code that asks the keeper for another agent: this one was the head, and is no more."""


class Agent:
    """The life of one node.

    Its event loop answers pings, so no file work on shared storage is done in it: a storage that stalls must not look
    like a dead node. (tests/unit/test_event_loops.py looks for it.)
    """

    def __init__(self, here: NodeIdentity, cluster: Cluster, config: Config, setup: NodeSetup) -> None:
        self.here, self.cluster, self.config = here, cluster, config
        self.token, self.temp, self.address = setup.token, setup.temp, setup.address
        self.resources, self.lease = setup.resources, setup.lease
        self.token_file = here.directory / records.TOKEN_FILE
        self.ray_log = here.directory / records.LOGS / f"{here.node}-ray.log"
        self.workers_cpus = max(1, self.resources.cpus // cluster.workers_per_node)
        self.control_port = self.lease.ports.control
        self.end = asyncio.Event()
        self.terminated = asyncio.Event()
        self.may_join = asyncio.Event()
        self.state = "starting"
        self.error: str | None = None
        self.warning = ""
        self.left: int | None = None
        self.orphaned = self.again = False
        self.reason = ""
        self.link: ControlClient | None = None
        self.duties: HeadController | None = None
        self.members = ControlServer(self.token, lambda: "lost" if self.link is None else "sees")
        self.keeper = RayKeeper(self)

    @property
    def env(self) -> dict[str, str]:
        """The environment of what this agent starts."""
        interface = self.config.cluster.interface
        base = {"NCCL_SOCKET_IFNAME": interface, **os.environ} if interface else os.environ
        return ray_process.environment(
            base, self.token_file, self.temp.path, self.address, self.lease.ports, self.workers_cpus
        )

    def stop(self, reason: str) -> None:
        """Begin to end; the first reason counts."""
        if not self.end.is_set():
            self.reason = reason
            log.info("ending reason=%r", reason)
            self.end.set()

    async def run(self) -> None:
        """This node's part, until it is cancelled; raises what kept the node from starting."""
        await asyncio.to_thread(self.temp.claim)
        await self.members.serve(self.address, self.control_port)
        loop = asyncio.get_running_loop()
        sample.start(self.resources, self.here.job, lambda load: loop.call_soon_threadsafe(self.report_load, load))
        ray = await RayProcess.prepare(self.env, self.ray_log)
        self.link, head = await self._first_head()
        if self.link.ahead is not None and (warning := self_check.clock(self.link.ahead)):
            log.warning("%s", warning)
            self.warning = warning
            self.report(self.state)
        while True:
            keeping = asyncio.create_task(self.keeper.keep(ray, head))
            try:
                newer = await self._serve(head, keeping)
            finally:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
            if newer is None:
                return
            head = newer
            log.info("a new head node=%s incarnation=%d", head.node, head.incarnation)
            self.may_join.clear()
            self.report("starting")
            ray = await RayProcess.prepare(self.env, self.ray_log)  # imports while the old one ends
            await asyncio.to_thread(processes.end_tree, os.getpid(), True, spare=ray.pid)
            await asyncio.to_thread(self.temp.claim)

    async def until_gpus_fail(self) -> None:
        """Look at the GPUs while Ray starts; return only by raising. A first node whose GPUs fail lets somebody else lead
        before it goes: its own end would be the cluster's."""
        trouble = await self_check.gpu_trouble() if self.resources.gpus else ""
        if trouble:
            text = f"the GPUs on {self.here.node} cannot be used: {trouble}"
            deadline = time.monotonic() + (COMPANY_PATIENCE if self.cluster.max_nodes > 1 else 0.0)
            while self.link is None or (self.duties is not None and len(self.members.table) < 2):
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.2)
            if self.duties is None or len(self.members.table) < 2:
                raise BringUpError(text, "Ask for the node to be drained, or exclude it with slurm.exclude.")
            self.resign(text)
        await asyncio.Event().wait()

    async def _first_head(self) -> tuple[ControlClient, Head]:
        """The head as this agent starts: this node itself, one to wait for, or the one that reigns."""
        here = self.here
        head = await retry_storage(lambda: asyncio.to_thread(Head.read, here.directory))
        over = head is None or here.is_over(head)
        if over and head is not None and head.canary == here.canary:
            # Slurm may run two allocations of one cluster: the one that began later leads, and it begins once.
            ours = await retry_storage(lambda: asyncio.to_thread(records.began, here.directory, here.allocation))
            over = ours is None or ours > head.incarnation
        if head is None or over:
            if here.is_first:
                claims = await retry_storage(lambda: asyncio.to_thread(records.claims, here.directory))
                number = max([self.cluster.incarnation - 1, head.incarnation if head else 0, *claims]) + 1
                if await retry_storage(lambda: asyncio.to_thread(claim, here, number)):
                    head = await self._lead(number, "")
            if head is None or here.is_over(head):
                head = await wait_for_head(here)
            return await self._connect(head), head
        # Killed and started again, or a joiner: there is, or was, a head already.
        return await self._seek(head, gone=head.node == here.node)

    async def _seek(self, lost: Head, gone: bool) -> tuple[ControlClient, Head]:
        return await HeadSearch(
            self.here.directory, self.here.canary, self.here.node, self.token, self.info, self._lead, self._missing,
            lost, gone,
        ).search()  # fmt: skip

    async def _lead(self, incarnation: int, why: str) -> Head:
        """Be the head from now on. A joiner leads the allocation that it joined, not its own."""
        here = self.here
        before = await retry_storage(lambda: asyncio.to_thread(Head.read, here.directory)) if here.joiner else None
        head = self._as_head(incarnation, before.allocation if before is not None else here.allocation)
        duties = self.duties = await asyncio.to_thread(  # it reads what the head before it left
            HeadController, here.directory, self.cluster, self.config, head, self.members, self.env, self.stop, self.resign,
            nodes=self.cluster.max_nodes if here.local else len(here.peers),
        )  # fmt: skip
        try:
            if why:
                await duties.open(why)
            else:  # its end would be the cluster's: it may begin more than once, until head.json is written
                await retry_storage(lambda: duties.open(""))
        except Exception as error:
            # The cluster does not end with a head that was elected and could not begin, nor with one that was replaced.
            if why or isinstance(error, Replaced):
                self.resign(f"this node cannot lead: {error}")
            raise
        return head

    def _missing(self) -> frozenset[str]:
        """Those of the base job's nodes that Slurm has taken out of it. Blocking."""
        if self.here.local or self.here.joiner:
            return frozenset()
        try:
            job = Slurm().jobs([self.here.job]).get(self.here.job)
        except RaylaunchError as error:
            log.warning("Slurm does not report which nodes are gone error=%r", str(error))
            return frozenset()
        return frozenset(self.here.peers) - frozenset(job.nodes) if job is not None and job.nodes else frozenset()

    def resign(self, reason: str) -> None:
        """Be no head any more, at once: end all of this node, and come back as a member."""
        self.again = True
        self.stop(reason)

    def _as_head(self, incarnation: int, allocation: str) -> Head:
        ports = self.lease.ports
        return Head(
            canary=self.cluster.canary, incarnation=incarnation, node=self.here.node,
            hostname=socket.gethostname(), address=self.address, control_port=self.control_port,
            gcs=f"{self.address}:{ports.gcs}", dashboard_port=ports.dashboard, time=time.time(), allocation=allocation,
        )  # fmt: skip

    def info(self) -> NodeInfo:
        """What the head should know of this node."""
        return NodeInfo(
            state=self.state, address=self.address, hostname=socket.gethostname(), pid=os.getpid(),
            control_port=self.control_port, index=self.here.index, joiner=self.here.joiner, job=self.here.job,
            ports=self.lease.ports.block, temp_dir=str(self.temp.path), resources=asdict(self.resources),
            error=self.error, warning=self.warning, left=self.left,
        )  # fmt: skip

    async def _connect(self, head: Head) -> ControlClient:
        """Connect to the head; its refusal is final, its silence is not at once."""
        began = time.monotonic()
        while True:
            try:
                return await ControlClient.connect(
                    head.address, head.control_port, self.token, head.incarnation, self.here.node, self.info()
                )
            except AlreadyHere:
                if time.monotonic() - began > ALREADY_LIMIT:
                    raise
                await asyncio.sleep(0.5)
            except Refused as error:
                raise BringUpError(f"the head refused this node: {error}") from error
            except OSError as error:
                if time.monotonic() - began > CONNECT_PATIENCE:
                    raise BringUpError(
                        f"cannot reach the head {head.node} at {head.address}:{head.control_port}: {error or 'time-out'}",
                        "Check the network between the nodes, or name the right one with cluster.interface.",
                    ) from error
                await asyncio.sleep(0.3)

    async def _serve(self, head: Head, keeping: asyncio.Task[None]) -> Head | None:
        """Follow a head's orders while Ray is kept; the newer head, or None when it is time to end."""
        while True:
            assert self.link is not None
            listening = asyncio.create_task(self._orders(self.link))
            await asyncio.wait({listening, keeping}, return_when=asyncio.FIRST_COMPLETED)
            if keeping.done():
                listening.cancel()
                keeping.result()
                return None
            try:
                listening.result()
                self.stop("the head's order")
                return None
            except (ConnectionError, OSError) as error:
                log.warning("connection to the head lost error=%r", str(error))
                gone = isinstance(error, Closed)
            self.link.close()
            self.link = None
            if self.terminated.is_set():  # its job ends: whoever stays elects
                self.stop("signal SIGTERM")
                return None
            seeking = asyncio.create_task(self._seek(head, gone))
            await asyncio.wait({seeking, keeping}, return_when=asyncio.FIRST_COMPLETED)
            if not seeking.done():  # our own Ray gave up for good meanwhile
                seeking.cancel()
                keeping.result()
                return None
            try:
                self.link, found = seeking.result()
            except BringUpError as error:
                self.orphaned = True
                self.stop(error.message)
                return None
            if found.incarnation != head.incarnation:
                if self.duties is not None and self.duties.head.incarnation != found.incarnation:
                    self.resign(f"incarnation {found.incarnation} has begun")
                    return None
                return found
            self.link.report(self.info())  # a hiccup of the network is no end

    async def _orders(self, link: ControlClient) -> None:
        """Take orders until the one to end."""
        while (order := await link.orders()) != "end":
            if order == "join":
                self.may_join.set()

    def report(self, now: str, error: str | None = None) -> None:
        """Report to the head how this node stands."""
        self.state, self.error = now, error or None
        if self.link is not None:
            self.link.report(self.info())

    def report_load(self, load: sample.Load) -> None:
        if self.link is not None:
            self.link.report_load(load)

    async def close(self) -> None:
        """End everything of ours on this node, and tell the head whether that worked."""
        if self.duties is not None:
            try:
                await (self.duties.abandon() if self.again else self.duties.close(self.reason))
            except (RaylaunchError, OSError) as error:  # a full disk must not keep processes alive
                log.error("the head could not shut down cleanly error=%r", str(error))
            except Exception:  # nor must a fault of ours, which stays one
                log.exception("the head could not shut down cleanly")
                self.duties.exit_code = 1
        left = await asyncio.to_thread(processes.end_tree, os.getpid(), True)
        left += await asyncio.to_thread(self.temp.remove)
        self.left = left
        self.report("ended", self.error)
        if self.link is not None:
            self.link.close()
        self.members.close()
        if self.duties is not None and not self.again:
            try:
                await asyncio.to_thread(self.duties.write_end, self.reason, left)
            except (RaylaunchError, OSError) as error:
                log.error("the end could not be written error=%r", str(error))
            except Exception:
                log.exception("the end could not be written")
                self.duties.exit_code = 1
        self.lease.close()
        log.info("ended reason=%r left=%d", self.reason, left)
