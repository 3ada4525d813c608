"""Draw the losses of a run that faults were done to over those of one that nothing happened to.

python docs/plot_curves.py SMOOTH_RUN FAULTED_RUN OUT.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from raylaunch.observe.history import plot

if __name__ == "__main__":
    worst = plot.curves(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
    print(f"the largest relative difference of the losses is {worst:.2e}")
