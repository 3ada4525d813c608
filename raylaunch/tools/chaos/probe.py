"""Run inside a node: the processes of one cluster, and a signal to one of them.

    probe.py list CANARY                     → JSON rows: pid, ppid, start, argv, of what carries the marker
    probe.py signal CANARY PID START NUMBER  → "done", or an error: never to a process that is not the cluster's

A process is the cluster's when RAYLAUNCH_CANARY=CANARY is in its environment or in that of an
ancestor (a process that renames itself writes over its own). Standard library only, run by path.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def processes() -> dict[int, tuple[int, int, list[str], bytes]]:
    """pid → (ppid, start in ticks, argv, environment), of all that we may look at."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "stat").read_text()
            argv = (entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            environment = (entry / "environ").read_bytes()
        except OSError:  # it has ended, or is somebody else's
            continue
        fields = text[text.rindex(")") + 2 :].split()
        if fields[0] not in "ZX":
            found[int(entry.name)] = (int(fields[1]), int(fields[19]), argv, environment)
    return found


def marked(canary: str) -> dict[int, tuple[int, int, list[str], bytes]]:
    """Those of the cluster; not this process."""
    table = processes()
    mark = f"RAYLAUNCH_CANARY={canary}".encode()

    def is_ours(pid: int) -> bool:
        seen: set[int] = set()
        while pid in table and pid not in seen:
            if mark in table[pid][3].split(b"\0"):
                return True
            seen.add(pid)
            pid = table[pid][0]
        return False

    return {pid: row for pid, row in table.items() if pid != os.getpid() and is_ours(pid)}


def main(argv: list[str]) -> int:
    if argv[0] == "list":
        rows = [{"pid": p, "ppid": r[0], "start": r[1], "argv": r[2]} for p, r in sorted(marked(argv[1]).items())]
        print(json.dumps(rows))
        return 0
    canary, pid, start, number = argv[1], int(argv[2]), int(argv[3]), int(argv[4])
    try:
        fd = os.pidfd_open(pid)  # pins it while we look
    except ProcessLookupError:
        print("gone", file=sys.stderr)
        return 1
    row = marked(canary).get(pid)
    if row is None or row[1] != start:
        print("not a process of this cluster", file=sys.stderr)
        return 1
    signal.pidfd_send_signal(fd, number)
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
