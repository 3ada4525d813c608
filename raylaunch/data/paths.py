"""The files that an entry of a list names: itself, all below a directory, or those that match a glob."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Collection
from pathlib import Path


def matching(entry: str) -> list[Path]:
    """Its files, sorted; hidden ones are left out of directories. OSError when one may not look."""
    path = Path(entry).expanduser()
    # Not Path.glob: that wants the pattern split from an absolute root.
    matches = [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    found: set[Path] = set()
    for match in matches:
        found.update(walk(match) if match.is_dir() else [match.absolute()])
    return sorted(found)


def walk(root: Path, wanted: Callable[[Path], bool] = lambda _: True, skipped: Collection[str] = ()) -> list[Path]:
    """All wanted files below root, sorted; hidden files and directories, and those `skipped`, are left out."""
    found = []
    for folder, folders, names in os.walk(root.absolute(), onerror=_raise):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if wanted(path) and path.is_file()]
    return sorted(found)


def sought(entry: str) -> str:
    """For errors: the entry, and where a relative one was looked for."""
    return repr(entry) if Path(entry).expanduser().is_absolute() else f"{entry!r} (looked in {Path.cwd()})"


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out what it may not list
