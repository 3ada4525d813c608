"""docs/metrics.png: what a Prometheus has scraped of a run (docs/metrics.md says how it comes to do that).

python docs/plot_metrics.py http://127.0.0.1:9090 RUN 2026-11-22T05:45:30 2026-11-22T05:53:30
"""

from __future__ import annotations

import json
import sys
import urllib.parse
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHOWN = {  # in words: PromQL of a run, colour
    "nodes ready": ('raylaunch_cluster_nodes{{state="ready"}}', "tab:gray"),
    "workers": ('raylaunch_run_world_size{{run="{run}"}}', "tab:green"),
    "tokens/s": ('raylaunch_run_tokens_per_second{{run="{run}"}}', "tab:orange"),
    "seconds without\na step": ('time() - raylaunch_run_last_step_timestamp_seconds{{run="{run}"}}', "crimson"),
    "loss": ('raylaunch_run_loss{{run="{run}"}}', "tab:blue"),
}
STEP = 2.0
"""Seconds between two points."""


def ask(prometheus: str, query: str, began: float, ended: float) -> tuple[list[float], list[float]]:
    """Times and values of the first series that answers."""
    words = urllib.parse.urlencode({"query": query, "start": began, "end": ended, "step": STEP})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{words}", timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    if not found:
        sys.exit(f"{prometheus} knows nothing of {query} in that time")
    return [at for at, _ in found[0]["values"]], [float(value) for _, value in found[0]["values"]]


def main(prometheus: str, run: str, began: float, ended: float) -> None:
    figure, axes = plt.subplots(len(SHOWN), 1, sharex=True, figsize=(9, 6.4), layout="constrained")
    for axis, (words, (query, colour)) in zip(axes, SHOWN.items(), strict=True):
        query = query.format(run=run)
        times, values = ask(prometheus, query, began, ended)
        minutes = [(at - began) / 60 for at in times]
        counts = all(value == int(value) for value in values)
        axis.plot(minutes, values, color=colour, linewidth=1.6, drawstyle="steps-post" if counts else "default")
        axis.set_title(query, loc="left", fontsize=8, family="monospace", color="0.35", pad=3)
        axis.set_ylabel(words, fontsize=9)
        axis.set_ylim(0, max(values) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    axes[-1].set_xlabel("minutes")
    figure.savefig(Path(__file__).with_name("metrics.png"), dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), sys.argv[2], *(datetime.fromisoformat(one).timestamp() for one in sys.argv[3:5]))
