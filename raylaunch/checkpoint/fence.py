"""The one rule by which a writer on shared storage knows that it was replaced: heads and attempts alike.

    whoever takes over makes its file first, then reads what the other left
    a writer looks for that file before it writes, and again before it deletes what it wrote about

It looks by opening files. A listing of a directory may be a minute old (NFS), but opening a file by its name asks
the server: for one that is there, and for one of our own that is gone.
"""

from __future__ import annotations

import os
from pathlib import Path


def is_there(path: Path) -> bool:
    """Whether the file can be opened. Raises OSError where the storage does not say."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except FileNotFoundError:
        return False
    return True
