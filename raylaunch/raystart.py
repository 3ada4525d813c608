"""The process that becomes `ray start --block` on one node.

Importing Ray takes a second or more. This process does it while the agent still waits for the
head's address; then it reads Ray's arguments as one JSON line from its standard input and goes on
as the `ray` command. It dies with the agent, and Ray's own processes die with it.
"""

from __future__ import annotations

import json
import sys

from raylaunch.processes import die_with_parent


def main() -> None:
    die_with_parent()
    from ray.scripts import scripts

    line = sys.stdin.readline()
    if not line:  # the agent ended before it knew the head's address
        return
    scripts.cli.main(args=json.loads(line), prog_name="ray")


if __name__ == "__main__":
    main()
