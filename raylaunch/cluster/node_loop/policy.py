"""The node policy: facts in, decisions out. Pure: no clock, no files, no Slurm.

The node loop (`node_loop`) gathers the facts, executes the decisions and writes them down, each with
its reason and the setting behind it. A node that Slurm or its strikes take away counts as missing at
once, but leaves only while the minimum stands without it: its replacement comes first where needed.
Nothing is decided here about training; that a run moves onto or off a node is the driver's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raylaunch.cluster.node_loop.facts import ALIVE, NodeLoopFacts
from raylaunch.config.schema import ElasticConfig
from raylaunch.timing import BOOT_LIMIT, REJOIN_GRACE

SLURM_NOTICES = 60.0
"""Seconds within which Slurm has noticed a dead node: before, a joiner could be sent to it."""
JOINER_NODES = 8
"""The most nodes of one joiner where nodes are shared. Where not, each has one: it ends by itself, and
gives its node back then."""
RETRY = (10.0, 600.0)
"""Seconds until the next joiner after one that brought no node; doubles, to at most the second."""
TAKEN = frozenset({"preempted", "timeout", "node_fail"})
"""Ends of a job that Slurm brought about, and no person or program."""


@dataclass(frozen=True)
class Hold:
    """Nothing to do."""

    reason: str
    setting: str = ""


@dataclass(frozen=True)
class Join:
    """Submit one joiner of one to `n` nodes that are none of `exclude`."""

    n: int
    exclude: tuple[str, ...]
    reason: str
    setting: str = ""


@dataclass(frozen=True)
class Amend:
    """A joiner that waits must keep off other nodes than when it was submitted."""

    job: str
    exclude: tuple[str, ...]
    reason: str
    setting: str = ""


@dataclass(frozen=True)
class Release:
    """Cancel the joiners `jobs`, which wait, and let the members `nodes` go once nothing runs there."""

    jobs: tuple[str, ...]
    nodes: tuple[str, ...]
    reason: str
    setting: str = ""


@dataclass(frozen=True)
class Drain:
    """The run must leave this node at its next step; then its agent ends."""

    node: str
    reason: str
    setting: str = ""


@dataclass(frozen=True)
class Resume:
    """The base job is gone and nobody lives on: the cluster goes on in a successor of it."""

    reason: str
    setting: str = ""


@dataclass(frozen=True)
class GiveUp:
    """Too few nodes, and none can come."""

    reason: str
    setting: str = ""


Decision = Hold | Join | Amend | Release | Drain | Resume | GiveUp


def decide(facts: NodeLoopFacts, elastic: ElasticConfig) -> list[Decision]:
    """The node loop's next moves, at least one; [Hold] when there is nothing to do."""
    if not facts.slurm_answers:
        return [Hold("Slurm does not answer")]
    minimum = elastic.min_nodes or 1
    count = NodeCounts(facts, excluded(facts.strikes, elastic))
    leaving = _leaving(facts, count, minimum, elastic)
    out: list[Decision] = [*leaving]
    surplus = count.staying + count.booting + count.waiting - max(count.wanted, min(facts.ceiling, facts.max_nodes))
    if surplus > 0:
        release = _release(facts, count, surplus, minimum)
        return [*out, *([release] if release is not None else [])] or [
            Hold(f"{surplus} nodes too many, still starting")
        ]
    if _is_over(facts, count):
        return [_resume(facts, elastic)]
    out += [
        Amend(j.job, count.exclude, "the nodes to keep off have changed")
        for j in facts.joiners
        if j.pending and not facts.refused and set(j.exclude) - facts.barred != set(count.exclude) - facts.barred
    ]
    return [*out, *_fill(facts, count, elastic)] or [_stand(facts, count, minimum, elastic)]


def excluded(strikes: Mapping[str, int], elastic: ElasticConfig) -> frozenset[str]:
    """The nodes that have struck out."""
    return frozenset(node for node, count in strikes.items() if count >= elastic.max_strikes)


