"""A curve in braille: two by four dots per character, which all common terminal fonts have."""

from __future__ import annotations

import math
from collections.abc import Sequence

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Unicode, block Braille Patterns: the bit of the dot in that row and column."""


def curve(xs: Sequence[float], ys: Sequence[float], width: int, height: int) -> tuple[list[str], float, float]:
    """The points as `height` lines of `width` characters, and the minimum and maximum. NaN and infinite values are
    omitted; in each column of dots, the mean is drawn."""
    known = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    if not known or width < 1 or height < 1:
        return [" " * width] * height, math.nan, math.nan
    low, high = min(y for _, y in known), max(y for _, y in known)
    first, last = min(x for x, _ in known), max(x for x, _ in known)  # repeated steps go back
    sums: dict[int, tuple[float, int]] = {}
    for x, y in known:
        column = int((x - first) / ((last - first) or 1.0) * (2 * width - 1))
        total, count = sums.get(column, (0.0, 0))
        sums[column] = total + y / len(known) / 2, count + 1  # so small that no sum or difference overflows
    cells = [[0] * width for _ in range(height)]
    before: int | None = None
    for column in sorted(sums):
        total, count = sums[column]
        mean = total / count * len(known)
        share = min(1.0, max(0.0, (mean - low / 2) / ((high / 2 - low / 2) or 1.0)))
        row = round((1 - share) * (4 * height - 1))
        # A steep step is drawn as a line, so that the curve is continuous.
        rows = range(min(row, before + 1), max(row, before - 1) + 1) if before is not None else (row,)
        for dot in rows:
            cells[dot // 4][column // 2] |= _DOTS[dot % 4][column % 2]
        before = row
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells], low, high
