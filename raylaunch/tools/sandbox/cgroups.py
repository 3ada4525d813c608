"""The sandbox's cgroups: how its processes are found, frozen and ended, all at once.

Every process of a sandbox lives in the cgroup2 group `raylaunch-sandbox-NAME/<part>`, which
children inherit and cannot leave unnoticed. So ending a sandbox needs no list of pids, even
when its `up` was killed half-way. No controller is switched on: nothing is limited.

Slurm's proctrack/cgroup additionally wants a v1 freezer hierarchy; each node sees a subtree.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Literal

from raylaunch.errors import SandboxError
from raylaunch.tools.sandbox.procs import Proc, wait_for
from raylaunch.tools.sandbox.spec import BASE, PREFIX, SandboxLayout

Kind = Literal["cgroup2", "freezer"]


def mount_point(kind: Kind, layout: SandboxLayout) -> Path | None:
    """Where that hierarchy is mounted: by the machine, or by this sandbox, or not at all."""
    own = None
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, fstype, options = line.split()[:4]
        if fstype == "cgroup2" if kind == "cgroup2" else fstype == "cgroup" and "freezer" in options.split(","):
            if not target.startswith(f"{BASE}/{PREFIX}"):
                return Path(target)
            if target == str(_own_mount(kind, layout)):
                own = Path(target)
    return own


def ensure_mount(kind: Kind, layout: SandboxLayout) -> Path | None:
    """As `mount_point`, but mounts the hierarchy in the sandbox's directory where it is missing."""
    found = mount_point(kind, layout)
    if found is not None:
        return found
    target = _own_mount(kind, layout)
    target.mkdir(parents=True, exist_ok=True)
    how = ["-t", "cgroup2"] if kind == "cgroup2" else ["-t", "cgroup", "-o", "freezer"]
    done = subprocess.run(["mount", *how, "none", str(target)], capture_output=True, text=True, check=False)
    return target if done.returncode == 0 else None


def unmount_own(layout: SandboxLayout) -> None:
    """Undo `ensure_mount`."""
    kinds: tuple[Kind, ...] = ("cgroup2", "freezer")
    for kind in kinds:
        target = _own_mount(kind, layout)
        if target.is_mount():
            subprocess.run(["umount", str(target)], capture_output=True, check=False)


def group(layout: SandboxLayout, part: str = "") -> Path:
    """The sandbox's cgroup2 directory, or that of one part of it ("head", "node1", …)."""
    root = mount_point("cgroup2", layout)
    if root is None:
        raise SandboxError("no cgroup2 file system is mounted", "mount -t cgroup2 none /sys/fs/cgroup/unified")
    return root / layout.cgroup / part


def freezer_group(layout: SandboxLayout, part: str = "") -> Path | None:
    root = mount_point("freezer", layout)
    return None if root is None else root / layout.cgroup / part


def populated(path: Path) -> bool:
    """Whether a living process is in the group or below it; zombies do not count."""
    return _events(path).get("populated") == "1"


def frozen(path: Path) -> bool:
    """Whether the group is frozen or on its way there."""
    try:
        return (path / "cgroup.freeze").read_text().strip() == "1"
    except FileNotFoundError:
        return False


def set_frozen(path: Path, frozen: bool) -> None:
    """Freeze or thaw all processes of the group, and wait until the kernel says it is so."""
    value = "1" if frozen else "0"
    (path / "cgroup.freeze").write_text(value)
    wait_for(f"{path.name} {'frozen' if frozen else 'thawed'}", lambda: _events(path).get("frozen") == value, 10)


def kill(path: Path) -> None:
    """SIGKILL every process of the group, frozen ones too, and wait until they are gone."""
    members = processes(path)

    def gone() -> bool:
        # Again and again: an orphan of an `up` that was killed may enter the group after the first time.
        with contextlib.suppress(FileNotFoundError):
            (path / "cgroup.kill").write_text("1")
        # The group counts as empty a little before its last process has ended.
        return not populated(path) and not any(proc.alive() for proc in members)

    wait_for(
        f"processes of {path.name} gone",
        gone,
        20,
        lambda: f"still there: {processes(path)}",
    )


def processes(path: Path) -> list[Proc]:
    """The processes of the group and of those below it."""
    found = []
    for here, _, _ in os.walk(path):
        # Groups and processes may go while we look.
        with contextlib.suppress(OSError):
            for pid in (Path(here) / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    found.append(Proc.of(int(pid)))
    return found


def remove(path: Path) -> None:
    """Remove an empty group with all below it; nothing to do when it is not there."""

    def gone() -> bool:
        for here, _, _ in os.walk(path, topdown=False):
            # Busy for a moment after its last process ended; a vanished one is what we want.
            with contextlib.suppress(OSError):
                Path(here).rmdir()
        return not path.exists()

    wait_for(f"cgroup {path} removed", gone, 5)


def _own_mount(kind: Kind, layout: SandboxLayout) -> Path:
    return layout.dir / "mnt" / kind


def _events(path: Path) -> dict[str, str]:
    try:
        text = (path / "cgroup.events").read_text()
    except OSError:  # FileNotFoundError before opening, ENODEV while it is being removed
        return {}
    return dict(line.split() for line in text.splitlines())
