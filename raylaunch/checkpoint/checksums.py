"""Checksums of a checkpoint's files: made by the rank that wrote them, checked by any. No torch in here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from raylaunch.checkpoint.store import Commit, InvalidCheckpoint


def digest(path: Path) -> tuple[int, str]:
    """(size in bytes, sha256) of a file, read piece by piece."""
    with path.open("rb") as source:
        sha256 = hashlib.file_digest(source, "sha256").hexdigest()
        return source.tell(), sha256


def share(commit: Commit, rank: int, world_size: int) -> list[str]:
    """The files that this rank checks: every file is one rank's."""
    return sorted(commit.files)[rank::world_size]


def check(commit: Commit, names: Iterable[str]) -> InvalidCheckpoint | None:
    """The first of these files that is not as it was written."""
    for name in names:
        size, sha256 = commit.files[name]
        try:
            found = digest(commit.path / name)
        except FileNotFoundError:
            return InvalidCheckpoint(commit.path, commit.step, name, "missing")
        except OSError as error:
            return InvalidCheckpoint(commit.path, commit.step, name, error.strerror or str(error), damaged=False)
        if found[0] != size:
            return InvalidCheckpoint(commit.path, commit.step, name, f"{found[0]} bytes instead of {size}")
        if found[1] != sha256:
            return InvalidCheckpoint(
                commit.path, commit.step, name, f"sha256 {found[1][:12]}… instead of {sha256[:12]}…"
            )
    return None
