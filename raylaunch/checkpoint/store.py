"""Checkpoints as directories on shared storage: what counts, what is newest, what may go.

    CHECKPOINTS/step-00000100/          committed: data files and commit.json
    CHECKPOINTS/step-00000100.tmp-3     being written by attempt 3, or left by its crash
    CHECKPOINTS/step-00000100.del-…     being deleted, or left by a crash meanwhile

All ranks write into the pending directory; when they are done, one of them writes commit.json and
renames: the rename is the commit. A step that is committed already stays as it is. Whatever is not
committed is never read. No torch in here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylaunch import state
from raylaunch.errors import StateError

COMMIT_FILE = "commit.json"

_COMMITTED = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"step-\d{8,}\.(tmp|del)-(.+)")


@dataclass(frozen=True)
class Commit:
    """One committed checkpoint. `facts`: what the trainer wants to find unchanged when it loads."""

    path: Path
    step: int
    world_size: int
    attempt: int
    run: str
    time: float
    facts: dict[str, Any]


def final(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def pending(directory: Path, step: int, attempt: int) -> Path:
    """The directory that all ranks of this attempt write this step into."""
    return directory / f"{final(directory, step).name}.tmp-{attempt}"


def commit(
    pending_path: Path,
    *,
    step: int,
    world_size: int,
    attempt: int,
    run: str,
    facts: dict[str, Any] | None = None,
) -> Commit:
    """Make a completely written pending directory count; one rank calls this.

    When the step is committed already (a resumed run came by again), that one stays and this is dropped.
    """
    directory = pending_path.parent
    target = final(directory, step)
    with explained(target, "commit"):
        if target.exists():
            if (there := _read(target)) is not None:
                delete(pending_path)
                return there
            delete(target)  # not ours to trust: no commit ever leaves a directory without commit.json
        made = Commit(target, step, world_size, attempt, run, round(time.time(), 3), facts or {})
        record = {key: value for key, value in vars(made).items() if key != "path"}
        try:
            with (pending_path / COMMIT_FILE).open("w", encoding="utf-8") as out:
                out.write(json.dumps(record, indent=1) + "\n")
                out.flush()
                os.fsync(out.fileno())
            _sync(pending_path)
            pending_path.rename(target)
            _sync(directory)
        except OSError:
            shutil.rmtree(pending_path, ignore_errors=True)  # gives its space back; gone if renamed
            raise
    return made


def committed(directory: Path) -> list[Commit]:
    """The committed checkpoints, the newest (highest step) last; [] when the directory is not there."""
    if not directory.exists():
        return []
    with explained(directory, "look for"):
        names = [entry.name for entry in os.scandir(directory)]
    found = (_read(directory / name) for name in names if _COMMITTED.fullmatch(name))
    return sorted((one for one in found if one is not None), key=lambda one: one.step)


def latest(directory: Path) -> Commit | None:
    return next(reversed(committed(directory)), None)


def retain(directory: Path, keep: int) -> list[Commit]:
    """Delete all but the `keep` newest commits (at least one); the deleted ones."""
    old = committed(directory)[: -max(1, keep)]
    for one in old:
        delete(one.path)
    return old


def collect(directory: Path, attempt: int) -> list[str]:
    """Remove what crashed attempts left half-written or half-deleted; `attempt` (the caller's) is spared."""
    if not directory.exists():
        return []
    removed = []
    for entry in sorted(os.scandir(directory), key=lambda e: e.name):
        match = _LEFTOVER.fullmatch(entry.name)
        if match and not (match[1] == "tmp" and match[2] == str(attempt)):
            delete(Path(entry.path))
            removed.append(entry.name)
    return removed


def delete(path: Path) -> None:
    """Rename away first, so that a reader sees all of a checkpoint or none; then remove."""
    with explained(path, "delete"):
        gone = path
        if ".del-" not in path.name:
            gone = path.with_name(f"{path.name.partition('.')[0]}.del-{secrets.token_hex(4)}")
            try:
                path.rename(gone)
            except FileNotFoundError:
                return
        shutil.rmtree(gone, ignore_errors=True)  # what stays behind, `collect` takes another time


@contextlib.contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError about a checkpoint into a StateError that says what to do about it."""
    try:
        yield
    except OSError as error:
        raise explanation(path, doing, error) from error


def explanation(path: Path, doing: str, error: OSError) -> StateError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Free some space there, or lower checkpoint.keep_last_n_checkpoints"
    else:
        hint = "Check that path (shared by all nodes? writable?)"
    return StateError(
        f"cannot {doing} checkpoint {path}: {error.strerror or error}",
        f"{hint}, or choose another checkpoint.checkpoint_dir.",
    )


def _read(path: Path) -> Commit | None:
    """What commit.json says; None when there is none (no commit of ours, or deleted meanwhile)."""
    record = state.read_json(path / COMMIT_FILE)
    return None if record is None else Commit(path=path, **record)


def _sync(directory: Path) -> None:
    """Make a directory's entries durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
