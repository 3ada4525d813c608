"""Draw docs/curves.png: the loss of a run with faults over that of an undisturbed run, and their difference.

python docs/plot_curves.py SMOOTH_RUN FAULTED_RUN OUT.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

from raylaunch.observe.history import goodput
from raylaunch.observe.history.timeline import is_step
from raylaunch.state import files

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def losses(run_dir: Path) -> dict[int, float]:
    """Step → loss; of a step that was done again, the newest attempt's."""
    found: dict[int, tuple[int, float]] = {}
    for row in files.read_lines(run_dir / files.METRICS_FILE):
        if is_step(row) and row["attempt"] >= found.get(row["step"], (0, 0.0))[0]:
            found[row["step"]] = (row["attempt"], float(row["loss"]))
    return {step: loss for step, (_, loss) in sorted(found.items())}


def curves(smooth: Path, faulted: Path, out: Path) -> float:
    """Two loss curves, and how far they are apart; the largest relative difference."""
    one, other = losses(smooth), losses(faulted)
    common = sorted(one.keys() & other.keys())
    if not common:
        sys.exit(f"{smooth} and {faulted} have no step in common")
    one, other = ({s: run[s] for s in sorted(run) if s <= common[-1]} for run in (one, other))
    apart = [abs(one[s] - other[s]) / max(abs(one[s]), 1e-12) for s in common]
    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, height_ratios=[3, 1], figsize=(8, 4.6), layout="constrained"
    )
    top.plot(list(one), list(one.values()), color="tab:gray", linewidth=3, alpha=0.5, label=f"{smooth.name}: no fault")
    book = goodput.of_run(faulted)
    count = len([r for r in book.recoveries if r.kind != "resize"])
    top.plot(
        list(other), list(other.values()), color="tab:blue", linewidth=1.2, label=f"{faulted.name}: {count} recoveries"
    )
    for recovery in book.recoveries:
        for axis in (top, bottom):
            colour = "tab:gray" if recovery.kind == "resize" else "crimson"
            axis.axvline(recovery.to_step, color=colour, linewidth=0.6, alpha=0.5)
    bottom.semilogy(common, [max(value, 1e-10) for value in apart], color="tab:blue", linewidth=1)
    top.set_ylabel("loss")
    top.legend(frameon=False)
    bottom.set_ylabel("relative\ndifference")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)
    plt.close(figure)
    return max(apart)


if __name__ == "__main__":
    worst = curves(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
    print(f"the largest relative difference of the losses is {worst:.2e}")
