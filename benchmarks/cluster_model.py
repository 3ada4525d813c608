"""A model of a large cluster: the share of its time that it trains, by its size and the time between saves.

    python -m benchmarks.cluster_model --nodes 2048 --mttf-node 30d [--from RUN_DIR] [--save 20s]
    python -m benchmarks.cluster_model --check RUN_DIR       the model beside what a chaos run did

Words: N nodes, each with a mean time M1 between failures; the cluster's is M = M1/N. A step's progress is
lost unless saved; every τ seconds of progress a save keeps the steps waiting for δ. A fault costs what
was done since the last save, and a recovery of R seconds, in which further faults may come. The lost
node's replacement comes after some time, and growing back costs another G (a recovery without detection
and with nothing lost).

Closed form. A segment of τ + δ has to go by without a fault, in a Poisson process of rate 1/M with
restarts of R; by the renewal argument (the process begins anew at each save and each restart) its
expected time is M·e^(R/M)·(e^((τ+δ)/M) - 1), so that

    ETTR(τ) = τ / (M · e^(R/M) · (e^((τ+δ)/M) - 1))

(J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22, 2006;
which also gives the optimum used here: √(2δM)·[1 + ⅓√(δ/2M) + δ/18M] - δ; its first term is J. W.
Young's, CACM 17, 1974.) G is taken with R, and while a node is missing the cluster is 1/N slower: a factor
1 - T/M1 with T the time to a replacement. A seeded Monte-Carlo of the same story, fault by fault, with the
missing nodes counted and the resizes at the saves, has to agree (a test holds that).
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raylaunch.errors import UsageError
from raylaunch.observe.history import goodput
from raylaunch.observe.history.recoveries import PHASES
from raylaunch.tools.chaos.recovery_summary import columns
from raylaunch.tools.chaos.schedule import seconds

UNPLANNED = ("detect", "elect", "bring_up", "retry")
"""Phases that a planned resize does not have."""
INTERVALS = (15.0, 60.0, 300.0, 900.0, 3600.0)


def spoken(value: float) -> str:
    """A duration for people: 90 → 1.5m."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("m", 60.0)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}s"


@dataclass(frozen=True)
class Costs:
    """What one fault costs, phase by phase, and one save; in seconds."""

    phases: dict[str, float]
    save: float
    """How long a save keeps the steps waiting."""
    source: str

    @property
    def recovery(self) -> float:
        return sum(self.phases.values())

    @property
    def resize(self) -> float:
        return sum(value for name, value in self.phases.items() if name not in UNPLANNED)

    def changed(self, text: str) -> Costs:
        """With phases as in `connect=4,restore=20s`; UsageError for one that does not exist."""
        own = dict(self.phases)
        for word in text.split(","):
            name, _, value = word.partition("=")
            if name.strip() not in PHASES:
                raise UsageError(f"no phase {name.strip()!r}", f"There is: {', '.join(PHASES)}.")
            own[name.strip()] = 0.0 if value.strip() in {"0", "0s"} else seconds(value)
        return replace(self, phases=own, source=f"{self.source}, changed")

    def saving(self, value: float) -> Costs:
        return replace(self, save=value)


SANDBOX = Costs(
    {"detect": 0.1, "stop": 0.3, "decide": 0.1, "start": 0.02, "connect": 9.2, "build": 1.7, "restore": 0.4,
     "first_step": 0.05},
    save=0.25,
    source="recoveries on a sandbox of two CPU cores",
)  # fmt: skip


def measured(run_dir: Path) -> Costs:
    """As this run's ledger has them; UsageError when it never recovered from anything."""
    book = goodput.of_run(run_dir)
    done = [r for r in book.recoveries if r.total is not None and r.kind != "resize"]
    if not done:
        raise UsageError(f"run {run_dir.name} never recovered from a fault", "Name one of `raylaunch chaos`.")
    phases = {name: statistics.mean(r.phases.get(name, 0.0) for r in done) for name in PHASES}
    return Costs(phases, book.save_stall, f"{len(done)} recoveries of run {run_dir.name}")


