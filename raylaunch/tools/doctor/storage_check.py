"""The state directory: its file system, free space and speed.

    python -m raylaunch.tools.doctor.storage_check PATH    → one JSON line

It runs in a separate process (`look`), because a file system without its server blocks processes indefinitely. The test
writes at most 32 MiB to a temporary directory for at most a second, and removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ValidationError

from raylaunch.host.processes import kill_child
from raylaunch.text import size
from raylaunch.tools.doctor.finding import Finding, ok, problem, unknown, warning

LIMIT = 15.0
"""Seconds after which a file system counts as hung."""
CHUNK, CHUNKS, SECONDS = 4 << 20, 8, 1.0
SMALL_FILES = 5
GIB = 1 << 30
ROOM, ROOM_LEAST, FILES = 20 * GIB, GIB, 10_000

SHARED = {"9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "ocfs2", "orangefs",
          "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs"}  # fmt: skip
LOCAL = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "squashfs", "tmpfs", "xfs", "zfs"}


class Quota(BaseModel):
    """Bytes used and allowed; 0: no limit."""

    used: int
    limit: int


class Storage(BaseModel):
    """The results; `at` is the checked directory: the path, or its nearest existing parent."""

    path: str
    at: str
    type: str = ""
    source: str = ""
    free: int = 0
    total: int = 0
    files_free: int | None = None
    speed: float | None = None
    """Bytes per second, written and fsynced."""
    small: float | None = None
    """Seconds to write, fsync and rename a small file; the median of several."""
    error: str = ""
    quota: Quota | None = None


def file_system(path: str, mounts: str) -> tuple[str, str]:
    """(type, source) of the mount of a path, from the text of /proc/self/mountinfo; ("", "") if unknown."""
    best, found = -1, ("", "")
    for line in mounts.splitlines():
        before, dash, after = line.partition(" - ")
        fields, words = before.split(), after.split()
        if not dash or len(fields) < 5 or len(words) < 2:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= best:  # a later mount covers
            best, found = len(point), (words[0], words[1])
    return found


def here(path: Path) -> tuple[str, str]:
    """(type, source) of the mount of a path on this machine."""
    with contextlib.suppress(OSError):
        return file_system(str(path.resolve()), Path("/proc/self/mountinfo").read_text(errors="replace"))
    return "", ""


def check(path: Path, limit: float = LIMIT) -> Storage:
    """Check a directory in a separate process; a failure is returned in `error`."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "raylaunch.tools.doctor.storage_check", str(path)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=limit)
        return Storage.model_validate_json(out)
    except subprocess.TimeoutExpired:
        kill_child(process)
        error = f"no answer within {limit:g} s"
    except ValidationError:
        error = (err.strip().splitlines() or ["no output of the check"])[-1]
    return Storage(path=str(path), at=str(path), error=error)


def measure(path: Path) -> Storage:
    """Check a directory in this process. The directory is not created."""
    found = Storage(path=str(path), at=str(path))
    try:
        at = next(p for p in (path, *path.parents) if p.exists())
        room = os.statvfs(at)
        found.at, (found.type, found.source) = str(at), here(at)
        found.free, found.total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
        found.files_free = room.f_favail if room.f_files else None
        found.quota = _quota(at, found.type, found.source)
        with tempfile.TemporaryDirectory(prefix=".raylaunch-doctor-", dir=at) as place:
            found.small, found.speed = _small(Path(place)), _speed(Path(place))
    except OSError as error:
        found.error = error.strerror or str(error)
    return found


def _small(place: Path) -> float:
    times = []
    for number in range(SMALL_FILES):
        began = time.perf_counter()
        with (place / "new").open("wb") as out:
            out.write(bytes(1024))
            out.flush()
            os.fsync(out.fileno())
        (place / "new").replace(place / f"small-{number}")
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _speed(place: Path) -> float:
    chunk, began, written = os.urandom(CHUNK), time.perf_counter(), 0  # some file systems compress zeros
    with (place / "large").open("wb", buffering=0) as out:
        while written < CHUNK * CHUNKS and time.perf_counter() - began < SECONDS:
            written += out.write(chunk)
        os.fsync(out.fileno())
    return written / (time.perf_counter() - began)


