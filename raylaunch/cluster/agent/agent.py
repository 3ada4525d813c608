"""The agent: the supervisor of one node, a task of the job's wide srun step (or a local process).

Flow: check that the cluster directory is the shared one → lease ports, make the temp directory →
the first node takes the head's duties and publishes where it is, the others wait for that and
connect → start Ray → report → watch Ray, the head and the signals → end everything that was started.
A lost head is looked for (`seek`); under a newer one, Ray starts afresh. To stop being the head, an
agent ends with AGAIN, and its keeper starts another one.
An agent ends its own process tree and nothing else; it saves nothing, least of all in a signal handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import random
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import hostlist

from raylaunch.cluster.agent import ray_process, self_check
from raylaunch.cluster.agent.ray_process import RayNode, RayProcess
from raylaunch.cluster.head import HeadDuties
from raylaunch.cluster.head.context import Replaced
from raylaunch.cluster.membership.control_channel import AlreadyHere, Closed, Link, Members, Refused
from raylaunch.cluster.membership.head_search import Seeker
from raylaunch.cluster.telemetry import sample
from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import BringUpError, RaylaunchError, StateError
from raylaunch.host import hosts, processes
from raylaunch.host.internal_errors import described
from raylaunch.scheduler.slurm import batch_script
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.scheduler.slurm.parse import ENDING, TERMINAL
from raylaunch.state import files, records, thread_deaths
from raylaunch.state.appender import Appender, AppendingHandler
from raylaunch.state.records import Cluster, Head
from raylaunch.timing import (
    ALREADY_LIMIT,
    CANARY_PATIENCE,
    COMPANY_PATIENCE,
    CONNECT_PATIENCE,
    LOG_PATIENCE,
    TERM_PATIENCE,
)

log = logging.getLogger("raylaunch.agent")
T = TypeVar("T")

AGAIN = 75
"""The exit code that asks the keeper for another agent: this one was the head, and is no more."""

HEAD_PATIENCE = 300.0
RAY_PATIENCE = 120.0
RAY_TRIES = 3
RESTART_BACKOFF = 30.0
GROUND_EVERY = 2.0
DASHBOARD_PATIENCE = 15.0
READ_LIMIT, CANCEL_LIMIT, RECORD_LIMIT = 30.0, 120.0, 10.0
ONE_TRY, AGAIN_PAUSE = 10.0, 1.0
"""Seconds: see `_insist` and `_patiently`."""
WRONG_SETUP = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR})
"""What storage says that will say the same at the next try: a person has to hear of it."""


@dataclass(frozen=True)
class Here:
    """Who this agent is: its node, its place in the job, its cluster."""

    directory: Path
    canary: str
    node: str
    index: int
    peers: tuple[str, ...]
    local: bool
    job: str = ""
    life: str = ""
    """Of the base job's allocation; a requeued one has another."""
    joiner: bool = False

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Here:
        """From what the batch script, or the local backend, set."""
        directory, canary = Path(env["RAYLAUNCH_CLUSTER_DIR"]), env["RAYLAUNCH_CANARY"]
        if "RAYLAUNCH_LOCAL_INDEX" in env:
            index, count = int(env["RAYLAUNCH_LOCAL_INDEX"]), int(env["RAYLAUNCH_LOCAL_COUNT"])
            names = tuple(f"local{i + 1}" for i in range(count))
            return cls(
                directory, canary, f"local{index + 1}", index, names, local=True, life="local", joiner=index >= count
            )
        nodes = tuple(hostlist.expand_hostlist(env["SLURM_JOB_NODELIST"]))
        return cls(
            directory, canary, hosts.node_name(env), int(env["SLURM_NODEID"]), nodes, local=False,
            job=env["SLURM_JOB_ID"], life=f"{env['SLURM_JOB_ID']}:{env.get('SLURM_RESTART_COUNT', '0')}",
            joiner="RAYLAUNCH_JOINER" in env,
        )  # fmt: skip

    @property
    def is_first(self) -> bool:
        """Whether this node begins a life of the cluster as its head."""
        return self.index == 0 and not self.joiner

    def is_over(self, head: Head) -> bool:
        """Whether this head is of another life, or of an allocation before this one."""
        return head.canary != self.canary or (not self.joiner and head.life != self.life)


