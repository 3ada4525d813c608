"""The node loop on the login node (`raylaunch watch`), where the head cannot submit or nobody lives on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylaunch import layout, state
from raylaunch.backends import Backend
from raylaunch.config import Config
from raylaunch.layout import Cluster
from raylaunch.memory import Memory
from raylaunch.nodeloop import NodeLoop


def watch(directory: Path, config: Config, backend: Backend, say: Callable[[dict[str, Any]], None]) -> str:
    """Turn the loop from the login node until the cluster has ended; why it ended. Events go to the cluster's
    and to `say`. What only the head can do is asked of it."""
    loop = NodeLoop(directory, config, backend, watcher=True)
    first = Cluster.read(directory)
    asked: set[str] = set()
    while True:
        cluster = Cluster.read(directory)
        if cluster is None or first is None or cluster.canary != first.canary:
            return "it was brought up anew"
        if (ended := state.read_json(directory / layout.ENDED_FILE)) is not None:
            return str(ended.get("reason"))
        memory = Memory.read(directory, cluster)
        members = state.read_json(directory / layout.MEMBERS_FILE) or {}
        table = members.get("nodes", []) if members.get("canary") == cluster.canary else []
        scaled = memory.scaled
        asked &= {str(row["name"]) for row in table if row["state"] not in {"ended", "failed", "lost"}}
        turn = loop.turn(table, memory.wanted, memory.strikes, asked, scaled, memory.continued)
        for event in turn.events:
            say(event)
            state.append_event(
                directory, str(event["kind"]), **{k: v for k, v in event.items() if k != "kind"}, by="watch"
            )
        for node, reason in [*turn.drain, *((n, "more nodes than wanted") for n in turn.release_nodes)]:
            asked.add(node)
            layout.request(directory, "drain", node=node, reason=reason)
        if turn.give_up is not None:
            return turn.give_up
        time.sleep(turn.pause)
