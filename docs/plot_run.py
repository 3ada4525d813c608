"""Draw a run: loss, workers, and the marked faults and recoveries.

python docs/plot_run.py RUN_DIRECTORY OUT.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from raylaunch.observe import picture

if __name__ == "__main__":
    picture.run(Path(sys.argv[1]), Path(sys.argv[2]))
