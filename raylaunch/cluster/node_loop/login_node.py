"""The node loop on the login node (`raylaunch watch`), where the head cannot submit or nobody lives on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from raylaunch.checkpoint.events import Event
from raylaunch.cluster.node_loop.node_loop import NodeLoop
from raylaunch.config.schema import Config
from raylaunch.scheduler.backends import Backend
from raylaunch.state import event_log, members, requests
from raylaunch.state.head_state import HeadState
from raylaunch.state.members import OVER, MemberRow
from raylaunch.state.records import Cluster, ClusterEnd
from raylaunch.state.requests import DrainAsk

ASK_AGAIN = 30.0
"""Seconds within which a head shows that a node drains, when it was asked for that."""


def watch(directory: Path, config: Config, backend: Backend, say: Callable[[Event], None]) -> str:
    """Turn the loop from the login node until the cluster has ended; why it ended. Events go to the cluster's
    and to `say`. What only the head can do is asked of it."""
    loop = LoginLoop(directory, config, backend, say)
    while (over := loop.turn()) is None:
        time.sleep(loop.pause)
    return over


class LoginLoop:
    """The loop of one life of a cluster."""

    def __init__(
        self, directory: Path, config: Config, backend: Backend, say: Callable[[Event], None],
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._directory, self._say, self._clock = directory, say, clock
        self._nodes = NodeLoop(directory, config, backend, watcher=True, clock=clock)
        self._first = Cluster.read(directory)
        self._asked: dict[str, float] = {}
        """Node → when the head was asked to drain it."""
        self.pause = 0.0
        """Seconds until the next turn."""

    def turn(self) -> str | None:
        """One turn; why the cluster has ended, if it has."""
        cluster = Cluster.read(self._directory)
        if cluster is None or self._first is None or cluster.canary != self._first.canary:
            return "it was brought up anew"
        if (end := ClusterEnd.read(self._directory)) is not None:
            return end.reason
        memory, table = HeadState.read(self._directory, cluster), members.living(self._directory, cluster).nodes
        self._asked = still_asked(self._asked, table, self._clock())
        turn = self._nodes.turn(table, memory.wanted, memory.strikes, set(self._asked), memory.scaled, memory.continued)
        for event in turn.events:
            self._tell(event)
        for node, reason in [*turn.drain, *((n, "more nodes than wanted") for n in turn.release_nodes)]:
            self._asked[node] = self._clock()
            requests.ask(self._directory, DrainAsk(node=node, reason=reason))
        self.pause = turn.pause
        return turn.give_up

    def _tell(self, event: Event) -> None:
        self._say(event)
        event_log.append(self._directory, event, by="watch")


def still_asked(asked: Mapping[str, float], table: Sequence[MemberRow], now: float) -> dict[str, float]:
    """The drains that the head was asked for and is seeing to. One that it does not show after a while is forgotten, to
    be asked for again: a node that another agent joined with is as good as new to its head."""
    states = {row.name: row.state for row in table}

    def stands(node: str) -> bool:
        condition = states.get(node, "ended")
        return condition == "draining" or (condition not in {*OVER, "lost"} and now - asked[node] < ASK_AGAIN)

    return {node: when for node, when in asked.items() if stands(node)}
