"""A JSON file that only the cluster's head writes: head.json, members.json, duties.json.

An older head that was frozen in the middle of a write may lay its last words over ours when it thaws, before it
finds that it is fenced. Ours are put back then: nobody else writes these files, so another file means just that.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from raylaunch.state import files


class Published:
    """One such file, as its present head last wrote it. For one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._value: Any = None
        self._inode: int | None = None

    def write(self, value: Any) -> None:
        self._value, self._inode = value, None
        self._inode = files.replace_file(self.path, files.as_json(value))

    def restore(self) -> bool:
        """Write it again where another file lies there; whether one did. Only for a head that is not fenced."""
        if self._inode is None or self._inode == _inode(self.path):
            return False
        self.write(self._value)
        return True


def _inode(path: Path) -> int | None:
    """By opening it: what is known of a name may be old (see `fence`)."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)
