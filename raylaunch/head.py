"""The head's duties, beside its own node's: the table of nodes, the requests, the runs, the end.

The head's agent publishes where it is (head.json), admits the other agents (`link`), writes what it
knows of them (members.json) and what its successor must know (duties.json), takes requests from the
cluster directory, and runs one driver at a time, run after run. All file work is done off the event
loop: shared storage that stalls must not look like a dead head. A head that finds a newer incarnation
resigns at once. How a run goes on after a fault is the driver's business, not ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from raylaunch import allocation, backends, layout, nodepolicy, requests, runs, state, submits
from raylaunch.config import Config
from raylaunch.drivers import Drivers
from raylaunch.errors import StateError
from raylaunch.hosts import Ports
from raylaunch.internal import InternalErrors
from raylaunch.layout import Cluster, Head
from raylaunch.link import Member, Members
from raylaunch.load.collect import Collector
from raylaunch.memory import Draining, Memory
from raylaunch.metrics import serve as metrics
from raylaunch.nodeloop import NodeLoop, Turn
from raylaunch.published import Published
from raylaunch.requests import Request
from raylaunch.runs import Run
from raylaunch.slurm.client import TIMEOUT

log = logging.getLogger("raylaunch.head")
T = TypeVar("T")

REQUEST_EVERY = 0.3
FENCE_EVERY = 0.5
ABOARD_LIMIT, LATE_LIMIT = 300.0, 5.0
"""Seconds that a submitted run waits for the minimum of nodes, and then for the rest."""
LOOP_LEAST, LOOP_PAUSE = 1.0, 5.0
"""Seconds between two turns of the node loop, at the least, and after one that failed."""
BLAME_AFTER = 2.0
AT_ONCE = 10.0
"""Seconds between two losses that may be one cut of the network: silence is noticed node by node."""
KEEP_GONE = 500
"""Rows of nodes that are gone, in the table: accounts and reports ask what they had."""
END_MOVES = 30.0
"""Seconds by which the end of the job's time must have moved to be told anew: squeue is no clock."""
FOLLOW_LIMIT = 20.0
"""Seconds within which the nodes come to a new head."""
SAVE_LIMIT = 60.0
"""Seconds that a run gets to save when the cluster is to end, unless the request says otherwise."""
ENDING_LIMIT, TELL_LIMIT = 10.0, 8.0
TURN_LIMIT = TIMEOUT + 2.0
"""Seconds that the end waits for a job that is being submitted: as long as a command of Slurm may take."""
JOB_ENDS = "its job was told to end"
TERM_LIMIT = 20.0
"""Seconds after SIGTERM in which the run may leave the head's own node."""


