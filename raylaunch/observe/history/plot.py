"""Plots of a run: its loss and its workers over time or steps, with faults and recoveries marked.

matplotlib is an optional extra (`raylaunch[plot]`) and imported only here, when a plot is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raylaunch.errors import UsageError
from raylaunch.observe.history import goodput
from raylaunch.observe.history.recoveries import Recovery
from raylaunch.observe.history.timeline import is_step
from raylaunch.state import event_log, files

_WORDS = {"node_lost": "node lost", "worker_lost": "worker lost", "head_lost": "head lost", "driver_lost": "driver lost",
          "raylet_lost": "raylet lost", "drain": "drained", "grow": "grows"}  # fmt: skip
_INJECTED = {"worker": "worker killed", "hang": "worker frozen", "raylet": "raylet killed", "agent": "agent killed",
             "driver": "driver killed", "gcs": "GCS killed", "dashboard": "dashboard killed", "node": "node killed",
             "head": "head killed", "freeze": "node frozen", "cut": "node cut off", "drain": "node drained",
             "slurmd": "slurmd killed", "slurmctld": "slurmctld killed"}  # fmt: skip
"""The faults of `raylaunch chaos`, by kind."""


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files; UsageError if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("plotting requires matplotlib", "Install it: pip install 'raylaunch[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def named(recovery: Recovery, injected: dict[int, str]) -> str:
    """A short name of the recovery."""
    if recovery.kind == "resize":
        before, after = recovery.workers
        return f"{_WORDS.get(recovery.causes[0], recovery.causes[0])}: {before} → {after}"
    told = [_INJECTED.get(injected[seq], injected[seq]) for seq in recovery.injected if seq in injected]
    if told:
        return f"{' + '.join(dict.fromkeys(told))} (chaos)"
    text = ", ".join(_WORDS.get(c, c.replace("_", " ")) for c in recovery.causes)
    return f"{text} ({recovery.node})" if recovery.node else text


def run(run_dir: Path, out: Path, title: str = "") -> None:
    """Loss and workers over the seconds of a run, faults and recoveries marked; written to `out`."""
    plt = pyplot()
    rows = [row for row in files.read_lines(run_dir / files.METRICS_FILE) if is_step(row)]
    if not rows:
        raise UsageError(f"{run_dir} has no steps to plot", "Specify a run directory with a metrics.jsonl.")
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


def losses(run_dir: Path) -> dict[int, float]:
    """Step → loss; for a repeated step, that of the newest attempt."""
    found: dict[int, tuple[int, float]] = {}
    for row in files.read_lines(run_dir / files.METRICS_FILE):
        if is_step(row) and row["attempt"] >= found.get(row["step"], (0, 0.0))[0]:
            found[row["step"]] = (row["attempt"], float(row["loss"]))
    return {step: loss for step, (_, loss) in sorted(found.items())}


def curves(smooth: Path, faulted: Path, out: Path) -> float:
    """Plot two loss curves and their relative difference; returns the largest difference."""
    plt = pyplot()
    one, other = losses(smooth), losses(faulted)
    common = sorted(one.keys() & other.keys())
    if not common:
        raise UsageError(
            f"{smooth} and {faulted} have no step in common", "Specify two runs with the same configuration."
        )
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
