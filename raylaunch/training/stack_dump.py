"""Reading a stack dump of Python's faulthandler: at which line does the training stand?"""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$')
_STDLIB = sysconfig.get_path("stdlib")
_LIBRARY = re.compile(r"/(site|dist)-packages/(torch|ray|numpy|pyarrow|pandas)/")
ENTRY = "raylaunch/training/worker/main.py"


def where_it_stands(dump: Path, entry: str = ENTRY) -> str:
    """The innermost line of the training thread that is no library's, as `file:line in function`."""
    try:
        text = dump.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"the stacks cannot be read: {error}"
    threads = [_frames(block) for block in re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.MULTILINE)[1:]]
    training = next((frames for frames in threads if any(entry in file for file, _ in frames)), None)
    if not training:
        return "the training thread is not in the dump"
    own = [place for file, place in training if not _is_library(file)]
    return own[0] if own else training[0][1]


def _is_library(file: str) -> bool:
    return _LIBRARY.search(file) is not None or (file.startswith(_STDLIB) and "-packages/" not in file)


def _frames(block: str) -> list[tuple[str, str]]:
    """(file, file:line in function) of one thread, the innermost first."""
    found = (_FRAME.match(line) for line in block.splitlines())
    return [(m["file"], f"{Path(m['file']).name}:{m['line']} in {m['function']}") for m in found if m]