class HeadDuties:
    """What the head's agent does for the whole cluster. `stop` ends this node and with it the cluster,
    `resign` ends this node as head only. `nodes`: how many the base job got."""

    def __init__(
        self,
        directory: Path,
        cluster: Cluster,
        config: Config,
        head: Head,
        members: Members,
        env: Mapping[str, str],
        stop: Callable[[str], None],
        resign: Callable[[str], None],
        nodes: int,
    ) -> None:
        self.directory, self.cluster, self.config, self.head = directory, cluster, config, head
        self.members, self._stop, self._resign = members, stop, resign
        self.exit_code = 0
        self._env = env
        self._notice = float(config.slurm.signal.partition("@")[2])
        self._ready = asyncio.Event()  # Ray runs on the head: a driver can connect
        self.enough = asyncio.Event()
        """The minimum of nodes is ready: what is not needed for that may start now."""
        self._nodes = nodes
        self._memory = Memory(cluster.canary)
        self._queued = asyncio.Event()
        self._table_changed, self._nodes_changed = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        to_ray = {"RAY_ADDRESS": head.gcs, "RAYLAUNCH_INCARNATION": str(head.incarnation)}
        self._drivers = Drivers(
            directory, {**env, **to_ray}, lambda: self._ending, self._is_fenced, self._off_loop, self._event
        )
        self._collector = Collector(directory, cluster.canary, self._off_loop, self._event, self._alive)
        loop = asyncio.get_running_loop()
        self._errors = InternalErrors(self._event, lambda: loop.call_soon_threadsafe(self._table_changed.set))
        self._ending = self._closed = self._noticed = False
        self._elected = self._run_is_over = False
        self._goes_on = ""
        """Why the cluster goes on in another allocation, once this one has ended; "": it does not."""
        self._onward = allocation.Onward.REQUEUE
        self._node_loop: NodeLoop | None = None
        self._turn: asyncio.Future[Any] | None = None
        """The last turn of the node loop, in its thread."""
        self._requests: dict[str, Request] = {}
        """Those that were taken and are not over, by name."""
        self._unclean: dict[str, Any] = {}
        self._head_file, self._members_file, self._duties_file = (
            Published(directory / name) for name in (layout.HEAD_FILE, layout.MEMBERS_FILE, layout.DUTIES_FILE)
        )
        self._lost: list[str] = []
        self._ends: float | None = None
        """When the base job's time is up (Unix)."""
        self._files = ThreadPoolExecutor(1, "files")  # one thread: what is written first is there first

    async def open(self, why: str) -> None:
        """Begin: admit agents, publish head.json, take requests. `why`: of an election."""
        self._memory = await self._off_loop(self._recall)
        await self._off_loop(self._remember_life)
        self._elected = bool(why)
        if why:
            self._inherit(await self._off_loop(state.read_json, self.directory / layout.MEMBERS_FILE))
        self.members.lead(self.head.incarnation, self._member_changed, self._collector.take)
        if await self._off_loop(self._is_fenced):
            raise StateError("a newer incarnation has begun")
        await self._off_loop(self._head_file.write, asdict(self.head))
        if why:
            self._event("election", incarnation=self.head.incarnation, node=self.head.node, why=why)
        self._event("head", node=self.head.node, address=self.head.address, incarnation=self.head.incarnation)
        if self._memory.queue:
            self._queued.set()
        for duty in (
            self._write_table(), self._take_requests(), self._watch_for_newer(), self._run_queue(), self._keep_nodes(),
            self._collector.run(), self._serve_metrics(),
        ):  # fmt: skip
            self._spawn(duty)

    async def _serve_metrics(self) -> None:
        await self.enough.wait()
        await metrics.keep(self.directory, self.head.address, Ports(self.head.control_port - 1).metrics, self._env)

    def _recall(self) -> Memory:
        """What the head before this one left."""
        memory = Memory.read(self.directory, self.cluster)
        memory.wanted = memory.wanted or self._nodes
        return memory

    def _remember_life(self) -> None:
        """What the head before this one left, and whether this is another allocation."""
        memory = self._memory
        if memory.running:  # its driver died with its head
            memory.queue.insert(0, memory.running)
            memory.running = ""
        if memory.life and memory.life != self.head.life:
            memory.continued += 1
        memory.life = self.head.life
        self._duties_file.write(asdict(memory))

    def _inherit(self, table: dict[str, Any] | None) -> None:
        """The nodes that the head before this one knew: lost, until they come by themselves."""
        for row in (table or {}).get("nodes", []):
            known = {k: v for k, v in row.items() if k not in {"name", "role", "since"}}
            gone = row["state"] in {"ended", "failed", "lost"}
            if row["state"] not in {"ended", "failed"}:
                known["state"] = "starting"  # its own state matters once it is connected
            since = float(row["since"]) if gone else time.time()
            self.members.table[row["name"]] = Member(row["name"], known, alive=False, since=since)
        self._spawn(self._miss(time.time()))

    async def _miss(self, began: float) -> None:
        """Whoever was there when this head began and did not follow to it is lost; who was lost before, was."""
        await asyncio.sleep(FOLLOW_LIMIT)
        for member in list(self.members.table.values()):
            if self._state_of(member) == "lost" and member.since >= began - 1.0:
                self._event("node_lost", node=member.node, reason="it did not follow to the new head")
                await self._blame(member, "it did not follow to the new head", after=0.0)

    async def _off_loop(self, work: Callable[..., T], *arguments: Any) -> T:
        """File work in its own thread; in order."""
        return await asyncio.get_running_loop().run_in_executor(self._files, work, *arguments)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("duty failed", exc_info=task.exception())
            self.exit_code = 1
            self._stop(f"the head failed: {task.exception()}")

    # -- the table of nodes ------------------------------------------------------------------

    def _member_changed(self, member: Member, what: str) -> None:
        if self._closed:
            return  # our own node's farewell, after the last word
        log.info("member node=%s alive=%s state=%s what=%r", member.node, member.alive, member.info.get("state"), what)
        self._table_changed.set()
        self._nodes_changed.set()
        if what == "joined":
            self._event("node_joined", node=member.node, address=member.info.get("address"))
            if self._ready.is_set():
                self.members.order("join", only=member)
            self._drain_again(member)
        elif what == "changed":
            if member.node == self.head.node and member.info["state"] == "ready":
                self._ready.set()
                self.members.order("join")
            if member.info["state"] in {"ended", "failed"}:
                self._forget_draining(member.node)
            if self._ready_nodes() >= self.cluster.min_nodes:
                self.enough.set()
            self._event(f"node_{member.info['state']}", node=member.node, error=member.info.get("error"))
        elif not self._ending and member.info.get("state") not in {"ended", "failed"}:
            self._event("node_lost", node=member.node, reason=what)
            self._spawn(self._blame(member, what))

    def _alive(self) -> list[str]:
        return [m.node for m in self.members.table.values() if m.alive]

    def table(self) -> list[dict[str, Any]]:
        """The nodes as members.json has them."""
        return [
            {
                "name": m.node,
                "role": "head" if m.node == self.head.node else "worker",
                **m.info,
                "state": self._state_of(m),
                "since": m.since,
            }
            for m in self.members.table.values()
        ]

    def _state_of(self, member: Member) -> str:
        now = str(member.info["state"])
        if now in {"ended", "failed"}:
            return now
        if not member.alive:
            return "lost"
        return "draining" if member.node in self._memory.draining else now

    async def _blame(self, member: Member, reason: str, after: float = BLAME_AFTER) -> None:
        """A strike for a lost node; none when most are lost at once, for then this node's network is at fault, nor
        when the same agent is back: the network had a hiccup."""
        node, pid = member.node, member.info.get("pid")
        await asyncio.sleep(after)
        now = self.members.table.get(node)
        if now is not None and now.alive and now.info.get("pid") == pid:
            return
        if not self._most_went_with(member) and not await self._off_loop(self._is_fenced):
            self._strike(node, reason)

    def _most_went_with(self, member: Member) -> bool:
        """Whether most of the nodes that were here were lost at once with this one."""
        lost = {m.node for m in self.members.table.values() if self._state_of(m) == "lost"}
        at_once = sum(abs(self.members.table[node].since - member.since) < AT_ONCE for node in lost)
        return 2 * at_once > at_once + len(self._alive())

    def _strike(self, node: str, reason: str) -> None:
        """A node was lost, or is broken: remembered over elections."""
        memory = self._memory
        count = memory.strikes[node] = memory.strikes.get(node, 0) + 1
        memory.excluded = sorted(nodepolicy.excluded(memory.strikes, self.config.elastic))
        self._event("strike", node=node, count=count, reason=reason)
        self._remember()

    def _remember(self) -> None:
        """Write down what the next head must know."""
        self._files.submit(self._write_memory, asdict(self._memory))

    def _write_memory(self, memory: dict[str, Any]) -> None:
        with self._errors.caught("writing of duties.json"):
            if not self._is_fenced():
                self._duties_file.write(memory)

    def drain(self, node: str, reason: str) -> None:
        """Have the run leave this node at its next step, then end its agent."""
        member = self.members.table.get(node)
        if node in self._memory.draining or member is None or member.info.get("state") in {"ended", "failed"}:
            return
        self._memory.draining[node] = Draining(reason, member.info.get("pid"))
        self._event("node_draining", node=node, reason=reason)
        self._remember()
        self._table_changed.set()
        if not self._memory.running:
            self._drained(node)

    def _drain_again(self, member: Member) -> None:
        """A node that drains is connected anew, to this head or to another: it drains on, if it is the same agent."""
        draining = self._memory.draining.get(member.node)
        if draining is not None and draining.agent != member.info.get("pid"):
            self._forget_draining(member.node)
        elif draining is not None and not self._memory.running:
            self._drained(member.node)

    def _forget_draining(self, node: str) -> None:
        if self._memory.draining.pop(node, None) is not None:
            self._remember()

    def _drained(self, node: str) -> None:
        """No attempt uses the node any more: its agent may go. The head's own end would be the cluster's: it
        resigns, comes back as a member, and its successor drains it."""
        member, draining = self.members.table.get(node), self._memory.draining.get(node)
        if draining is None or member is None:
            return
        if node == self.head.node:
            self._resign(f"this node is drained: {draining.reason}")
        else:
            self.members.order("end", only=member)

    async def _write_table(self) -> None:
        while True:
            await self._table_changed.wait()
            self._table_changed.clear()
            written = False
            with self._errors.caught("table of nodes"):
                self._forget_the_longest_gone()
                await self._off_loop(self._save_table, self.table())
                written = True
            if not written:
                await asyncio.sleep(1.0)
                self._table_changed.set()

    def _forget_the_longest_gone(self) -> None:
        """The table has who is here, and the last of those who were: names may never come again."""
        gone = [m for m in self.members.table.values() if self._state_of(m) in {"ended", "failed", "lost"}]
        for member in sorted(gone, key=lambda m: m.since)[: max(0, len(gone) - KEEP_GONE)]:
            del self.members.table[member.node]
            self._forget_draining(member.node)

    def _save_table(self, rows: list[dict[str, Any]]) -> None:
        if self._is_fenced():
            return
        table = {"canary": self.cluster.canary, "incarnation": self.head.incarnation, "wanted": self._memory.wanted,
                 "internal_errors": dict(self._errors.present)}  # fmt: skip
        self._members_file.write({**table, "ends": self._ends, "nodes": rows})

    # -- the end of this head's reign -------------------------------------------------------------

    def _is_fenced(self) -> bool:
        return layout.is_fenced(self.directory, self.head.incarnation)

    async def _watch_for_newer(self) -> None:
        """A head that was thought dead (frozen, cut off) finds that others went on, and makes way."""
        while True:
            with self._errors.caught("look for newer heads"):
                if await self._off_loop(self._is_fenced):
                    self._event("fenced", node=self.head.node, incarnation=self.head.incarnation)
                    self._resign("a newer incarnation has begun")
                    return
                await self._off_loop(self._restore)
            await asyncio.sleep(FENCE_EVERY)

    def _restore(self) -> None:
        """Put back what an older head's late words lie over."""
        for file in (self._head_file, self._members_file, self._duties_file):
            if file.restore():
                self._event("restored", file=file.path.name)

    async def abandon(self) -> None:
        """Stop being the head, at once and without orders to anybody: they follow, or have, another."""
        self._closed = self._ending = True
        for task in list(self._tasks):
            task.cancel()
        self._drivers.kill()
        if self._node_loop is not None:
            self._node_loop.stop()
        await self._off_loop(lambda: None)  # what was to be written is
        self._files.shutdown()

    # -- the node loop ------------------------------------------------------------------------------

    async def _keep_nodes(self) -> None:
        """Turn the node loop: lost nodes are replaced, what Slurm drains is left, and so on."""
        backend = backends.of(self.cluster.backend)
        loop = self._node_loop = await self._off_loop(NodeLoop, self.directory, self.config, backend)
        await self._ready.wait()
        if not self._elected:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.enough.wait(), ABOARD_LIMIT)
        with self._errors.caught("question whether jobs can be submitted"):
            config, cluster = self.config, self.cluster
            why = await asyncio.to_thread(submits.may_submit, backend, self.directory, cluster, config)
            for event in loop.cannot_submit(cluster, why) if why else ():
                self._event(**event)
        while True:
            self._nodes_changed.clear()
            pause = LOOP_PAUSE
            with self._errors.caught("node loop"):
                memory = self._memory
                turn = await self._in_thread(
                    loop.turn, self.table(), memory.wanted, dict(memory.strikes), set(memory.draining), memory.scaled,
                    memory.continued,
                )  # fmt: skip
                self._carry_out(turn)
                pause = turn.pause
            await asyncio.sleep(LOOP_LEAST)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nodes_changed.wait(), pause)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """A turn of the node loop. Its thread goes on when the wait for it is cancelled: `_end_node_loop`."""
        future = asyncio.get_running_loop().run_in_executor(None, functools.partial(work, *arguments))
        self._turn = future
        return await asyncio.shield(future)

    async def _end_node_loop(self) -> None:
        """No job is submitted after this; one that is being submitted is waited for, as long as that may take."""
        if self._node_loop is not None:
            self._node_loop.stop()
        if self._turn is not None:
            await asyncio.wait({self._turn}, timeout=TURN_LIMIT)

    def _carry_out(self, turn: Turn) -> None:
        """What the node loop leaves to the head."""
        if self._ending:
            return
        for event in turn.events:
            self._event(**event)
        for node, reason in turn.strikes:
            self._strike(node, reason)
        for node, reason in [*turn.drain, *((node, "more nodes than wanted") for node in turn.release_nodes)]:
            self.drain(node, reason)
        left = turn.time_left.get(self.head.job)
        ends = time.time() + left if left is not None else None
        if ends is not None and abs(ends - (self._ends or 0.0)) > END_MOVES:
            self._ends = ends
            self._table_changed.set()
        for job, left in turn.time_left.items():
            if left is not None and left <= self._notice:  # the batch script may be gone, or late
                if job == self.head.job:
                    self.notice()
                else:
                    self._drain_job(job, "its job's time is up")
        if turn.give_up is not None:
            self.exit_code = 1
            self.begin_end(turn.give_up)

    def _drain_job(self, job: str, reason: str) -> None:
        if job == self._own("job") and not self._others_lead_on():
            return self.begin_end(reason, goes_on=True)  # with this joiner, the last node goes
        for member in list(self.members.table.values()):
            if member.info.get("job") == job:
                self.drain(member.node, reason)

    # -- requests ----------------------------------------------------------------------------

    async def _take_requests(self) -> None:
        while True:
            with self._errors.caught("taking of requests"):
                await self._answer_requests()
            await asyncio.sleep(REQUEST_EVERY)

    async def _answer_requests(self) -> None:
        """Do what is asked for, write down what must outlive this head, then delete the requests (see `requests`)."""
        for request in await self._off_loop(requests.take, self.directory, self.head.incarnation, [*self._requests]):
            self._requests[request.name] = request
            if request.name not in self._memory.taken:  # else the head before this one has done it
                await self._answer(request)
        over = [request for name, request in self._requests.items() if name in self._memory.taken]
        if not over:
            return
        if await self._off_loop(self._finish, asdict(self._memory), over):
            for request in over:
                del self._requests[request.name]
                self._memory.taken.remove(request.name)

    async def _answer(self, request: Request) -> None:
        taken = self._memory.taken
        taken.append(request.name)  # first: what the request changes may be written down at once
        try:
            if self._take(request.kind, request.values):
                taken.remove(request.name)
        except (KeyError, TypeError, ValueError) as error:
            taken.remove(request.name)
            del self._requests[request.name]
            self._event("request_refused", request=request.name, error=f"{type(error).__name__}: {error}")
            await self._off_loop(request.set_aside)

    def _finish(self, memory: dict[str, Any], over: list[Request]) -> bool:
        """Remember, and delete the requests; not when this head was replaced before they were remembered for sure."""
        if self._is_fenced():
            return False
        self._duties_file.write(memory)
        if self._is_fenced():
            return False
        for request in over:
            request.done()
        return True

    def _take(self, kind: str, wanted: Mapping[str, Any]) -> bool:
        """Do what a request asks for. Found twice, or by the next head, each is harmless:

        - `run`, `scale`, `strike`, `drain` and `notice` change what duties.json has, once for each name of a request. A
          run that waits already is not queued again.
        - `drained` is of the present driver: a node that does not drain is not ended, and one that does is free.
        - `down` and `walltime` ask for an end: they stay (the answer is True) until it has come, so that the next head
          goes on with it. Of another allocation, `walltime` is over; `up` removes what the last life left.
        """
        log.info("request %s %s", kind, dict(wanted))
        match kind:
            case "run":
                self._enqueue(str(wanted["run"]))
            case "down":
                self.begin_end("down", float(wanted.get("save_limit", SAVE_LIMIT)))
                return True
            case "walltime":
                if wanted.get("life", self.head.life) == self.head.life:
                    self.notice()
                    return True
            case "scale":
                self._memory.wanted, self._memory.scaled = int(wanted["nodes"]), True
                self._event("scaled", nodes=self._memory.wanted)
                self._table_changed.set()
                self._nodes_changed.set()
            case "strike":
                self._strike(str(wanted["node"]), str(wanted["reason"]))
            case "notice":
                self._drain_job(str(wanted["job"]), JOB_ENDS)
            case "drain":
                self.drain(str(wanted["node"]), str(wanted["reason"]))
            case "drained":
                self._drained(str(wanted["node"]))
            case _:
                raise ValueError(f"unknown kind {kind}")
        return False

    def _enqueue(self, run: str) -> None:
        if run not in self._memory.queue:
            self._memory.queue.append(run)
        self._queued.set()

    # -- runs --------------------------------------------------------------------------------

    async def _run_queue(self) -> None:
        """One run after the other, the whole cluster for each."""
        await self._ready.wait()
        if self.cluster.run is not None and not self._elected:  # else it trains already, on whoever is there
            await self._all_aboard()
        while True:
            await self._queued.wait()
            if not self._memory.queue:
                self._queued.clear()
                continue
            name = self._memory.running = self._memory.queue.pop(0)
            self._remember()
            making_way = asyncio.create_task(self._drivers.make_way(name, lambda: bool(self._memory.queue), SAVE_LIMIT))
            outcome = "failed"  # where that cannot be told: the cluster lives on
            with self._errors.caught(f"driving of run {name}"):
                outcome = await self._drivers.drive(name)
            making_way.cancel()
            if outcome == "fenced":  # the newer head has the run, and what is to be remembered of it
                return self._resign("a newer incarnation has begun")
            self._memory.running = ""
            if outcome == "queued":  # it goes on in another allocation
                self._memory.queue.insert(0, name)
                self._queued.clear()
            self._remember()
            for node in list(self._memory.draining):
                self._drained(node)
            if self.cluster.run is not None and outcome != "queued":
                self.exit_code = 0 if outcome == "finished" else 1
                self.begin_end(f"run {name} {outcome}")

    async def _all_aboard(self) -> None:
        """A submitted run begins with the minimum of nodes, and gives the others a moment."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.enough.wait(), ABOARD_LIMIT)
        deadline = time.monotonic() + LATE_LIMIT
        while time.monotonic() < deadline and self._ready_nodes() < self.cluster.max_nodes:
            await asyncio.sleep(0.1)

    def _ready_nodes(self) -> int:
        return sum(m.alive and m.info["state"] == "ready" for m in self.members.table.values())

    # -- the end of this allocation --------------------------------------------------------------

    def notice(self) -> None:
        """Slurm says that this allocation ends: its time limit is near, or it is preempted."""
        if not self._noticed and not self._ending:
            self._noticed = True
            self._spawn(self._act_on_notice())

    async def _act_on_notice(self) -> None:
        """Train on while there is time, save, and go on in another allocation if the run is not done."""
        job = await asyncio.to_thread(allocation.look, self.head.job)
        left = job.seconds_left if job is not None and job.seconds_left is not None else self._notice
        early = left > self._notice + allocation.SIGNAL_EARLY
        why = "preempted" if job is not None and (early or job.preempted) else "walltime"
        self._event("notice", why=why, seconds_left=left)
        budget = 0.0
        if why == "walltime":
            saving = await self._off_loop(self._longest_save)
            budget = allocation.budget(saving)
            await asyncio.sleep(max(0.0, left - budget))
        self.begin_end(why, max(5.0, min(left, budget or self._notice) - ENDING_LIMIT), goes_on=True)

    def _longest_save(self) -> float:
        """Seconds of the slowest save of the present run so far."""
        if not self._memory.running:
            return 0.0
        rows = state.read_lines(runs.directory(self.directory, self._memory.running) / state.EVENTS_FILE)
        return max((float(row.get("seconds", 0)) for row in rows if row["kind"] == "commit"), default=0.0)

    def terminated(self) -> bool:
        """SIGTERM came; whether the head sees to the end itself: it asks Slurm why, which decides what follows."""
        if self.cluster.backend != "slurm" or self._ending:
            return False
        self._spawn(self._act_on_signal())
        return True

    async def _act_on_signal(self) -> None:
        """The job of the head's node ends: the base job, or the joiner that the head came with. Still running: the
        grace before a preemption, so save. Else the end is now, and what was not asked for by a person goes on."""
        own = str(self._own("job") or self.head.job)
        is_base, others = own == self.head.job, self._others_lead_on()
        if not is_base and others:  # the run leaves this node first, then another one leads
            self.drain(self.head.node, JOB_ENDS)
            await asyncio.sleep(TERM_LIMIT)
            if not self._ending:
                self._resign(JOB_ENDS)
            return
        job = await asyncio.to_thread(allocation.look, own)
        with self._errors.caught("end of the allocation"):  # a storage that does not say keeps nobody from the end
            if await self._off_loop(self._is_fenced):  # what ends is not ours to see to any more
                return self._resign("a newer incarnation has begun")
            self._run_is_over = await self._off_loop(self._look_whether_over)
        if job is not None and job.state == "RUNNING":
            return self.notice() if is_base else self.begin_end(JOB_ENDS, goes_on=True)
        why = job.taken if job is not None else ""
        why = why or await asyncio.to_thread(allocation.why_ended, self.directory, own)
        if why and not is_base:
            why = f"the last joiner: {why}"
        comes_back = bool(why) and await asyncio.to_thread(allocation.is_requeued_by_slurm, own, why)
        if why and not comes_back and others:
            self._event("base_lost", job=own, why=why)
            self._resign(f"the base job ends ({why}), and the joiners go on")
        else:
            self._end_now(why, allocation.Onward.ITSELF if comes_back else allocation.Onward.SUCCESSOR)

    def _look_whether_over(self) -> bool:
        """Whether the present run has come to its end, and its driver only has things to do yet."""
        name = self._memory.running
        record = Run.read(runs.directory(self.directory, name)) if name else None
        return record is not None and record.state in runs.FINAL

    def _others_lead_on(self) -> bool:
        """Whether nodes of other jobs than this node's are there to go on."""
        own = self._own("job")
        return any(
            m.alive and m.info["state"] == "ready" and m.info.get("job") != own for m in self.members.table.values()
        )

    def _own(self, key: str) -> Any:
        """What the agent of the head's own node says of it."""
        member = self.members.table.get(self.head.node)
        return member.info.get(key) if member is not None else None

    def _end_now(self, why: str, onward: allocation.Onward) -> None:
        """End without saving, there is no time; what Slurm took (`why`) goes on elsewhere."""
        if why and (self._goes_on or (not self._ending and self._may_go_on())):
            self._goes_on, self._onward = why, onward  # also when the end had begun: how it goes on is known now
        if not self._ending:
            self._ending = True
            self._event("ending", reason=f"signal SIGTERM{f' ({why})' if why else ''}", goes_on=bool(self._goes_on))
        self._stop("signal SIGTERM")

    def _may_go_on(self) -> bool:
        """Whether there is something to go on with, and the limit of requeues is not reached."""
        unfinished = bool((self._memory.running and not self._run_is_over) or self._memory.queue)
        limit = self.config.elastic.max_requeues
        if unfinished and self._memory.continued >= limit:
            self._event("requeues_used_up", count=self._memory.continued, setting=f"elastic.max_requeues={limit}")
        return unfinished and self.cluster.backend == "slurm" and self._memory.continued < limit

    # -- the end -----------------------------------------------------------------------------

    def begin_end(self, reason: str, save_limit: float = SAVE_LIMIT, goes_on: bool = False) -> None:
        """End the cluster: save the run (bounded), then all agents, then this one. With `goes_on` it is
        the end of this allocation only."""
        if not self._ending:
            self._ending = True
            if goes_on and self._may_go_on():
                self._goes_on = reason
            self._event("ending", reason=reason, goes_on=bool(self._goes_on))
            self._spawn(self._end(reason, save_limit))

    async def _end(self, reason: str, save_limit: float) -> None:
        if not self._goes_on:
            self._memory.queue.clear()
        running = self._memory.running
        if running:
            run = runs.directory(self.directory, running)
            # Where that cannot be written nothing can be saved; what is committed goes on elsewhere all the same.
            await self._off_loop(self._tried, runs.request_stop, run, reason, bool(self._goes_on))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drivers.ended(), save_limit)
            record = await self._off_loop(Run.read, run)
            is_over = record is not None and record.state in runs.FINAL
            if not is_over and self._drivers.running:
                self._event("save_timed_out", run=running, seconds=save_limit)
            if is_over and not self._memory.queue:
                self._goes_on = ""  # it came to its end while it was asked to stop, or had and wrote its weights
        self._stop(reason)

    async def close(self, reason: str) -> None:
        """Send the other agents home and wait for their word, bounded."""
        self._ending = True
        for task in list(self._tasks):
            task.cancel()
        self._drivers.kill()  # before the nodes: it would take their end for a fault
        await self._drivers.ended()
        told = asyncio.create_task(self._tell_end(reason))
        loop_ended = asyncio.create_task(self._end_node_loop())
        everyone = [m for m in self.members.table.values() if m.node != self.head.node]
        others = [m for m in everyone if m.alive]  # of a node lost before, nothing is ours to end any more
        self._lost = [m.node for m in everyone if not m.alive and m.info["state"] not in {"ended", "failed"}]
        self.members.order("end")
        deadline = time.monotonic() + ENDING_LIMIT
        while any(m.alive for m in others) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await told
        await loop_ended
        self._unclean = {m.node: m.info.get("left", -1) for m in others if m.info.get("left") != 0}
        await self._off_loop(self._save_table, self.table())
        self.members.close()

    async def _tell_end(self, reason: str) -> None:
        """Have the end of a run told whose driver could not any more."""
        name = self._memory.running
        with self._errors.caught("telling of the end"):
            record = await self._off_loop(Run.read, runs.directory(self.directory, name)) if name else None
            if record is not None and record.state in {"running", "holding"} and not self._goes_on:
                await self._drivers.tell(name, TELL_LIMIT, f"its cluster ended ({reason})")

    def write_end(self, reason: str, left_here: int) -> None:
        """The last word: ended.json and the job's exit code; or the job starts anew. Nodes that did not
        report count as unclean."""
        self._closed = True
        self._files.shutdown()
        base = self.head.job
        if self._goes_on:
            # A full disk is no reason not to go on: the last commit is good.
            self._tried(self._duties_file.write, asdict(self._memory))
            for kind, fields in allocation.go_on(self.directory, base, self._goes_on, self._onward):
                self._append_event(kind, fields)
            return
        if self.cluster.run is not None and self.exit_code == 0:
            run = Run.read(runs.directory(self.directory, self.cluster.run))
            self.exit_code = 0 if run is not None and run.state == "finished" else 1
        unclean = dict(self._unclean) | ({self.head.node: left_here} if left_here else {})
        layout.write_end(self.directory, self.cluster.canary, reason, unclean, self._lost, self.exit_code)
        state.append_event(self.directory, "ended", reason=reason, unclean=unclean, lost=self._lost)
        if self.cluster.backend == "slurm":
            now = Cluster.read(self.directory) or self.cluster
            over = [job for job in now.jobs if job != base]  # joiners that wait
            allocation.give_back(over if self._batch_host_lives() else [*over, base])  # no script ends that one

    def _batch_host_lives(self) -> bool:
        return any(
            m.info.get("index") == 0 and not m.info.get("joiner") and m.node not in self._lost
            for m in self.members.table.values()
        )

    def _event(self, kind: str, **fields: Any) -> None:
        """One line of the cluster's events, written off the loop."""
        try:
            self._files.submit(self._append_event, kind, fields)
        except RuntimeError:  # that thread is over: these are the last words, from one of their own
            self._append_event(kind, fields)

    def _append_event(self, kind: str, fields: Mapping[str, Any]) -> None:
        try:
            state.append_event(self.directory, kind, **fields)
        except StateError as error:
            log.error("an event could not be written kind=%s fields=%s error=%r", kind, fields, str(error))

    def _tried(self, work: Callable[..., Any], *arguments: Any) -> None:
        """File work without which the rest goes on."""
        with self._errors.caught(f"end ({getattr(work, '__name__', work)})"):
            work(*arguments)
