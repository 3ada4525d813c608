"""The cluster and run directories: what lies where, and how it is written.

    STATE/clusters/NAME/   one per cluster   STATE/runs/NAME/   one per run

Every JSON file is replaced atomically (written beside, fsynced, renamed). Events and metrics are
append-only, a line each. Readers tolerate a file that is not there yet and a torn last line.
Nothing here decides anything.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raylaunch.errors import StateError

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
STOP_FILE, NO_STOP = "stop", "null\n"


def default_state_dir() -> Path:
    """$RAYLAUNCH_STATE_DIR, else ~/.raylaunch."""
    return Path(os.environ.get("RAYLAUNCH_STATE_DIR") or Path.home() / ".raylaunch")


def cluster_dir(state_dir: Path, name: str) -> Path:
    return state_dir / "clusters" / name


def run_dir(state_dir: Path, name: str) -> Path:
    return state_dir / "runs" / name


def attempt_dir(run: Path, attempt: int) -> Path:
    return run / "attempts" / f"{attempt:04d}"


@contextlib.contextmanager
def _explained(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError on a state file into a StateError that says what to do about it."""
    hints = {
        errno.ENOSPC: "The disk is full: free some space, or choose another cluster.state_dir.",
        errno.EDQUOT: "Your quota is used up: free some space, or choose another cluster.state_dir.",
        errno.EROFS: "That file system is read-only: choose another cluster.state_dir (or --state-dir).",
        errno.EACCES: "You may not write there: choose another cluster.state_dir (or --state-dir).",
    }
    try:
        yield
    except OSError as error:
        hint = hints.get(error.errno or 0, "Check that path, or choose another cluster.state_dir (or --state-dir).")
        raise StateError(f"cannot {doing} {path}: {error.strerror or error}", hint) from error


def exists(path: Path) -> bool:
    """Whether it is there; StateError when one may not look."""
    with _explained(path, "look into"):
        return path.exists()


def make_dir(path: Path, mode: int = 0o700) -> Path:
    """Make a directory with its parents; StateError when that cannot be."""
    with _explained(path, "make the directory"):
        path.mkdir(parents=True, exist_ok=True, mode=mode)
    return path


def claim_dir(path: Path) -> bool:
    """Make a directory that nobody has made before; False when somebody has. Its parents are made, too."""
    make_dir(path.parent)
    with _explained(path, "make the directory"):
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            return False
    return True


def write_text(path: Path, text: str, mode: int = 0o600, durable: bool = True) -> None:
    """Replace a file atomically: beside, fsync (if it is to be `durable`), rename."""
    replace_file(path, text, mode, durable)


def replace_file(path: Path, text: str, mode: int = 0o600, durable: bool = True) -> int:
    """As `write_text`; the new file's inode number."""
    with _explained(path, "write"):
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as out:
                inode = os.fstat(out.fileno()).st_ino
                out.write(text)
                if durable:
                    out.flush()
                    os.fsync(out.fileno())
            Path(temporary).chmod(mode)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return inode


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """As our JSON files have it."""
    return json.dumps(value, indent=1) + "\n"


def read_json(path: Path) -> Any:
    """A JSON file's value, or None when it is not there (yet)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"cannot read {path}: {error}", "Move the file away and try again.") from error


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a .jsonl file of mode 0600. One write, so lines of several writers never mix."""
    line = (json.dumps(row, default=str) + "\n").encode()
    with _explained(path, "append to"):
        if append(path, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def append(path: Path, data: bytes) -> int:
    """Add this to a file of mode 0600 in one write; how many bytes of it were taken. StateError for none."""
    with _explained(path, "append to"):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            return os.write(fd, data)
        finally:
            os.close(fd)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a .jsonl file; [] when it is not there."""
    return LineReader(path).read()


class LineReader:
    """Reads a growing .jsonl file a bit at a time; a torn last line waits for its rest. `last`: begin so many bytes
    before the end of what is there."""

    def __init__(self, path: Path, at_end: bool = False, last: int | None = None) -> None:
        self.path = path
        self.offset = _end_of_lines(path) if at_end else 0
        """Bytes that were read; may be set."""
        if last is not None and path.exists():
            self.offset = max(0, path.stat().st_size - last)

    def read(self) -> list[dict[str, Any]]:
        """The lines that were completed since the last call."""
        try:
            with self.path.open("rb") as source:
                source.seek(self.offset)
                chunk = source.read()
        except FileNotFoundError:
            return []
        complete = chunk[: chunk.rfind(b"\n") + 1]
        self.offset += len(complete)
        rows = []
        for line in complete.splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # torn by a full disk: the next one counts
                if isinstance(row := json.loads(line), dict):
                    rows.append(row)
        return rows


def _end_of_lines(path: Path, last: int = 1 << 16) -> int:
    """The offset behind the last complete line; 0 when there is no file."""
    try:
        with path.open("rb") as source:
            start = max(0, os.fstat(source.fileno()).st_size - last)
            source.seek(start)
            return start + source.read(last).rfind(b"\n") + 1
    except FileNotFoundError:
        return 0


def new_token() -> str:
    """A secret for one cluster: 256 random bits."""
    return secrets.token_hex(32)
