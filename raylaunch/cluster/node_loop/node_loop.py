"""The node loop: gathers the facts about nodes and jobs, asks the policy, and deals with Slurm.

    the head's table, one squeue for all jobs, one sinfo for all nodes → Facts → policy.decide
      → joiners submitted, amended or cancelled here; drains and releases handed to the caller

The head turns it every few seconds. Where compute nodes may not submit jobs, it says so once, and
`raylaunch watch` turns it on the login node: one of the two submits, never both. Blocking calls;
nothing is kept in it that a new loop would not find out again. It ends no node's agent itself.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from raylaunch.checkpoint.events import Event
from raylaunch.cluster.node_loop import policy, scheduler_view, submitter
from raylaunch.cluster.node_loop.facts import ALIVE, Joiners, Node, NodeLoopFacts
from raylaunch.cluster.node_loop.policy import Decision
from raylaunch.cluster.node_loop.scheduler_view import SchedulerView
from raylaunch.config.schema import Config
from raylaunch.errors import SlurmError, SlurmUnavailable, StateError
from raylaunch.scheduler.backends import Backend, LocalBackend, SlurmBackend
from raylaunch.scheduler.slurm import allocation, batch_script
from raylaunch.state import files, records
from raylaunch.state.members import OVER, MemberRow
from raylaunch.state.node_events import (
    JoinerAdopted,
    JoinerRefused,
    JoinerSubmitted,
    NodeDecision,
    NodeExcluded,
    SlurmUnreachable,
    Successor,
)
from raylaunch.state.records import Cluster, Head
from raylaunch.timing import BOOT_LIMIT

BUSY, QUIET, SILENT = 2.0, 10.0, 60.0
"""Seconds to the next turn: while something is under way, otherwise, and at most while Slurm is silent."""
ASK_AGAIN, LOOK_AGAIN = 300.0, 10.0
"""Seconds after which a site that refused a joiner is asked again (limits of jobs pass), and one that has
no further node now."""
NO_NODE = "node configuration is not available"


@dataclass
class LoopResult:
    """What came of one turn, for the caller to write down and to execute."""

    events: list[Event] = field(default_factory=list)
    drain: list[tuple[str, str]] = field(default_factory=list)
    """(node, reason): the run must leave these at its next step, then their agents end."""
    release_nodes: list[str] = field(default_factory=list)
    """The same for nodes that are too many."""
    strikes: list[tuple[str, str]] = field(default_factory=list)
    """(node, reason): nodes whose agent could not start."""
    exclude: list[str] = field(default_factory=list)
    """Nodes that have struck out since the last turn."""
    give_up: str | None = None
    time_left: dict[str, int | None] = field(default_factory=dict)
    """Job → seconds to its time limit."""
    job_nodes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Job → nodes that Slurm says it holds."""
    pause: float = QUIET
    """Seconds until the next turn, unless something happens before."""


