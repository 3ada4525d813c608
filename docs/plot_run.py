"""Draw docs/run.png: loss and workers of a run, with its faults and recoveries marked.

python docs/plot_run.py RUN_DIRECTORY OUT.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

from raylaunch.observe.history import goodput
from raylaunch.observe.history.recoveries import named
from raylaunch.observe.history.timeline import is_step
from raylaunch.state import event_log, files

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def run(run_dir: Path, out: Path, title: str = "") -> None:
    """Loss and workers over the seconds of a run, faults and recoveries marked; written to `out`."""
    rows = [row for row in files.read_lines(run_dir / files.METRICS_FILE) if is_step(row)]
    if not rows:
        sys.exit(f"{run_dir} has no steps")
    book = goodput.of_run(run_dir)
    events = event_log.read_all(run_dir)
    injected = {int(e["seq"]): str(e["fault"]) for e in events if e["kind"] == "fault_injected" and "seq" in e}
    start = min(float(e["time"]) for e in [*events[:1], *rows[:1]])
    figure, axis = plt.subplots(figsize=(9, 4.4), layout="constrained")
    workers = axis.twinx()
    axis.set_zorder(workers.get_zorder() + 1)
    axis.patch.set_visible(False)
    most = max(int(row.get("world_size") or 0) for row in rows)
    for number in sorted({row["attempt"] for row in rows}):
        own = [row for row in rows if row["attempt"] == number]
        times = [float(row["time"]) - start for row in own]
        axis.plot(times, [float(row["loss"]) for row in own], color="tab:blue", linewidth=1.6)
        workers.fill_between(times, int(own[0].get("world_size") or 0), color="tab:green", alpha=0.25, linewidth=0)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.45 * (high - low))
    for index, recovery in enumerate(book.recoveries):
        colour = "tab:gray" if recovery.kind == "resize" else "crimson"
        at = recovery.began - start
        axis.axvline(at, color=colour, linewidth=1.0, linestyle="--")
        if recovery.total:
            axis.axvspan(at, at + recovery.total, color=colour, alpha=0.08, linewidth=0)
        text = named(recovery, injected) + (f", {recovery.total:.1f} s" if recovery.total else "")
        # Few of them side by side, each a line lower; many stand upright.
        upright = len(book.recoveries) > 6
        axis.annotate(
            text, (at, 1.0 if upright else 1.0 - 0.055 * index), xycoords=("data", "axes fraction"),
            xytext=(3, -3) if upright else (4, -11), textcoords="offset points", color=colour, fontsize=8,
            rotation=90 if upright else 0, verticalalignment="top" if upright else "baseline",
        )  # fmt: skip
    axis.set_xlabel("seconds since the run was submitted")
    axis.set_ylabel("loss", color="tab:blue")
    workers.set_ylabel("workers", color="tab:green")
    workers.set_ylim(0, most * 2.5)
    workers.set_yticks(range(most + 1))
    for one in (axis, workers):
        one.spines["top"].set_visible(False)
    axis.set_title(title or f"{run_dir.name}: {book.steps} steps, goodput {book.goodput:.0%}", fontsize=10)
    figure.savefig(out, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
