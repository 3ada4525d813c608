"""Which nodes are measured with which, and who is slow. Pure.

A tournament: in each round every node is in one pair at most, so that no measurement shares a cable with another; no
pair meets twice. The bandwidth of a pair is that of its slower end, so a node is as quick as its quickest partners
show it to be, and slow when it is slow with all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[int, int]
LIMITS = {"nccl": (0.75, 0.5), "gloo": (0.5, 0.3)}
"""Backend → shares of the usual bandwidth: below the first a node is slow, below the second something of it is broken,
and so is the way between two quick ones. gloo's depends on what else the processors do."""


def rounds(nodes: int, most: int = 8) -> list[list[Pair]]:
    """At most `most` rounds of disjoint pairs (low, high) of nodes 0 … nodes-1, spread evenly over all partners.

    The circle method: all but one turn around a table, seat by seat.
    """
    seats = nodes + nodes % 2  # an odd one out pauses
    turns = seats - 1
    chosen = range(turns) if turns <= most else [i * turns // most for i in range(most)]
    found = []
    for turn in chosen:
        pairs = [(turn, turns), *(((turn + k) % turns, (turn - k) % turns) for k in range(1, seats // 2))]
        found.append(sorted((min(p), max(p)) for p in pairs if max(p) < nodes))
    return [pairs for pairs in found if pairs]


def partners(node: int, schedule: Sequence[Sequence[Pair]]) -> list[int | None]:
    """This node's partner in each round; None where it pauses."""
    return [next((a + b - node for a, b in pairs if node in (a, b)), None) for pairs in schedule]


@dataclass(frozen=True)
class PairVerdict:
    """`usual`: the bandwidth of a usual node, bytes/s; `slow`: node → its own; `dead`: nodes with whom no pair worked,
    though others' did; `paths`: pairs that are slow (or None: failed) though both ends are quick with others."""

    usual: float
    own: dict[str, float]
    slow: dict[str, float]
    dead: tuple[str, ...]
    paths: dict[tuple[str, str], float | None]


def analyse(measured: Mapping[tuple[str, str], float | None], backend: str = "nccl") -> PairVerdict:
    """Pair → bytes/s (None: it failed) → who is slow."""
    little, less = LIMITS[backend]
    rates: dict[str, list[float]] = {name: [] for name in sorted({name for pair in measured for name in pair})}
    for pair, rate in measured.items():
        for name in pair:
            rates[name] += [rate] if rate is not None else []
    own = {name: _own(found) for name, found in rates.items() if found}
    dead = tuple(name for name in rates if name not in own) if own else ()
    usual = statistics.median_high(own.values()) if own else 0.0
    # Of two nodes the pair's bandwidth says nothing about either.
    slow = {name: rate for name, rate in own.items() if rate < little * usual} if len(own) > 2 else {}
    paths = {
        pair: rate
        for pair, rate in measured.items()
        if not {*slow, *dead} & set(pair) and (rate is None or rate < less * min(own[name] for name in pair))
    }
    return PairVerdict(usual, own, slow, dead, paths if own else {})


def _own(rates: Iterable[float]) -> float:
    """What a node can do: its best pairs' bandwidth, of five and more the second best, so that no lucky one counts."""
    ordered = sorted(rates, reverse=True)
    return ordered[(len(ordered) - 1) // 4]