def _ports_before(here: Here) -> hosts.Ports | None:
    """The block of the agent that was here before, as the head has it (see `hosts.lease_ports` for why not again)."""
    with contextlib.suppress(RaylaunchError, OSError):
        table = files.read_json(here.directory / records.MEMBERS_FILE) or {"nodes": []}
        for row in table["nodes"]:
            if row["name"] == here.node and row.get("ports"):
                return hosts.Ports(int(row["ports"][0]))
    return None


def _cluster_if_shared(here: Here) -> Cluster | None:
    """The cluster's record; None while the canary beside it is not the one that `up` wrote. Blocking."""
    with contextlib.suppress(OSError, StateError):
        if (here.directory / records.CANARY_FILE).read_text() == here.canary:
            return Cluster.read(here.directory)
    return None


async def check_canary(here: Here) -> Cluster:
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


async def wait_for_head(here: Here) -> Head:
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
            if not _may_pass(error) or time.monotonic() > deadline:
                raise
            log.warning("cannot look for the head, trying again error=%r", str(error))
        if time.monotonic() > deadline:
            raise BringUpError(f"no head within {HEAD_PATIENCE:g} s", f"See {here.directory / records.LOGS}.")
        await asyncio.sleep(pause * random.uniform(0.7, 1.3))  # a thousand nodes should not ask in step
        pause = min(0.5, pause * 1.2)


@dataclass(frozen=True)
class NodeSetup:
    """What an agent finds on its node, and takes of it, before anything else."""

    token: str
    temp: hosts.TempDir
    address: str
    resources: hosts.Resources
    lease: hosts.PortLease

    @classmethod
    def prepare(cls, here: Here, token: str, cluster: Cluster, config: Config) -> NodeSetup:
        """Blocking: it reads shared storage, resolves host names, asks nvidia-smi."""
        self_check.ground(here.node)
        # A joiner may be on the node of the base job, or of another joiner: each has a directory of its own.
        suffix = str(here.index + 1) if here.local else here.job if here.joiner else None
        temp = hosts.TempDir(config.cluster.temp_dir, str(here.directory), suffix)
        peer = next((n for n in here.peers if n != here.node), None)
        address = f"127.0.0.{here.index + 2}" if here.local else hosts.address(peer, config.cluster.interface)
        resources = _resources(here, cluster, config)
        return cls(token, temp, address, resources, hosts.lease_ports(_ports_before(here)))


def _token(here: Here) -> str:
    """The cluster's secret. Blocking."""
    try:
        return (here.directory / records.TOKEN_FILE).read_text().strip()
    except FileNotFoundError as error:
        raise BringUpError("the cluster has ended already") from error


def _claim(here: Here, number: int) -> bool:
    """Claim to begin this allocation as the head of that incarnation; False when somebody else has. Blocking.

    It may be repeated after a failure, with the same number. The claim that failed may have been made all the same: the
    storage's answer got lost, or the file beside it could not be removed. So one that is there may be ours, and nobody
    would ever lead if we took it for another's. Nobody else's has our node and allocation: that begins once, by its
    first node, where one agent comes after the other. (The next number would do as well, but not where the claim was
    not made: `layout.is_fenced` wants no gaps.)
    """
    if records.claim(here.directory, number, here.node, here.life):
        return True
    made = files.read_json(here.directory / records.INCARNATIONS / f"{number:08d}") or {}
    return (made.get("node"), made.get("life")) == (here.node, here.life)


def _resources(here: Here, cluster: Cluster, config: Config) -> hosts.Resources:
    """What Ray gets here; BringUpError when GPUs are missing."""
    # Without an own GPU request, what nvidia-smi lists on a shared node is other people's.
    asked = here.local or config.slurm.exclusive or batch_script.gpus_per_node(config.slurm) > 0
    share = len(here.peers) if here.local else 1
    found = hosts.resources(os.environ, share, config.cluster.object_store_memory, look_for_gpus=asked)
    gpus, workers = len(found.gpus), cluster.workers_per_node
    if gpus < workers and (gpus or (asked and not here.local and not config.slurm.exclusive)):
        raise BringUpError(
            f"{gpus} GPUs on {here.node} for {workers} workers",
            "Check the node's GPUs (nvidia-smi), slurm.gpus_per_node and slurm.ntasks_per_node.",
        )
    return found