def ettr(interval: float, save: float, recovery: float, mtbf: float, while_down: bool = True) -> float:
    """The share of time that trains, at constant size; the formula above.

    `while_down`: further faults may come during a recovery. Without (an injector that waits), a
    recovery is R and the rest renews as before: τ / ((M + R)·(e^((τ+δ)/M) - 1)).
    """
    exponent = (interval + save) / mtbf
    if exponent > 500 or recovery / mtbf > 500:
        return 0.0
    one = mtbf * math.exp(recovery / mtbf) if while_down else mtbf + recovery
    return interval / (one * math.expm1(exponent))


def best_interval(save: float, mtbf: float) -> float:
    """Daly's optimum; the mean time between failures itself where a save takes longer than twice that."""
    if save >= 2 * mtbf:
        return mtbf
    ratio = save / (2 * mtbf)
    return max(math.sqrt(2 * save * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save, 1e-3)


def predicted(costs: Costs, nodes: int, mttf_node: float, interval: float, replacement: float) -> float:
    """ETTR of a whole cluster, in closed form."""
    recovery = costs.recovery + (costs.resize if replacement > 0 else 0.0)
    return ettr(interval, costs.save, recovery, mttf_node / nodes) * max(0.0, 1 - replacement / mttf_node)


def simulated(
    costs: Costs, nodes: int, mttf_node: float, interval: float, replacement: float, seed: int, faults: int = 20000
) -> float:
    """ETTR by a seeded Monte-Carlo over so many faults: progress in full-size seconds over time."""
    source = random.Random(seed)
    mtbf = mttf_node / nodes
    now = saved = 0.0
    returns: list[float] = []  # when the missing nodes are back, for the next save
    waiting = 0  # nodes that are back and not used yet
    next_fault = source.expovariate(1 / mtbf)
    left = faults
    while left:
        if not returns and not waiting:  # nothing happens until the next fault but saves
            count = max(0.0, (next_fault - now) // (interval + costs.save))
            now, saved = now + count * (interval + costs.save), saved + count * interval
        while returns and returns[0] <= now:
            heapq.heappop(returns)
            waiting += 1
        speed = max(0.0, 1 - (len(returns) + waiting) / nodes)
        need = interval / speed if speed > 0 else math.inf
        if now + need + costs.save <= next_fault:
            now += need + costs.save
            saved += interval
            if waiting:  # grow onto them at this save
                waiting = 0
                now, next_fault, left = _down(source, now, costs.resize, next_fault, mtbf, left, returns, replacement)
            continue
        now = next_fault  # what was done since the last save is lost
        left -= 1
        heapq.heappush(returns, now + replacement)
        next_fault = now + source.expovariate(1 / mtbf)
        now, next_fault, left = _down(source, now, costs.recovery, next_fault, mtbf, left, returns, replacement)
        while returns and returns[0] <= now:  # the new attempt takes what has come
            heapq.heappop(returns)
        waiting = 0
    return saved / now


def _down(
    source: random.Random, now: float, lasts: float, fault: float, mtbf: float, left: int,
    returns: list[float], replacement: float,
) -> tuple[float, float, int]:  # fmt: skip
    """A recovery, begun anew by each fault that comes during it: (its end, the next fault, faults left)."""
    while fault < now + lasts and left:
        now = fault
        left -= 1
        heapq.heappush(returns, now + replacement)
        fault = now + source.expovariate(1 / mtbf)
    return now + lasts, fault, left


def sizes(text: str) -> list[int]:
    """`256,2048` → both; one size N → N/8, N/4, N/2, N."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UsageError(f"--nodes {text}: not a number of nodes", "Write 2048 or 256,512,2048.")
    if len(found) == 1:
        found = sorted({max(1, found[0] // part) for part in (8, 4, 2, 1)})
    return found


def table(
    costs: Costs,
    nodes: Sequence[int],
    mttf_node: float,
    intervals: Sequence[float] | None,
    replacement: float,
    seed: int,
) -> str:
    """ETTR by size and interval, for people."""
    chosen = sorted(set(intervals or INTERVALS))
    rows = [("nodes", "a fault every", *(f"save {spoken(i)}" for i in chosen), "best", "ETTR there", "simulated")]
    for count in nodes:
        mtbf = mttf_node / count
        best = best_interval(costs.save, mtbf)
        rows.append(
            (
                str(count),
                spoken(mtbf),
                *(f"{predicted(costs, count, mttf_node, i, replacement):.2%}" for i in chosen),
                spoken(best),
                f"{predicted(costs, count, mttf_node, best, replacement):.2%}",
                f"{simulated(costs, count, mttf_node, best, replacement, seed, faults=4000):.2%}",
            )
        )
    parts = ", ".join(f"{name} {value:.2f}" for name, value in costs.phases.items() if value > 0.0)
    return "\n".join(
        [
            f"expected effective-training-time ratio; a node fails every {spoken(mttf_node)}, is replaced after "
            f"{spoken(replacement)}; a save keeps the steps waiting for {costs.save:.2f} s",
            f"a recovery takes {costs.recovery:.1f} s ({costs.source}): {parts}",
            "",
            *columns(rows),
        ]
    )


@dataclass(frozen=True)
class Check:
    """The model beside what a chaos run did."""

    faults: int
    mtbf: float
    """Mean seconds of training between two faults."""
    recovery: float
    interval: float
    save: float
    predicted: float
    real: float

    @property
    def apart(self) -> float:
        return self.predicted - self.real


def check(book: goodput.Ledger) -> Check:
    """What the model says of such faults, saves and recoveries, against the ledger's own goodput.

    From the first step to the last: the time before is no fault's. Recoveries and planned resizes both
    count; an injector waits for each recovery, so no fault comes during one.
    """
    ended = [r for r in book.recoveries if r.total is not None]
    if not ended or book.interval <= 0:
        raise UsageError("that run had no recovery, or not two saves", "Name one of `raylaunch chaos`.")
    down = sum(r.total or 0.0 for r in ended)
    useful = book.parts["productive"] + book.parts["redone"] + book.parts["checkpoint"]
    mtbf, recovery = useful / len(ended), down / len(ended)
    # Of planned resizes nothing is lost: the model loses half an interval for each.
    faults = [r for r in ended if r.kind != "resize"]
    says = ettr(book.interval, book.save_stall, recovery, mtbf, while_down=False)
    if len(faults) < len(ended):
        lossless = book.interval / (book.interval + book.save_stall) * mtbf / (mtbf + recovery)
        says = (says * len(faults) + lossless * (len(ended) - len(faults))) / len(ended)
    real = book.parts["productive"] / (useful + down)
    return Check(len(faults), mtbf, recovery, book.interval, book.save_stall, says, real)


def check_table(run_dir: Path) -> str:
    """`check`, for people."""
    found = check(goodput.of_run(run_dir))
    return "\n".join(
        [
            f"run {run_dir.name}: {found.faults} faults, {found.mtbf:.1f} s of training between two, {found.recovery:.1f} s "
            f"a recovery; a save every {found.interval:.2f} s keeps the steps waiting for {found.save:.3f} s",
            f"training share of the time, from the first step on: model {found.predicted:.1%}, really {found.real:.1%} "
            f"({found.apart:+.1%})",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", help="sizes, as N,N,…; a single N means N/8 to N")
    parser.add_argument("--mttf-node", type=seconds, help="mean time to failure of a node, for example 30d")
    parser.add_argument("--from", dest="source", type=Path, metavar="RUN_DIR", help="phases as measured in this run")
    parser.add_argument("--phases", default="", metavar="NAME=SECONDS,…", help="phases of a recovery")
    parser.add_argument("--interval", default="", help="checkpoint intervals, as 1m,5m,…")
    parser.add_argument("--save", type=seconds, help="time that a checkpoint blocks training")
    parser.add_argument("--replace", type=seconds, default=300.0, help="time to replace a lost node")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path, metavar="RUN_DIR")
    given = parser.parse_args()
    if given.check is not None:
        return print(check_table(given.check))
    if given.nodes is None or given.mttf_node is None:
        parser.error("give --nodes and --mttf-node, or --check")
    costs = measured(given.source) if given.source is not None else SANDBOX
    costs = costs.changed(given.phases) if given.phases else costs
    costs = costs.saving(given.save) if given.save is not None else costs
    intervals = [seconds(word) for word in given.interval.split(",")] if given.interval else None
    print(table(costs, sizes(given.nodes), given.mttf_node, intervals, given.replace, given.seed))


if __name__ == "__main__":
    main()