class NodeCounts:
    """The nodes of the facts by what can be expected of them."""

    def __init__(self, facts: NodeLoopFacts, struck_out: frozenset[str]) -> None:
        self.struck_out = struck_out
        self.wanted = min(facts.wanted, facts.max_nodes)
        alive = [m for m in facts.members if m.state in ALIVE]
        unwanted = facts.draining | struck_out
        self.alive = len(alive)
        self.to_leave = [m for m in alive if m.name in unwanted]
        self.staying = self.alive - len(self.to_leave)
        heard = {(m.name, m.job) for m in facts.members} | {(m.name, "") for m in alive}
        running = [(j.job, j.nodes, j.age) for j in facts.joiners if not j.pending]
        if facts.base.state == "running":
            running.append((facts.base.job, facts.base.nodes, facts.base.age))
        self.booting = sum(
            age < BOOT_LIMIT and not {(node, job), (node, "")} & heard and node not in facts.failed | facts.down
            for job, nodes, age in running
            for node in nodes
        )
        self.waiting = sum(j.count for j in facts.joiners if j.pending)
        self.base_waits = facts.base.count if facts.base.state == "pending" else 0
        self.returning = sum(
            m.state == "lost" and m.age < REJOIN_GRACE and m.name not in facts.down | unwanted for m in facts.members
        )
        known = {(m.name, m.job) for m in facts.members}
        ours = {n for job, nodes, age in running for n in nodes if age < BOOT_LIMIT and (n, job) not in known}
        ours |= {m.name for m in facts.members if m.state in ALIVE or m.state == "draining"}
        # Not for longer than needed: Slurm refuses a job that leaves out all nodes there are.
        unnoticed = {n for _, nodes, _ in running for n in nodes} - facts.down
        ours |= {m.name for m in facts.members if m.state == "lost" and m.age < SLURM_NOTICES} & unnoticed
        self.exclude = tuple(sorted(struck_out | ours))
        """Where a joiner must not start: struck out, ours already, or dead without Slurm's knowing."""

    @property
    def coming(self) -> int:
        return self.booting + self.waiting + self.base_waits + self.returning


def _leaving(facts: NodeLoopFacts, count: NodeCounts, minimum: int, elastic: ElasticConfig) -> list[Decision]:
    """Drain what must go, as long as the minimum stands; the head last, since that costs an election."""
    found: list[Decision] = []
    remaining = count.alive
    for node in sorted(count.to_leave, key=lambda m: (m.head, m.name)):
        if remaining - 1 < minimum:
            break
        remaining -= 1
        if node.name in count.struck_out:
            reason = f"{node.name} was lost or broken {facts.strikes[node.name]} times"
            found.append(Drain(node.name, reason, f"elastic.max_strikes={elastic.max_strikes}"))
        else:
            found.append(Drain(node.name, f"Slurm drains {node.name}"))
    return found


def _release(facts: NodeLoopFacts, count: NodeCounts, surplus: int, minimum: int) -> Release | None:
    """What is too much: joiners that wait, then members of joiners, then of the base; the newest first."""
    jobs: list[str] = []
    rest = surplus
    for joiner in reversed([j for j in facts.joiners if j.pending]):
        # One that asks for more nodes than are too many goes as well: what is missing then is asked for anew.
        if rest > 0:
            jobs.append(joiner.job)
            rest -= joiner.count
    order = {j.job: i for i, j in enumerate(facts.joiners)}
    leaving = {m.name for m in count.to_leave}
    staying = [m for m in facts.members if m.state in ALIVE and not m.head and m.name not in leaving]
    staying.sort(key=lambda m: (order.get(m.job, -1), m.name), reverse=True)
    room = max(0, count.staying - max(minimum, count.wanted))
    nodes = [m.name for m in staying[: max(0, min(rest, room))]]
    if not jobs and not nodes:
        return None
    have = count.staying + count.booting + count.waiting
    return Release(tuple(jobs), tuple(nodes), f"{have} nodes are there or asked for", f"wanted={count.wanted}")


