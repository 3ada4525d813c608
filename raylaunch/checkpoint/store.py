"""Checkpoints as directories on shared storage: what counts, what is newest, who may commit, what may go.

    CHECKPOINTS/step-00000100/            committed: data files and commit.json
    CHECKPOINTS/step-00000100.tmp-2-3     being written by attempt 3 under incarnation 2 of the run, or left by its crash
    CHECKPOINTS/step-00000100.del-…       being deleted, or left by a crash meanwhile
    CHECKPOINTS/step-00000100.bad-…       was committed and does not verify: for people, never touched again
    CHECKPOINTS/fence-00000002-0003       nobody below (incarnation 2 of the run, attempt 3) may commit any more

All ranks write into the pending directory; when they are done, one of them writes commit.json and
renames: the rename is the commit. A step that is committed already stays as it is. Whatever is not
committed is never read.

The fence keeps out an old writer that comes back (a frozen node, a cut network). Who fences makes its
file first and then renames away the older writers' pending directories, and whoever commits looks for
fences after all is written: either the look finds the fence, or the pending directory was there when
the fence was made, so that of the two renames only one can be. A commit that came first is seen by who
reads `latest` after fencing. No torch in here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from raylaunch.checkpoint.fence import is_there
from raylaunch.errors import StateError

COMMIT_FILE = "commit.json"

_COMMITTED = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"step-\d{8,}\.(tmp|del)-(.+)")
_WRITER = re.compile(r"(?:(\d+)-)?(\d+)")  # of a pending directory; without an incarnation before there were any
_FENCE = re.compile(r"fence-(\d{8,})-(\d{4,})")


class Fenced(StateError):
    """Somebody newer owns these checkpoints: this attempt may not commit, and ends."""


@dataclass(frozen=True)
class Commit:
    """One committed checkpoint. `facts`: what the trainer wants to find unchanged when it loads.
    `files`: name → (size in bytes, sha256); empty when it was made without them."""

    path: Path
    step: int
    world_size: int
    attempt: int
    run: str
    time: float
    facts: dict[str, Any]
    incarnation: int = 1
    """The run's."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class InvalidCheckpoint:
    """A committed checkpoint that cannot be used, and why. `damaged`: its content is wrong for certain;
    else it could not be read, which may pass."""

    path: Path
    step: int
    file: str
    why: str
    damaged: bool = True


