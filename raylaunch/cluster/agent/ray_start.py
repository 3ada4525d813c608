"""The process that becomes `ray start --block` on one node.

Importing Ray takes a second or more. This process does it while the agent still waits for the
head's address; then it reads Ray's arguments as one JSON line from its standard input and goes on
as the `ray` command. It dies with the agent, and Ray's own processes die with it.

Two things that Ray's head does before its node counts as started are put off or left out: the
dashboard (seconds of imports) starts when the agent says so by a second line, and the Ray Client
server (one more open port, which nothing here uses) not at all. A dashboard that dies is started
again; for Ray itself that would be the end of the head. All of it reaches into Ray's private parts,
which is one reason for the pinned version; where they are not as expected, Ray starts in its plain way.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from typing import Any

from raylaunch.host.processes import die_with_parent

DASHBOARD = "dashboard"
GUARD_EVERY = 0.2


def main() -> None:
    die_with_parent()
    from ray._private.node import Node
    from ray.scripts import scripts

    lighten(Node, scripts)
    line = sys.stdin.readline()
    if not line:  # the agent ended before it knew the head's address
        return
    scripts.cli.main(args=json.loads(line), prog_name="ray")


def lighten(node: Any, scripts: Any) -> None:
    """Put the dashboard behind the raylet, start it again when it dies, and leave the Ray Client server out."""
    if not all(hasattr(node, name) for name in ("start_api_server", "dead_processes")):
        print("raylaunch: this Ray has no such start order; it starts in its plain way", flush=True)
        return
    start_dashboard, dead_processes = node.start_api_server, node.dead_processes
    waiting: list[dict[str, Any]] = []
    given: dict[str, Any] = {}
    guarded: list[threading.Thread] = []

    def later(self: Any, **arguments: Any) -> None:
        waiting.append(arguments)
        given.update(arguments)

    def then(self: Any) -> Any:
        # `ray start --block` asks this once a second from when the node is up: our moment.
        if not guarded:
            guarded.append(threading.Thread(target=guard, args=(self,), daemon=True))
            guarded[0].start()
        while waiting and select.select([sys.stdin], [], [], 0)[0]:
            start_dashboard(self, **waiting.pop())
        if any(kind == DASHBOARD for kind, _ in dead_processes(self)):
            print("raylaunch: the dashboard has died; it starts again", flush=True)
            self.all_processes.pop(DASHBOARD)
            start_dashboard(self, **given)
        return dead_processes(self)

    def guard(self: Any) -> None:
        """End at once when the raylet or the GCS has died: starting a dashboard blocks for a minute then."""
        while not (dead := [kind for kind, _ in dead_processes(self) if kind != DASHBOARD]):
            time.sleep(GUARD_EVERY)
        print(f"raylaunch: failed: {', '.join(dead)} of Ray ended unexpectedly", flush=True)
        os._exit(1)  # the agent ends what is left

    node.start_api_server, node.dead_processes = later, then
    if hasattr(scripts, "get_ray_client_dependency_error"):
        # Ray takes this for "gRPC is not installed", and opens no port for Ray Client.
        scripts.get_ray_client_dependency_error = lambda: ImportError("left out by raylaunch")


if __name__ == "__main__":
    main()
