"""Extrapolate from two small depths to the whole model.

At each moment, memory grows linearly with the number of layers.

The largest peak doesn't: with more layers another moment may take the lead. So moments are reckoned one by one, and the
largest is looked for at the end.
"""

from __future__ import annotations

from collections.abc import Callable

from smt_dist.memory.plan.categories import CATEGORIES, Memory
from smt_dist.memory.plan.trace import EDGE

STEP = 2


def at_full_depth(
    trace: Callable[[int], dict[str, Memory]], layers: int, special: int = EDGE, exact: bool = False
) -> dict[str, Memory]:
    """Return moment -> peak at ``layers`` layers.

    Args:
        trace: depth -> moment -> peak.
        layers: the model's depth.
        special: lowest layers that are unlike the others.
        exact: trace the whole depth.
    """
    small = special + EDGE + 1
    if exact or layers <= small + STEP:
        return trace(layers)
    low, high = trace(small), trace(small + STEP)
    factor = (layers - small) / STEP
    return {moment: _extrapolate(low[moment], high[moment], factor) for moment in low}


def _extrapolate(low: Memory, high: Memory, factor: float) -> Memory:
    def value(name: str) -> int:
        first, second = getattr(low, name), getattr(high, name)
        return max(0, round(first + (second - first) * factor))

    return Memory(**{name: value(name) for name in CATEGORIES})
