"""docs/watch.svg: `raylaunch watch` of a run, as it looks on a terminal.

python docs/plot_watch.py RUN [STATE_DIR]
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from raylaunch import state
from raylaunch.live import facts, screen

WIDTH, HEIGHT = 118, 34

if __name__ == "__main__":
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else state.default_state_dir()
    picture = facts.Reader(*facts.find(where, sys.argv[1])).look()
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for line in screen.lines(picture, "main", WIDTH, HEIGHT):
        console.print(line, no_wrap=True)
    console.save_svg(str(Path(__file__).with_name("watch.svg")), title="raylaunch watch")
