"""docs/watch.svg: `raylaunch watch` of a run, as it looks on a terminal.

python docs/plot_watch.py RUN [STATE_DIR]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import shoot

from raylaunch.observe.live import screen, snapshot
from raylaunch.state import files

WIDTH, HEIGHT = 118, 34

if __name__ == "__main__":
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else files.default_state_dir()
    reader = snapshot.SnapshotReader(*snapshot.find(where, sys.argv[1]))
    reader.read()
    time.sleep(20)  # the pace is that of the steps since the first look
    picture = reader.read()
    console = shoot.recorder(WIDTH)
    for line in screen.lines(picture, "main", WIDTH, HEIGHT):
        console.print(line, no_wrap=True)
    shoot.save(console, "watch")