def _quota(at: Path, kind: str, source: str) -> Quota | None:
    """This user's quota, if a command reports it quickly."""
    lustre = kind == "lustre"
    command = ["lfs", "quota", "-q", "-u", str(os.getuid()), str(at)] if lustre else ["quota", "-w", "-p"]
    if kind not in {"lustre", "nfs", "nfs4", "ext4", "xfs"} or shutil.which(command[0]) is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=3, check=False)
        return parse_quota(done.stdout, None if lustre else source)
    return None


def parse_quota(text: str, source: str | None) -> Quota | None:
    """The row of `quota -w -p` for this source, or of `lfs quota -q` (one row, maybe broken in two): KiB used, quota,
    limit. None without one."""
    rows = [text.split()] if source is None else [line.split() for line in text.splitlines()]
    for row in rows:
        numbers = [word.rstrip("*") for word in row[1:4]]
        if (source is None or row[:1] == [source]) and len(numbers) == 3 and all(n.isdigit() for n in numbers):
            used, soft, hard = (int(n) * 1024 for n in numbers)
            return Quota(used=used, limit=hard or soft)
    return None


def judge(found: Storage, shared: bool) -> Iterator[Finding]:
    """Findings about a state directory; `shared`: other machines must be able to access it. Pure."""
    if found.error:
        hint = "Choose another cluster.state_dir (or --state-dir)."
        yield problem("storage.path", f"cannot write to {found.path}: {found.error}", hint)
        return
    not_yet = "" if found.at == found.path else f"; it will be created in {found.at}"
    yield ok("storage.path", f"{found.path} is writable{not_yet}")
    what = f"file system: {found.type or 'unknown'}{f' from {found.source}' if found.source else ''}"
    proof = "`raylaunch doctor --nodes 2` checks whether it is shared."
    if shared and (found.type in LOCAL or found.at.startswith(("/tmp", "/var/tmp", "/dev/shm", "/run"))):
        text = f"{what}: looks node-local, but all nodes must share it"
        yield warning("storage.type", text, f"Choose another cluster.state_dir. {proof}")
    elif shared and found.type not in SHARED and not found.type.startswith("fuse."):
        yield unknown("storage.type", f"{what}: unknown whether the nodes share it", proof)
    else:
        yield ok("storage.type", what)
    yield _room(found)
    if found.speed is not None and found.small is not None:
        text = f"write speed {size(found.speed)}/s (one process), {found.small * 1000:.1f} ms per small file"
        slow = found.speed < 50 << 20 or found.small > 0.1
        hint = "Checkpoints will be slow. Try another file system, or ask your administrators about its load."
        yield warning("storage.speed", text, hint) if slow else ok("storage.speed", text)


def _room(found: Storage) -> Finding:
    free, of = found.free, f"of {size(found.total)}"
    if found.quota is not None and found.quota.limit:
        free, of = (
            min(free, max(0, found.quota.limit - found.quota.used)),
            f"of a quota of {size(found.quota.limit)}",
        )
    text = f"{size(free)} free {of}"
    if found.files_free is not None and found.files_free < FILES:
        hint = "Remove some files, or choose another cluster.state_dir."
        return warning("storage.free", f"{text}, but only {found.files_free} more files can be created", hint)
    if free >= ROOM:
        return ok("storage.free", text)
    hint = "Checkpoints need 12 bytes per parameter with AdamW. `raylaunch checkpoints RUN gc` removes old ones."
    return (problem if free < ROOM_LEAST else warning)("storage.free", text, hint)


if __name__ == "__main__":
    print(measure(Path(sys.argv[1])).model_dump_json())
