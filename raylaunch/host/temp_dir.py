"""A cluster's directory on this machine's own disk: short, private, and claimed by one agent."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from raylaunch.errors import BringUpError, StateError
from raylaunch.host import locks
from raylaunch.host.ports import _HELD

_AF_UNIX_LIMIT = 107


# What Ray adds to the temp directory for its longest socket path, with a seven-digit pid:
_LONGEST_SOCKET = "/r/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1"


def temp_dir_path(base: str, cluster_key: str, suffix: str | None = None) -> Path:
    """Where Ray's sockets and session go on this node: one per uid and cluster; with a suffix for each local node
    and for each joiner job.

    `cluster_key` is the cluster directory's path: two state directories may hold the same name.
    Raises BringUpError when the path would be too long for a Unix socket.
    """
    digest = hashlib.sha256(cluster_key.encode()).hexdigest()[:8]
    path = Path(base) / f"rl-{os.getuid()}-{digest}{f'-{suffix}' if suffix else ''}"
    length = len(os.fsencode(str(path) + _LONGEST_SOCKET))
    if length > _AF_UNIX_LIMIT:
        raise BringUpError(
            f"the temp directory {path} is too long: Ray's socket paths would have {length} bytes of "
            f"at most {_AF_UNIX_LIMIT}",
            "Set cluster.temp_dir to a shorter node-local path, such as /tmp.",
        )
    return path


class TempDir:
    """A temp directory while an agent has it: held by a lock in it, so that whoever comes later can tell what a
    killed agent has left behind from what is in use."""

    def __init__(self, base: str, cluster_key: str, suffix: str | None) -> None:
        self.path = temp_dir_path(base, cluster_key, suffix)
        self._siblings = f"{temp_dir_path(base, cluster_key).name}-*"
        self._held: int | None = None

    def claim(self) -> None:
        """Have it, afresh (see `claim_temp_dir`); remove what dead agents of this cluster left beside it."""
        claim_temp_dir(self.path)
        self._release()
        self._held = locks.take(self.path / _HELD)
        for sibling in self.path.parent.glob(self._siblings):
            if sibling != self.path and _is_abandoned(sibling):
                shutil.rmtree(sibling, ignore_errors=True)

    def is_whole(self) -> bool:
        """Whether what Ray has in it is still there. (Not by `session_latest`: every driver that connects removes that
        link and makes it again.)"""
        return (self.path / _HELD).exists() and any((self.path / "r").glob("session_2*/sockets"))

    def remove(self) -> int:
        """Remove it; 1 if it cannot be. One that was never claimed may be somebody else's, and stays."""
        if self._held is None:
            return 0
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()
        return int(self.path.exists())

    def _release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _is_abandoned(path: Path) -> bool:
    """Whether a temp directory is ours and nobody holds it."""
    try:
        ours = not path.is_symlink() and path.lstat().st_uid == os.getuid() and (path / _HELD).exists()
    except OSError:
        return False
    return ours and not locks.is_held(path / _HELD)


def claim_temp_dir(path: Path) -> None:
    """Make the temp directory afresh, ours alone; leftovers of a dead life of the cluster go.

    Somebody else's directory of that name (a trap or a clash) is refused, never used.
    """
    try:
        owner = path.lstat()
    except FileNotFoundError:
        owner = None
    if owner is not None:
        if path.is_symlink() or owner.st_uid != os.getuid():
            raise BringUpError(
                f"{path} belongs to uid {owner.st_uid}, not to you", "Set cluster.temp_dir to another directory."
            )
        shutil.rmtree(path)
    try:
        path.mkdir(mode=0o700, parents=True)
        # Ray makes the directory that it is given open to all: it gets one behind our door.
        for part in ("r", "tmp"):
            (path / part).mkdir()
    except OSError as error:
        raise StateError(
            f"cannot make the temp directory {path}: {error.strerror}",
            "Set cluster.temp_dir to a node-local directory that you may write to.",
        ) from error