class Agent:
    """The life of one node.

    Its event loop answers pings, so no file work on shared storage is done in it: a storage that stalls must not look
    like a dead node. (tests/unit/test_event_loops.py looks for it.)
    """

    def __init__(self, here: Here, cluster: Cluster, config: Config, setup: NodeSetup) -> None:
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
        self.orphaned = self.again = False
        self.reason = ""
        self.link: Link | None = None
        self.duties: HeadDuties | None = None
        self.members = Members(self.token, lambda: "lost" if self.link is None else "sees")

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

    async def live(self) -> None:
        """This node's part, until it is cancelled; raises what kept the node from starting."""
        await asyncio.to_thread(self.temp.claim)
        await self.members.serve(self.address, self.control_port)
        loop = asyncio.get_running_loop()
        sample.start(self.resources, self.here.job, lambda load: loop.call_soon_threadsafe(self._tell_load, load))
        ray = await RayProcess.prepare(self.env, self.ray_log)
        self.link, head = await self._first_head()
        if self.link.ahead is not None and (warning := self_check.clock(self.link.ahead)):
            log.warning("%s", warning)
            self.warning = warning
            self._tell(self.state, warning=warning)
        while True:
            keeping = asyncio.create_task(self._keep_ray(ray, head))
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
            self._tell("starting")
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
                raise BringUpError(text, "Have the node drained, or keep it out with slurm.exclude.")
            self.resign(text)
        await asyncio.Event().wait()

    async def _first_head(self) -> tuple[Link, Head]:
        """The head as this agent starts: this node itself, one to wait for, or the one that reigns."""
        here = self.here
        head = await _patiently(lambda: asyncio.to_thread(Head.read, here.directory))
        over = head is None or here.is_over(head)
        if over and head is not None and head.canary == here.canary:
            # Slurm may run two allocations of one cluster: the one that began later leads, and it begins once.
            ours = await _patiently(lambda: asyncio.to_thread(records.began, here.directory, here.life))
            over = ours is None or ours > head.incarnation
        if head is None or over:
            if here.is_first:
                claims = await _patiently(lambda: asyncio.to_thread(records.claims, here.directory))
                number = max([self.cluster.incarnation - 1, head.incarnation if head else 0, *claims]) + 1
                if await _patiently(lambda: asyncio.to_thread(_claim, here, number)):
                    head = await self._lead(number, "")
            if head is None or here.is_over(head):
                head = await wait_for_head(here)
            return await self._connect(head), head
        # Killed and started again, or a joiner: there is, or was, a head already.
        return await self._seek(head, gone=head.node == here.node)

    async def _seek(self, lost: Head, gone: bool) -> tuple[Link, Head]:
        return await Seeker(
            self.here.directory, self.here.canary, self.here.node, self.token, self.info, self._lead, self._missing,
            lost, gone,
        ).seek()  # fmt: skip

    async def _lead(self, incarnation: int, why: str) -> Head:
        """Be the head from now on. A joiner leads the allocation that it joined, not its own."""
        here = self.here
        before = await _patiently(lambda: asyncio.to_thread(Head.read, here.directory)) if here.joiner else None
        head = self._as_head(incarnation, before.life if before is not None else here.life)
        duties = self.duties = await asyncio.to_thread(  # it reads what the head before it left
            HeadDuties, here.directory, self.cluster, self.config, head, self.members, self.env, self.stop, self.resign,
            nodes=self.cluster.max_nodes if here.local else len(here.peers),
        )  # fmt: skip
        try:
            if why:
                await duties.open(why)
            else:  # its end would be the cluster's: it may begin more than once, until head.json is written
                await _patiently(lambda: duties.open(""))
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
            log.warning("Slurm does not say who is gone error=%r", str(error))
            return frozenset()
        return frozenset(self.here.peers) - frozenset(job.nodes) if job is not None and job.nodes else frozenset()

    def resign(self, reason: str) -> None:
        """Be no head any more, at once: end all of this node, and come back as a member."""
        self.again = True
        self.stop(reason)

    def _as_head(self, incarnation: int, life: str) -> Head:
        ports = self.lease.ports
        return Head(
            canary=self.cluster.canary, incarnation=incarnation, node=self.here.node,
            hostname=socket.gethostname(), address=self.address, control_port=self.control_port,
            gcs=f"{self.address}:{ports.gcs}", dashboard_port=ports.dashboard, time=time.time(), life=life,
        )  # fmt: skip

    def info(self) -> dict[str, object]:
        """What the head should know of this node."""
        base = self.lease.ports.base
        return {
            "state": self.state, "address": self.address, "hostname": socket.gethostname(), "pid": os.getpid(),
            "control_port": self.control_port, "index": self.here.index, "joiner": self.here.joiner,
            "job": self.here.job, "ports": [base, base + hosts.PORT_BLOCK - 1], "temp_dir": str(self.temp.path),
            "resources": self.resources.as_dict(), "error": self.error, "warning": self.warning,
        }  # fmt: skip

    async def _connect(self, head: Head) -> Link:
        """Connect to the head; its refusal is final, its silence is not at once."""
        began = time.monotonic()
        while True:
            try:
                return await Link.connect(
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
            self.link.tell(state=self.state, error=self.error)  # a hiccup of the network is no end

    async def _orders(self, link: Link) -> None:
        """Take orders until the one to end."""
        while (order := await link.orders()) != "end":
            if order == "join":
                self.may_join.set()

    def _tell(self, now: str, **info: object) -> None:
        """Tell the head how this node stands."""
        self.state = now
        self.error = str(info["error"]) if info.get("error") else None
        if self.link is not None:
            self.link.tell(state=now, **info)

    def _tell_load(self, load: sample.Load) -> None:
        if self.link is not None:
            self.link.tell_load(load)

    async def _keep_ray(self, ray: RayProcess, head: Head) -> None:
        """Start Ray, and start it again when it ends; the head's own is not replaceable in place."""
        failures, has_run = 0, False
        is_head = head.node == self.here.node
        while True:
            node = RayNode(
                self.here.node, self.address, self.lease.ports, self.resources, self.temp.path,
                self.cluster.workers_per_node, None if is_head else head.gcs,
            )  # fmt: skip
            if not is_head:
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
                status = await self._until_it_ends(ray)
                words = await ray.own_words(self.temp.path)
                if time.monotonic() - began > 10 * RESTART_BACKOFF:
                    failures = 0
            else:
                words = await ray.own_words(self.temp.path)
                status = await self._give_up(ray)
            failures += 1
            log.warning("ray ended status=%s failures=%d words=%r", status, failures, words)
            if is_head and has_run:
                self.resign(f"the head's Ray ended ({ray_process.described(status)}): {words}")
                return
            if not has_run and failures >= RAY_TRIES:
                raise BringUpError(f"Ray on {self.here.node} ended ({ray_process.described(status)}): {words}")
            self._tell("restarting", error=words)
            await asyncio.sleep(min(RESTART_BACKOFF, 0.5 * 2 ** (failures - 1)))
            await asyncio.to_thread(self._fresh_ground, is_head)
            self._tell("restarting", ports=self.info()["ports"])
            ray = await RayProcess.prepare(self.env, self.ray_log)

    async def _until_it_ends(self, ray: RayProcess) -> int:
        """Wait for the end of Ray; make one when its directory is removed under it, as cleaners of /tmp do: it
        would go on and start no worker any more."""
        exited = asyncio.create_task(ray.exited())
        try:
            while not exited.done():
                await asyncio.wait({exited}, timeout=GROUND_EVERY)
                if not exited.done() and not await asyncio.to_thread(self.temp.is_whole):
                    log.error("Ray's directory was removed under it path=%s", self.temp.path)
                    return await self._give_up(ray)
            return exited.result()
        finally:
            exited.cancel()

    def _fresh_ground(self, same_ports: bool) -> None:
        """What the next start needs: nothing left of the last one, and other ports (see `hosts.lease_ports`)."""
        processes.end_tree(os.getpid(), keep_root=True)
        self.temp.claim()
        if not same_ports:  # the head's are published already
            last = self.lease
            self.lease = hosts.lease_ports(last.ports)
            last.close()

    async def _has_started(self, ray: RayProcess) -> bool:
        """Whether Ray came up: it says so, ends, or is out of time."""
        started, exited = asyncio.create_task(ray.started.wait()), asyncio.create_task(ray.exited())
        await asyncio.wait({started, exited}, timeout=RAY_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        exited.cancel()
        return ray.started.is_set()

    async def _give_up(self, ray: RayProcess) -> int:
        """End a Ray that did not start, or that cannot go on, and say with what status."""
        await asyncio.to_thread(processes.end_tree, ray.pid)
        return await ray.exited()

    async def close(self) -> None:
        """End everything of ours on this node, and tell the head whether that worked."""
        if self.duties is not None:
            try:
                await (self.duties.abandon() if self.again else self.duties.close(self.reason))
            except (RaylaunchError, OSError) as error:  # a full disk must not keep processes alive
                log.error("the head could not end in order error=%r", str(error))
            except Exception:  # nor must a fault of ours, which stays one
                log.exception("the head could not end in order")
                self.duties.exit_code = 1
        left = await asyncio.to_thread(processes.end_tree, os.getpid(), True)
        left += await asyncio.to_thread(self.temp.remove)
        if self.link is not None:
            self.link.tell(state="ended", left=left)
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


async def give_back_orphaned(here: Here, terminated: asyncio.Event, env: Mapping[str, str]) -> None:
    """End a job whose head is dead: with `--no-kill` Slurm would keep its nodes until the wall time.

    One survivor does it, the next one half a second later if the first could not, and so on. A head
    that has written that we are lost has outlived us: then it is we who are cut off.
    """
    try:
        table = await _insist(functools.partial(files.read_json, here.directory / records.MEMBERS_FILE), READ_LIMIT)
        disowned = _is_disowned(table, here.node)
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
        await _insist(functools.partial(Slurm().cancel, [env["SLURM_JOB_ID"]]), CANCEL_LIMIT)
    except (RaylaunchError, OSError) as error:
        log.error("the job could not be cancelled error=%r", str(error))


def _is_disowned(table: Mapping[str, Any] | None, node: str) -> bool:
    """Whether the head has written, last of all, that it holds this node for lost."""
    return any(row["name"] == node and row["state"] == "lost" for row in (table or {"nodes": []})["nodes"])


async def _insist(work: Callable[[], T], limit: float) -> T:
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


async def _patiently(work: Callable[[], Awaitable[T]]) -> T:
    """Work on the cluster directory without which this node cannot begin. A storage that hiccups would end the cluster on
    its first node, and be a strike against any other, so a try that fails is repeated for READ_LIMIT, from the first
    failure on. Unlike with `_insist`, one that hangs is waited for: a storage that stalls ends nobody, and a claim that
    was left to itself might be made later."""
    until = 0.0
    while True:
        try:
            return await work()
        except (RaylaunchError, OSError) as error:
            until = until or time.monotonic() + READ_LIMIT
            if not _may_pass(error) or time.monotonic() >= until:
                raise
            log.warning("attempt failed, retrying error=%r", str(error))
        await asyncio.sleep(AGAIN_PAUSE)


def _may_pass(error: RaylaunchError | OSError) -> bool:
    """Whether this is the storage's, and may be over at the next try."""
    cause = error.__cause__ or error
    if isinstance(cause, OSError):
        return cause.errno not in WRONG_SETUP
    return isinstance(error, StateError)  # a file that cannot be read as ours: NFS may show one half


async def supervise(here: Here, at_end: contextlib.ExitStack) -> int:
    """One agent from its first check to its last; the exit code."""
    agent: Agent | None = None
    failure: Exception | None = None
    try:
        cluster = await check_canary(here)
        log_file = Appender(here.directory / records.LOGS / f"{here.node}.log")
        at_end.callback(log_file.close, LOG_PATIENCE)
        _log_to(log_file)
        file = here.directory / records.CONFIG_FILE
        config = await _patiently(lambda: asyncio.to_thread(loader.load_resolved, file))
        token = await _patiently(lambda: asyncio.to_thread(_token, here))
        agent = Agent(here, cluster, config, await asyncio.to_thread(NodeSetup.prepare, here, token, cluster, config))
        _handle_signals(agent)
        thread_deaths.record(here.directory, node=here.node)
        tasks = [asyncio.create_task(t) for t in (agent.live(), agent.until_gpus_fail(), agent.end.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        failure = next((r for r in results if isinstance(r, Exception)), None)  # a CancelledError is not one
        if isinstance(failure, AlreadyHere):  # no fault of this node's: one agent is enough
            agent.stop(str(failure))
            failure = None
        elif failure is not None and agent.again:
            await _could_not_lead(here, failure)
            failure = None
    except (RaylaunchError, OSError) as error:
        failure = error
    if failure is not None:
        if agent is not None and agent.duties is not None:
            agent.duties.exit_code = 1
        await _report(here, agent, failure)
    if agent is not None:
        await agent.close()
        if agent.orphaned and not here.local:
            await give_back_orphaned(here, agent.terminated, os.environ)
        if agent.again:
            return AGAIN
        if failure is None:
            return agent.duties.exit_code if agent.duties else 0
    return 1


async def _could_not_lead(here: Here, failure: Exception) -> None:
    """A head that could not begin has resigned, and this node comes back as a member: no failure of the node's."""
    log.error("could not lead", exc_info=failure)
    tell = functools.partial(
        files.append_event, here.directory, "could_not_lead", node=here.node, error=described(failure)
    )
    with contextlib.suppress(RaylaunchError, OSError):
        await _insist(tell, RECORD_LIMIT)


async def _report(here: Here, agent: Agent | None, failure: Exception) -> None:
    """Say why this node cannot go on: to the head, in the job's output, and in the cluster directory."""
    text = (
        " ".join(". ".join(filter(None, (failure.message, failure.hint))).split())
        if isinstance(failure, RaylaunchError)
        else f"{type(failure).__name__}: {failure}"
    )
    log.error("failed error=%r", text, exc_info=None if isinstance(failure, RaylaunchError) else failure)
    if agent is not None:
        agent.stop(text)
        if agent.link is not None:
            agent.link.tell(state="failed", error=text)
    await asyncio.to_thread(print, f"{records.FAILED_LINE} {here.node}: {text}", flush=True)
    leads = agent is not None and agent.duties is not None
    # Without an agent, the directory may not be shared at all: only the line above tells then.
    limit = RECORD_LIMIT if agent is not None else 0.0
    record = here.directory / records.NODES / f"{here.node}.json"
    for work in (
        functools.partial(files.write_json, record, {"node": here.node, "error": text}),
        functools.partial(_end_life, here, text, leads),
    ):
        try:
            await _insist(work, limit)
        except (RaylaunchError, OSError) as error:
            log.error("the failure could not be recorded error=%r", str(error))


def _end_life(here: Here, text: str, leads: bool) -> None:
    """The last word on a life of the cluster that has no head to say it: its first node could not begin. Blocking."""
    if here.is_first and not leads and not _another_leads(here, Head.read(here.directory)):
        records.write_end(here.directory, here.canary, text, {}, [], exit_code=1)


def _another_leads(here: Here, head: Head | None) -> bool:
    """Whether this life has a head: another node that was elected, or the one of another allocation that is not over.
    SlurmError, while Slurm does not say."""
    if head is None or head.canary != here.canary:
        return False
    if not here.is_over(head):
        return head.node != here.node
    other = Slurm().jobs([head.job]).get(head.job) if not here.local and head.job != here.job else None
    return other is not None and other.state not in TERMINAL | ENDING


def _handle_signals(agent: Agent) -> None:
    """SIGTERM and SIGINT end the node; SIGUSR1 is Slurm's notice that time runs out."""
    loop = asyncio.get_running_loop()

    def terminate(name: str) -> None:
        agent.terminated.set()
        if agent.duties is not None and agent.duties.terminated():
            return
        if agent.here.local or agent.link is None or agent.duties is not None:
            agent.stop(f"signal {name}")
        else:  # the grace before a preemption: the head saves first, then orders the end
            loop.call_later(TERM_PATIENCE, agent.stop, f"signal {name}")

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, terminate, number.name)

    def out_of_time() -> None:
        if agent.duties is not None:
            agent.duties.notice()

    loop.add_signal_handler(signal.SIGUSR1, out_of_time)


def _log_to(out: Appender) -> None:
    """Log into a file, from a thread of its own."""
    handler = AppendingHandler(out)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def main() -> int:
    """One agent's life, in a process that its keeper has made for it."""
    processes.become_subreaper()
    with contextlib.ExitStack() as at_end:
        return asyncio.run(supervise(Here.from_environment(os.environ), at_end))