def _is_over(facts: NodeLoopFacts, count: NodeCounts) -> bool:
    return facts.base.state == "gone" and not facts.joiners and count.alive == 0


def _resume(facts: NodeLoopFacts, elastic: ElasticConfig) -> Decision:
    """The whole allocation is gone: go on in a new one, unless a person ended it."""
    how = facts.base.ended or "gone: Slurm has forgotten how"
    setting = f"elastic.max_requeues={elastic.max_requeues}"
    if how not in TAKEN:
        return GiveUp(f"the base job is over ({how})")
    if facts.resumes >= elastic.max_requeues:
        return GiveUp(f"the base job ended ({how}) after {facts.resumes} times in another allocation", setting)
    if facts.refused:
        return Hold(f"the base job ended ({how}), and no successor can be submitted: {facts.refused}")
    wait = _retry(facts.failed_joiners)
    if facts.since_submit < wait:
        return Hold(f"the last submission was {facts.since_submit:.0f} s ago; the next after {wait:.0f} s")
    return Resume(f"the base job ended ({how})", setting)


def _retry(failed: int) -> float:
    return min(RETRY[1], RETRY[0] * 2.0 ** (min(failed, 20) - 1)) if failed else 0.0


def _fill(facts: NodeLoopFacts, count: NodeCounts, elastic: ElasticConfig) -> list[Decision]:
    """A joiner for what is missing, or for what is idle where idle nodes are to be taken."""
    missing = count.wanted - count.staying - count.coming
    setting = f"elastic.replace={str(elastic.replace).lower()}"
    taking = min(facts.ceiling, facts.max_nodes) - count.staying - count.coming
    if missing > 0 and (elastic.replace or elastic.join.partition is not None):
        n, reason = missing, f"{count.staying} of {count.wanted} nodes are alive, {count.coming} coming"
    elif missing <= 0 and taking > 0 and facts.idle > 0 and count.waiting == 0:
        n, reason = min(taking, facts.idle), f"{facts.idle} nodes are idle"
        setting = f"elastic.join.partition={elastic.join.partition}"
    else:
        return []
    if facts.refused:
        return []
    pending = sum(j.pending for j in facts.joiners)
    room = (1 if facts.shared else elastic.join.max_pending) - pending
    if room <= 0:
        setting = f"elastic.join.max_pending={elastic.join.max_pending}"
        return [Hold(f"{n} nodes are missing, and {pending} joiners wait already", setting)]
    wait = _retry(facts.failed_joiners)
    if facts.since_submit < wait:
        return [Hold(f"{facts.failed_joiners} joiners in a row brought no node; the next after {wait:.0f} s")]
    if facts.shared:
        return [Join(min(n, JOINER_NODES), count.exclude, reason, setting)]
    return [Join(1, count.exclude, reason, setting)] * min(n, room)


def _stand(facts: NodeLoopFacts, count: NodeCounts, minimum: int, elastic: ElasticConfig) -> Decision:
    """Nothing to do: why."""
    if count.alive >= minimum:
        if count.wanted <= count.staying:
            return Hold(f"{count.staying} of {count.wanted} nodes are alive")
        why = facts.refused or ("" if elastic.replace else "nothing is replaced")
        return Hold(
            f"{count.staying} of {count.wanted} nodes are alive, {count.coming} coming" + (f"; {why}" if why else "")
        )
    stuck = sum(j.count for j in facts.joiners if j.pending and j.blocked)
    if count.coming - stuck <= 0 and not facts.watched and facts.below_min >= elastic.min_nodes_timeout:
        return GiveUp(
            f"{count.alive} of at least {minimum} nodes for {facts.below_min:.0f} s, and none can come"
            + (f": {facts.refused}" if facts.refused else ""),
            f"elastic.min_nodes_timeout={elastic.min_nodes_timeout}",
        )
    return Hold(f"{count.alive} of at least {minimum} nodes, {count.coming} coming", f"elastic.min_nodes={minimum}")