class NodeLoop:
    """One cluster's node loop. `watcher`: on the login node, beside or in place of the head's."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        backend: Backend,
        watcher: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory, self._config, self._backend, self._watcher = directory, config, backend, watcher
        self._clock = clock
        self._barred = batch_script.barred(config.slurm)
        self._refused = ("", 0.0)
        self._seen: dict[str, tuple[str, float]] = {}
        self._said: dict[str, str] = {}
        self._joiners = Joiners()
        self._submitted = -1e9
        self._below: float | None = None
        self._silent = 0.0
        self._excluded: frozenset[str] | None = None
        # What lies there already was counted by another loop, or befell nodes that nobody led.
        self._struck = dict(self._failures())
        self._over = threading.Event()

    def stop(self) -> None:
        """Submit nothing any more, from any thread: the cluster's jobs are about to be read for the last time."""
        self._over.set()

    def turn(
        self,
        table: Sequence[MemberRow],
        wanted: int,
        strikes: Mapping[str, int],
        draining: set[str] | None = None,
        scaled: bool = False,
        resumes: int = 0,
    ) -> LoopResult:
        """One turn. `table`: the rows of members.json; `wanted`: 0 for as many as the base job got;
        `scaled`: a person chose `wanted`, so that idle nodes are not taken beyond it."""
        turn = LoopResult()
        cluster = Cluster.read(self._directory)
        if cluster is None:
            raise StateError(f"{self._directory / records.CLUSTER_FILE} is gone", "End the cluster's jobs by hand.")
        try:
            view = scheduler_view.snapshot(self._backend, self._directory, cluster, self._config)
            self._silent = 0.0
        except SlurmUnavailable as error:
            self._silent = min(SILENT, max(BUSY, 2 * self._silent))
            turn.pause = self._silent
            self._decided(turn, policy.Hold("Slurm does not answer", error.message.splitlines()[0]))
            return turn
        turn.time_left, turn.job_nodes = dict(view.time_left), {j.job: j.nodes for j in view.joiners if not j.pending}
        if view.base.nodes:
            turn.job_nodes[view.base.job] = view.base.nodes
        members = self._members(table, view, draining or set())
        self._joiners = self._joiners.after(view.joiners, members, self._clock())
        self._strike_failures(turn)
        facts = self._facts(cluster, view, members, wanted, strikes, scaled, resumes)
        struck = policy.excluded(strikes, self._config.elastic)
        turn.exclude = sorted(struck - (self._excluded if self._excluded is not None else struck))
        self._excluded = struck
        turn.events += [NodeExcluded(node) for node in turn.exclude]
        self._adopt(view, cluster, turn)
        if view.waits_needlessly and isinstance(self._backend, SlurmBackend):
            with contextlib.suppress(SlurmError):  # it starts a little later, then
                self._backend.slurm.start_now(view.base.job)
        decisions = policy.decide(facts, self._config.elastic)
        for decision in decisions:
            self._do(decision, cluster, turn)
        calm = all(isinstance(d, policy.Hold) for d in decisions) and not any(j.pending for j in view.joiners)
        settled = all(m.state in {"ready", "ended", "failed", "lost"} for m in members) and view.base.state == "running"
        turn.pause = QUIET if calm and settled and self._alive(members) >= facts.wanted else BUSY
        return turn

    # -- facts -------------------------------------------------------------------------------------

    def _members(self, table: Sequence[MemberRow], view: SchedulerView, draining: set[str]) -> tuple[Node, ...]:
        now = self._clock()
        held = {(view.base.job, node) for node in view.base.nodes} | {(j.job, n) for j in view.joiners for n in j.nodes}
        found = []
        for row in table:
            name, job, condition = row.name, row.job, row.state
            if self._watcher and job and (job, name) not in held and condition not in OVER:
                condition = "lost"  # nobody may be left to write that down
            elif name in draining and condition in ALIVE:
                condition = "draining"
            if self._seen.get(name, ("", 0.0))[0] != condition:
                # What was so before this loop began is as old as its head says.
                self._seen[name] = (condition, now if name in self._seen else row.since)
            age = max(0.0, now - self._seen[name][1])
            found.append(Node(name, condition, job, age, row.role == "head"))
        return tuple(found)

    @staticmethod
    def _alive(members: Sequence[Node]) -> int:
        return sum(m.state in ALIVE for m in members)

    def _facts(
        self, cluster: Cluster, view: SchedulerView, members: tuple[Node, ...], wanted: int, strikes: Mapping[str, int],
        scaled: bool, resumes: int,
    ) -> NodeLoopFacts:  # fmt: skip
        now = self._clock()
        elastic = self._config.elastic
        if self._alive(members) >= (elastic.min_nodes or 1):
            self._below = None
        elif self._below is None:
            self._below = now
        ours = {m.name for m in members if m.state in ALIVE} | set(view.base.nodes)
        struck = policy.excluded(strikes, elastic)
        idle = sum(
            row.idle and elastic.join.partition in row.partitions and row.name not in ours | struck | self._barred
            for row in view.nodes.values()
        )
        into = elastic.join.partition is not None and not scaled
        return NodeLoopFacts(
            wanted=wanted or len(view.base.nodes) or cluster.min_nodes,
            max_nodes=self._config.max_nodes,
            ceiling=self._config.max_nodes if into else 0,
            members=members,
            joiners=view.joiners,
            base=view.base,
            strikes=strikes,
            draining=frozenset(n for n, row in view.nodes.items() if row.drains),
            down=frozenset(n for n, row in view.nodes.items() if row.down),
            failed=frozenset(n for n, when in self._struck.items() if now - when < BOOT_LIMIT),
            barred=self._barred,
            idle=idle,
            shared=not self._config.slurm.exclusive
            and any(view.nodes[n].state == "mixed" for n in view.base.nodes if n in view.nodes),
            refused=self._who_submits(cluster, view),
            watched=not self._watcher and submitter.is_watched(self._directory),
            failed_joiners=self._joiners.failed,
            since_submit=now - self._submitted,
            below_min=now - self._below if self._below is not None else 0.0,
            resumes=resumes,
        )

    def _who_submits(self, cluster: Cluster, view: SchedulerView) -> str:
        """Why not this loop; "" when it does."""
        why, until = self._refused
        if why and self._clock() < until:
            return why
        if not self._watcher:
            return ""
        head = Head.read(self._directory)
        held = {n for j in view.joiners for n in j.nodes} | set(view.base.nodes)
        lives = head is not None and head.canary == cluster.canary and head.node in held
        return "the head submits itself" if lives and not submitter.head_refusal(self._directory, cluster) else ""

    def _strike_failures(self, turn: LoopResult) -> None:
        """Agents that could not start say so in nodes/NAME.json; each time is a strike."""
        for node, when in self._failures():
            if self._struck.get(node) != when:
                self._struck[node] = when
                with contextlib.suppress(StateError):
                    error = (files.read_json(self._directory / records.NODES / f"{node}.json") or {}).get("error")
                    turn.strikes.append((node, f"could not start: {error}"))

    def _failures(self) -> Iterator[tuple[str, float]]:
        """(node, time of its last failed start)."""
        for path in (self._directory / records.NODES).glob("[!.]*.json"):
            with contextlib.suppress(OSError):
                yield path.stem, path.stat().st_mtime

    # -- deeds ---------------------------------------------------------------------------------------

    def _decided(self, turn: LoopResult, decision: Decision) -> None:
        """One event a decision. To hold for the same reason is said once, and to want the same joiner that
        cannot be had, too."""
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(decision).__name__).lower()
        key = re.sub(r"\d+ s\b", "", f"{decision}")
        if name in {"hold", "join"} and self._said.get(name) == key:
            return
        if name not in {"hold", "join"}:
            self._said.pop("hold", None)
        self._said[name] = key
        turn.events.append(NodeDecision(name, **asdict(decision)))

    def _do(self, decision: Decision, cluster: Cluster, turn: LoopResult) -> None:
        self._decided(turn, decision)
        try:
            match decision:
                case policy.Join(n=n, exclude=exclude):
                    self._submit(cluster, turn, n, exclude)
                case policy.Resume():
                    self._resume(cluster, turn)
                case policy.Amend(job=job, exclude=exclude) if isinstance(self._backend, SlurmBackend):
                    slurm = self._config.slurm
                    self._backend.slurm.keep_off(job, [batch_script.excluded(slurm, exclude) or ""])
                case policy.Release(jobs=jobs, nodes=nodes):
                    self._joiners = self._joiners.let_go(jobs, nodes)
                    if jobs:
                        self._backend.cancel(self._directory, jobs)
                    turn.release_nodes += nodes
                case policy.Drain(node=node, reason=reason):
                    turn.drain.append((node, reason))
                    self._joiners = self._joiners.let_go(nodes=[node])
                case policy.GiveUp(reason=reason):
                    turn.give_up = reason
        except SlurmUnavailable as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, subprocess.TimeoutExpired):
                self._refuse(cluster, turn, error)  # there is no such command here
            else:
                self._submitted = self._clock()  # it may be queued all the same: its comment will tell
                turn.events.append(SlurmUnreachable(error.message))
        except SlurmError as error:
            self._refuse(cluster, turn, error)

    def _submit(self, cluster: Cluster, turn: LoopResult, nodes: int, exclude: Sequence[str]) -> None:
        with self._appending(cluster, turn) as append:
            if append is None:
                return
            if isinstance(self._backend, LocalBackend):
                job = self._backend.join(self._directory, cluster, nodes)
            else:
                name, canary = cluster.name, cluster.canary
                script = batch_script.render_joiner(self._config, name, self._directory, canary, nodes, exclude)
                job = self._backend.submit(self._directory, cluster, script)
            append(job)
        self._submitted = self._clock()
        self._joiners = self._joiners.with_one(job)
        self._said.pop("join", None)
        turn.events.append(JoinerSubmitted(job, nodes, list(exclude)))
        self._tell_refusal(cluster, "")

    def _resume(self, cluster: Cluster, turn: LoopResult) -> None:
        with self._appending(cluster, turn) as append:
            if append is None:
                return
            self._submitted = self._clock()
            job = self._backend.submit(
                self._directory, cluster, (self._directory / records.SCRIPT_FILE).read_text(encoding="utf-8")
            )
            append(job)
        turn.events.append(Successor(job))

    @contextlib.contextmanager
    def _appending(self, cluster: Cluster, turn: LoopResult) -> Iterator[Callable[[str], None] | None]:
        """Record the job that is submitted under this; None when somebody else has submitted since the
        facts were gathered, so that no hole is filled twice. (Successive joins of one turn are our own.)"""
        with self._locked(turn):
            now = Cluster.read(self._directory)
            known = {*cluster.jobs, *self._joiners.jobs}
            if self._over.is_set() or now is None or now.canary != cluster.canary or not set(now.jobs) <= known:
                yield None
                return
            latest = now

            def append(job: str) -> None:
                replace(latest, jobs=(*latest.jobs, job)).write(self._directory / records.CLUSTER_FILE)

            yield append

    @contextlib.contextmanager
    def _locked(self, turn: LoopResult) -> Iterator[None]:
        with allocation.locked(self._directory) as is_ours:
            if is_ours:
                self._said.pop("lock_held", None)
            elif "lock_held" not in self._said:
                self._said["lock_held"] = "once"
                turn.events.append(allocation.lock_was_held(self._directory))
            yield

    def _adopt(self, view: SchedulerView, cluster: Cluster, turn: LoopResult) -> None:
        """Record jobs whose submitter was killed before it could."""
        for job in view.unrecorded:
            with self._locked(turn):
                now = Cluster.read(self._directory)
                if now is not None and now.canary == cluster.canary and job not in now.jobs:
                    replace(now, jobs=(*now.jobs, job)).write(self._directory / records.CLUSTER_FILE)
            self._joiners = self._joiners.with_one(job)
            turn.events.append(JoinerAdopted(job))

    def _refuse(self, cluster: Cluster, turn: LoopResult, error: SlurmError) -> None:
        """Say once that this place cannot submit; it is tried again, seldom."""
        text = " ".join(error.message.split())
        if NO_NODE in text:  # all that there are, are ours, excluded or dead: no matter of who submits
            self._refused = ("no further node can join", self._clock() + LOOK_AGAIN)
            return
        if self._said.get("refused") != text:
            self._said["refused"] = text
            hint = "`raylaunch watch` on a login node submits in its place."
            turn.events.append(JoinerRefused(text, "" if self._watcher else hint))
        self._refused = (text, self._clock() + ASK_AGAIN)
        self._tell_refusal(cluster, text)

    def _tell_refusal(self, cluster: Cluster, text: str) -> None:
        """Let a watcher know whether the head submits."""
        if not self._watcher and submitter.head_refusal(self._directory, cluster) != text:
            files.write_json(self._directory / submitter.FILE, {"canary": cluster.canary, "refused": text})

    def cannot_submit(self, cluster: Cluster, why: str) -> list[Event]:
        """Found out before the first joiner is needed (`submitter.may_submit`): the events to write."""
        turn = LoopResult()
        self._refuse(cluster, turn, SlurmError(why))
        return turn.events