def final(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def pending(directory: Path, step: int, run_incarnation: int, attempt: int) -> Path:
    """The directory that all ranks of this attempt write this step into."""
    return directory / f"{final(directory, step).name}.tmp-{run_incarnation}-{attempt}"


def fence(directory: Path, run_incarnation: int, attempt: int) -> None:
    """From now on only (run_incarnation, attempt) or a higher one may commit; makes the directory if need be.

    Call it before reading `latest` for a new attempt. Fenced when a higher one has been here.
    """
    me = run_incarnation, attempt
    with explained(directory, "fence"):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        refuse_fenced(directory, run_incarnation, attempt)
        (directory / _fence_name(me)).touch(mode=0o600)
        _sync(directory)
        # Ours is there before theirs go: the highest one that ever was can always be seen.
        for other in _fences(directory):
            if other < me:
                (directory / _fence_name(other)).unlink(missing_ok=True)
        for entry in _leftovers(directory, me):
            if ".tmp-" in entry.name:
                with contextlib.suppress(FileNotFoundError):  # committed or given up at this moment
                    entry.rename(_beside(entry, "del"))  # `collect` removes it
        refuse_fenced(directory, run_incarnation, attempt)


def refuse_fenced(directory: Path, run_incarnation: int, attempt: int) -> None:
    """Raise Fenced when a fence above (run_incarnation, attempt) exists."""
    me = run_incarnation, attempt
    fences = _fences(directory)
    higher = max((one for one in fences if one > me), default=None)
    if higher is None and me in fences and not is_there(directory / _fence_name(me)):  # the listing was old
        higher = me
    if higher is not None:
        raise Fenced(
            f"incarnation {run_incarnation}, attempt {attempt} may no longer commit to {directory}: "
            f"incarnation {higher[0]}, attempt {higher[1]} has taken over",
            "Nothing to do: the newer attempt continues from the last commit.",
        )


def commit(
    pending_path: Path,
    *,
    step: int,
    world_size: int,
    attempt: int,
    run: str,
    facts: dict[str, Any] | None = None,
    run_incarnation: int = 1,
    files: Mapping[str, tuple[int, str]] | None = None,
) -> Commit:
    """Make a completely written pending directory count; one rank calls this.

    When the step is committed already (a resumed run came by again), that one stays and this is dropped.
    Fenced when somebody newer has taken over, whenever that was.
    """
    directory = pending_path.parent
    target = final(directory, step)
    with explained(target, "commit"):
        try:
            refuse_fenced(directory, run_incarnation, attempt)
            there = inspect(target)
            if isinstance(there, Commit):
                delete(pending_path)
                return there
            if there is not None:
                set_aside(there)
            made = Commit(
                target,
                step,
                world_size,
                attempt,
                run,
                round(time.time(), 3),
                facts or {},
                run_incarnation,
                dict(files or {}),
            )
            record = {key: value for key, value in vars(made).items() if key != "path"}
            with (pending_path / COMMIT_FILE).open("w", encoding="utf-8") as out:
                out.write(json.dumps(record, indent=1) + "\n")
                out.flush()
                os.fsync(out.fileno())
            _sync(pending_path)
            refuse_fenced(directory, run_incarnation, attempt)
            pending_path.rename(target)
            _sync(directory)
        except FileNotFoundError:  # renamed away by a fence
            refuse_fenced(directory, run_incarnation, attempt)
            raise
        except (OSError, Fenced):
            shutil.rmtree(pending_path, ignore_errors=True)  # gives its space back; gone if renamed
            raise
    return made


def iter_checkpoints(directory: Path) -> Iterator[Commit | InvalidCheckpoint]:
    """All checkpoints, newest (highest step) first, each looked at (commit.json, sizes) when it is asked for."""
    if not directory.exists():
        return
    with explained(directory, "look for"):
        names = [entry.name for entry in os.scandir(directory)]
    steps = {int(match[1]): name for name in names if (match := _COMMITTED.fullmatch(name))}
    for step in sorted(steps, reverse=True):
        if (found := inspect(directory / steps[step])) is not None:
            yield found


def owner(directory: Path) -> tuple[int, int]:
    """(run_incarnation, attempt) of the newest writer there was; what older ones left half-written is nobody's."""
    return max(_fences(directory), default=(0, 0)) if directory.exists() else (0, 0)


def leftovers(directory: Path) -> list[Path]:
    """What `collect` would remove for the newest writer."""
    return _leftovers(directory, owner(directory))


def set_aside_before(directory: Path) -> list[Path]:
    """The checkpoints that did not verify, and were renamed."""
    return sorted(directory.glob("step-*.bad-*"))


def latest(directory: Path) -> Commit | None:
    """The newest commit that can be used as far as sizes tell. The bad ones above it stay where they are."""
    return next((one for one in iter_checkpoints(directory) if isinstance(one, Commit)), None)


def committed(directory: Path) -> list[Commit]:
    """The usable commits, the newest last; [] when the directory is not there."""
    return [one for one in iter_checkpoints(directory) if isinstance(one, Commit)][::-1]


def inspect(path: Path) -> Commit | InvalidCheckpoint | None:
    """What a committed directory holds, as far as commit.json and sizes tell; None: it is not there."""
    step = int(path.name.removeprefix("step-"))

    def bad(file: str, why: str, *, damaged: bool = True) -> InvalidCheckpoint | None:
        if not path.exists():  # deleted meanwhile: no news
            return None
        return InvalidCheckpoint(path, step, file, why, damaged)

    try:
        made = _parse(path, json.loads((path / COMMIT_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return bad(COMMIT_FILE, "missing")
    except OSError as error:
        return bad(COMMIT_FILE, error.strerror or str(error), damaged=False)
    except (ValueError, TypeError, AttributeError) as error:
        return bad(COMMIT_FILE, f"torn, or not ours: {error}")
    if made.step != step:
        return bad(COMMIT_FILE, f"of step {made.step}")
    for name, (size, _) in made.files.items():
        try:
            found = _size(path / name, size)
        except FileNotFoundError:
            return bad(name, "missing")
        except OSError as error:
            return bad(name, error.strerror or str(error), damaged=False)
        if found != size:
            return bad(name, f"{found} bytes instead of {size}")
    return made


def set_aside(bad: InvalidCheckpoint) -> Path | None:
    """Rename a bad checkpoint so that it is neither used nor deleted; its new path, None if it is gone."""
    with explained(bad.path, "set aside"):
        try:
            return bad.path.rename(_beside(bad.path, "bad"))
        except FileNotFoundError:
            return None


@dataclass(frozen=True)
class RetentionPolicy:
    """Which commits stay: the newest `last` (at least one), those of every `every`-th step (0: none for that), and
    with `best` the one with the lowest `val_loss` in its facts."""

    last: int
    every: int = 0
    best: bool = False

    def surplus(self, commits: Sequence[Commit]) -> list[Commit]:
        """Those that may go, of all usable ones; the newest first."""
        newest = sorted(commits, key=lambda one: one.step, reverse=True)
        judged = [one for one in newest if "val_loss" in one.facts] if self.best else []
        best = min(judged, key=lambda one: float(one.facts["val_loss"]), default=None)
        return [
            one for one in newest[max(1, self.last) :]
            if one is not best and not (self.every and one.step % self.every == 0)
        ]  # fmt: skip


def retain(directory: Path, keep: RetentionPolicy, run_incarnation: int, attempt: int) -> list[Commit]:
    """Delete the usable commits that need not stay; the deleted ones, the newest first."""
    gone = keep.surplus([one for one in iter_checkpoints(directory) if isinstance(one, Commit)])
    for one in gone:
        refuse_fenced(directory, run_incarnation, attempt)  # the newer one may need what we would delete
        delete(one.path)
    return gone


def collect(directory: Path, run_incarnation: int, attempt: int) -> list[str]:
    """Remove what older writers than the caller left half-written, and whatever is half-deleted."""
    leftovers = _leftovers(directory, (run_incarnation, attempt))
    for path in leftovers:
        delete(path)
    return [path.name for path in leftovers]


def delete(path: Path) -> None:
    """Rename away first, so that a reader sees all of a checkpoint or none; then remove."""
    with explained(path, "delete"):
        gone = path
        if ".del-" not in path.name:
            gone = _beside(path, "del")
            try:
                path.rename(gone)
            except FileNotFoundError:
                return
        shutil.rmtree(gone, ignore_errors=True)  # what stays behind, `collect` takes another time


def unusually_slow(seconds: float, earlier: Sequence[float]) -> bool:
    """Whether a save took so much longer than the run's earlier ones that somebody should know."""
    return bool(earlier) and seconds > 10 and seconds > 3 * statistics.median(earlier)


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


def _parse(path: Path, record: Any) -> Commit:
    """From commit.json; what an older one lacks has defaults, what a newer one adds is left out."""
    known = {f.name for f in fields(Commit)} - {"path"}
    made = Commit(path=path, **{key: value for key, value in record.items() if key in known})
    files = {str(name): (int(size), str(digest)) for name, (size, digest) in made.files.items()}
    return Commit(**{**vars(made), "files": files})


def _size(path: Path, expected: int) -> int:
    """In bytes. NFS may tell an old size, but not of a file that is just opened: only then it is wrong."""
    size = path.stat().st_size
    if size != expected:
        with path.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
    return size


def _fence_name(writer: tuple[int, int]) -> str:
    return f"fence-{writer[0]:08d}-{writer[1]:04d}"


def _fences(directory: Path) -> list[tuple[int, int]]:
    matches = (_FENCE.fullmatch(entry.name) for entry in os.scandir(directory))
    return [(int(match[1]), int(match[2])) for match in matches if match]


def _leftovers(directory: Path, me: tuple[int, int]) -> list[Path]:
    """Half-deleted directories, and pending ones of lower writers: a higher one's are not ours to touch."""
    found = []
    for entry in os.scandir(directory) if directory.exists() else ():
        if match := _LEFTOVER.fullmatch(entry.name):
            writer = _WRITER.fullmatch(match[2]) if match[1] == "tmp" else None
            if match[1] == "del" or (writer and (int(writer[1] or 0), int(writer[2])) < me):
                found.append(directory / entry.name)
    return sorted(found)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name.partition('.')[0]}.{kind}-{secrets.token_hex(4)}")


def _sync(directory: Path) -> None:
    """Make a directory's entries durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
