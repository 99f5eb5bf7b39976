"""Search for what still fits: micro-batch, world size or block budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

from smt_dist.errors import SMTError
from smt_dist.memory.plan.plan import OnProgress, Plan, make_plan
from smt_dist.memory.plan.request import Request
from smt_dist.memory.plan.spread import measure_shape

SEARCHES = ("batch", "world_size", "blocks")
MAX_BATCH = 4096
MAX_WORLD = 4096


@dataclass(frozen=True)
class Found:
    """Hold the result of a search.

    Attributes:
        what: one of :data:`SEARCHES`.
        value: the best that fits; None: nothing does.
        plans: value -> plan, of all that were looked at, sorted.
    """

    what: str
    value: int | None
    plans: dict[int, Plan]


def search(request: Request, what: str, exact: bool = False, on_progress: OnProgress = lambda _: None) -> Found:
    """Search along one value; what fits is taken to be monotone in it.

    Args:
        request: all other values; with ``device_memory``.
        what: one of :data:`SEARCHES`.
        exact: as for :func:`smt_dist.memory.plan.plan.make_plan`.
        on_progress: called with each value that is planned.

    Raises:
        SMTError: no device memory is given, or the search doesn't suit the method.
    """
    if request.device_memory is None:
        raise SMTError("--search needs --device_memory: what should it fit into?")
    if what == "blocks" and (request.method != "smt" or request.selection is not None):
        raise SMTError("--search blocks: belongs to --method smt, without --selection")
    plans: dict[int, Plan] = {}

    def plan(value: int) -> Plan:
        if value not in plans:
            on_progress(f"{what} {value}")
            plans[value] = make_plan(_changed(request, what, value), exact)
        return plans[value]

    if what == "world_size":
        value = _smallest(_world_sizes(request), lambda size: bool(plan(size).fits))
    elif what in SEARCHES:
        limit = MAX_BATCH if what == "batch" else _all_blocks(request)
        value = _largest(limit, lambda value: plan(value).peak_bytes, request.device_memory)
    else:
        raise SMTError(f"--search: {what!r} is not one of {', '.join(SEARCHES)}")
    return Found(what, value, dict(sorted(plans.items())))


def _changed(request: Request, what: str, value: int) -> Request:
    if what == "blocks":
        # The one group's budget; the model's own limits on it were checked.
        group = request.smt.groups[0].model_copy(update={"blocks": value, "fraction": None})
        return replace(request, smt=request.smt.model_copy(update={"groups": [group]}))
    return replace(request, **{what: value})


def _all_blocks(request: Request) -> int:
    if len(request.smt.groups) > 1:
        raise SMTError("--search blocks: the smt config has several groups; which one's budget should grow?")
    return sum(map(len, measure_shape(request).grids.values()))


def _world_sizes(request: Request) -> list[int]:
    """Return powers of two within a node, then doubling numbers of nodes.

    All are multiples of the replicas.
    """
    node = request.ranks_per_node
    sizes = [2**power for power in range(12) if 2**power < node]
    while node <= MAX_WORLD:
        sizes.append(node)
        node *= 2
    return [size for size in sizes if size % request.replicas == 0]


def _smallest(values: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the first value that fits, trying the smallest first.

    Large worlds take longer to plan.
    """
    return next((value for value in values if fits(value)), None)


def _largest(limit: int, peak: Callable[[int], int], memory: int) -> int | None:
    """Return the largest value up to ``limit`` that fits, after checking its successor.

    Peaks grow nearly evenly, so the next guess is where a line through the nearest two ends at the memory.
    """
    low, high = 1, limit + 1  # low fits, high doesn't
    if peak(1) > memory:
        return None
    guess = 2
    attempts = count()
    while high - low > 1:
        # Two neighbours of a good guess end the search; halving in between keeps a bad line from creeping.
        guess = (low + high) // 2 if next(attempts) % 3 == 2 else min(max(guess, low + 1), high - 1)
        size = peak(guess)
        if size <= memory:
            low = guess
        else:
            high = guess
        slope = max(1.0, (size - peak(1)) / (guess - 1))
        expected = int(1 + (memory - peak(1)) / slope)
        guess = expected + 1 if expected == low else expected
    return low
