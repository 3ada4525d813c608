"""Taking a sandbox down, whatever state it is in, and looking whether something is left.

Nothing is read from the sandbox's own records: cgroups, links and directory follow from its
name. The order matters: first the processes, which hold the namespaces and their mounts.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from raylaunch.errors import SandboxError
from raylaunch.tools.sandbox import bridge, cgroups
from raylaunch.tools.sandbox.procs import wait_for
from raylaunch.tools.sandbox.spec import SandboxLayout


def down(layout: SandboxLayout) -> bool:
    """Remove all of a sandbox; True if there was something. SandboxError names what is left."""
    if not leftovers(layout, processes=False):
        return False
    if cgroups.mount_point("cgroup2", layout) is not None:
        group = cgroups.group(layout)
        cgroups.kill(group)
        cgroups.remove(group)
    freezer = cgroups.freezer_group(layout)
    if freezer is not None:
        cgroups.remove(freezer)
    bridge.remove_all(layout)
    cgroups.unmount_own(layout)
    _remove_directory(layout)
    left = leftovers(layout)
    if left:
        raise SandboxError(
            f"sandbox {layout.name!r} is down, but some things remain: {'; '.join(left)}",
            f"end the processes that use it, then repeat: raylaunch sandbox down --name {layout.name}",
        )
    return True


def _remove_directory(layout: SandboxLayout) -> None:
    def gone() -> bool:
        # Users' programs outside the nodes may still be writing to state/: try again.
        shutil.rmtree(layout.dir, ignore_errors=True)
        return not layout.dir.exists()

    wait_for(f"directory {layout.dir} removed", gone, 5, lambda: "something still writes into it")


def leftovers(layout: SandboxLayout, processes: bool = True) -> list[str]:
    """What of the sandbox exists: directory, cgroups, links, and processes in its namespaces."""
    found = []
    if layout.dir.exists():
        found.append(f"directory {layout.dir}")
    kinds: tuple[cgroups.Kind, ...] = ("cgroup2", "freezer")
    for kind in kinds:
        root = cgroups.mount_point(kind, layout)
        if root is not None and (root / layout.cgroup).exists():
            found.append(f"cgroup {root / layout.cgroup}")
    found += [f"network link {name}" for name in bridge.existing(layout)]
    if processes:
        found += [f"process {pid} in its mount namespaces" for pid in _inside(layout)]
    return found


def _inside(layout: SandboxLayout) -> list[int]:
    """Pids that still see mounts of a node or daemon: all have /etc/hosts from the directory."""
    pids = []
    needle = f" {layout.dir}/etc/hosts"
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            mounts = (entry / "mountinfo").read_text(errors="replace")
        except OSError:  # ended meanwhile, or a zombie: it has no mounts
            continue
        if needle in mounts:
            pids.append(int(entry.name))
    return pids
