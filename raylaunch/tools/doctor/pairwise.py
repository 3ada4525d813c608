"""The schedule of pairs, and which nodes are slow. Pure.

A tournament: in each round, a node is in at most one pair, so that measurements do not share a cable; no pair is in two
rounds. The bandwidth of a pair is that of its slower node. So a node is rated by its fastest pairs, and is slow if it
is slow with all partners.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[int, int]
LIMITS = {"nccl": (0.75, 0.5), "gloo": (0.5, 0.3)}
"""Backend → fractions of the median bandwidth: below the first, a node is slow; below the second, the node, or the path
between two fast nodes, is faulty. gloo also depends on other load on the CPUs."""


def rounds(nodes: int, most: int = 8) -> list[list[Pair]]:
    """At most `most` rounds of disjoint pairs (low, high) of nodes 0 … nodes-1, spread evenly over all partners.

    The circle method: one node is fixed, the others rotate.
    """
    seats = nodes + nodes % 2  # with an odd number of nodes, one pauses
    turns = seats - 1
    chosen = range(turns) if turns <= most else [i * turns // most for i in range(most)]
    found = []
    for turn in chosen:
        pairs = [(turn, turns), *(((turn + k) % turns, (turn - k) % turns) for k in range(1, seats // 2))]
        found.append(sorted((min(p), max(p)) for p in pairs if max(p) < nodes))
    return [pairs for pairs in found if pairs]


def partners(node: int, schedule: Sequence[Sequence[Pair]]) -> list[int | None]:
    """This node's partner in each round; None if it pauses."""
    return [next((a + b - node for a, b in pairs if node in (a, b)), None) for pairs in schedule]


@dataclass(frozen=True)
class PairVerdict:
    """`usual`: median bandwidth of the nodes, bytes/s; `own`, `slow`: node → its bandwidth; `dead`: nodes whose pairs
    all failed while others worked; `paths`: slow pairs (None: failed) of nodes that are fast with others."""

    usual: float
    own: dict[str, float]
    slow: dict[str, float]
    dead: tuple[str, ...]
    paths: dict[tuple[str, str], float | None]


def analyse(measured: Mapping[tuple[str, str], float | None], backend: str = "nccl") -> PairVerdict:
    """Find slow nodes and paths from the bandwidth of each pair in bytes/s (None: failed)."""
    little, less = LIMITS[backend]
    rates: dict[str, list[float]] = {name: [] for name in sorted({name for pair in measured for name in pair})}
    for pair, rate in measured.items():
        for name in pair:
            rates[name] += [rate] if rate is not None else []
    own = {name: _own(found) for name, found in rates.items() if found}
    dead = tuple(name for name in rates if name not in own) if own else ()
    usual = statistics.median_high(own.values()) if own else 0.0
    # With two nodes, one bandwidth does not show which of them is slow.
    slow = {name: rate for name, rate in own.items() if rate < little * usual} if len(own) > 2 else {}
    paths = {
        pair: rate
        for pair, rate in measured.items()
        if not {*slow, *dead} & set(pair) and (rate is None or rate < less * min(own[name] for name in pair))
    }
    return PairVerdict(usual, own, slow, dead, paths if own else {})


def _own(rates: Iterable[float]) -> float:
    """A node's bandwidth: that of its best pair; of five or more pairs the second best, to ignore outliers."""
    ordered = sorted(rates, reverse=True)
    return ordered[(len(ordered) - 1) // 4]
