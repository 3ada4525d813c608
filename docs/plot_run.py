"""Draw a run: loss, workers, and the marked faults and recoveries.

python docs/plot_run.py RUN_DIRECTORY OUT.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from raylaunch.observe.history import plot

if __name__ == "__main__":
    plot.run(Path(sys.argv[1]), Path(sys.argv[2]))
