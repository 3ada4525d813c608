"""Draw a run: loss, and the number of workers, over its steps.

python docs/plot_run.py RUN_DIRECTORY OUT.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from raylaunch import state


def main(run: Path, out: Path) -> None:
    rows = [row for row in state.read_lines(run / state.METRICS_FILE) if "loss" in row]
    faults = [
        e for e in state.read_lines(run / state.EVENTS_FILE) if e["kind"] == "attempt_ended" and e["how"] == "fault"
    ]
    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, height_ratios=[3, 1], figsize=(8, 4.2), layout="constrained"
    )
    for attempt in sorted({row["attempt"] for row in rows}):
        own = [row for row in rows if row["attempt"] == attempt]
        workers = own[0]["world_size"]
        top.plot(
            [r["step"] for r in own],
            [r["loss"] for r in own],
            linewidth=1.6,
            label=f"attempt {attempt}: {workers} workers",
        )
        bottom.fill_between([r["step"] for r in own], [r["world_size"] for r in own], step="mid", alpha=0.5)
    for event in faults:
        last = max(row["step"] for row in rows if row["attempt"] == event["attempt"])
        for axis in (top, bottom):
            axis.axvline(last, color="crimson", linewidth=1, linestyle="--")
        top.annotate(
            "a node dies", (last, top.get_ylim()[1]), xytext=(6, -14), textcoords="offset points", color="crimson"
        )
    top.set_ylabel("loss (nats per byte)")
    top.legend(frameon=False)
    bottom.set_ylabel("workers")
    bottom.set_xlabel("step")
    bottom.set_ylim(0, max(row["world_size"] for row in rows) + 0.5)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
