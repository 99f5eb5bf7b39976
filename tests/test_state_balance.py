"""No rank holds more optimizer state than the others: the largest share decides what fits."""

from __future__ import annotations

import math

import pytest
from harness import launch
from tiers import all_differences, chosen, slow_unless
from workers.balance import BLOCKS, ODD_SHAPES, SIDE

MASTER_AND_MOMENTS = 12
ELEMENTS = sum(BLOCKS) * SIDE * SIDE
FAKE_WORLD, FAKE_RANKS = 64, [0, 1, 31, 63]
WORLD_SIZES = (2, 4, FAKE_WORLD)
SHARDED = {"sharded": ELEMENTS, "sharded, odd shapes": sum(map(math.prod, ODD_SHAPES))}
each_size = pytest.mark.parametrize("world_size", slow_unless(WORLD_SIZES, lambda size: size == 2))


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """World size -> each rank's findings; of the largest only some ranks', on the fake process group."""
    results = {}
    for size in chosen(request, "world_size"):
        fake = {"fake_ranks": FAKE_RANKS, "fake_world": FAKE_WORLD} if size == FAKE_WORLD else {}
        ranks = len(FAKE_RANKS) if fake else size
        results[size] = launch("workers.balance:measure", ranks, tmp_path_factory.mktemp(f"ranks{size}"), **fake)
    return results


@each_size
def test_no_rank_holds_more_than_its_share(found, world_size):
    """Whole modules or blocks on one rank would fit on paper and run out of memory on that rank."""
    with all_differences() as check:
        for what, elements in SHARDED.items():
            shares = [rank["bytes"][what] for rank in found[world_size]]
            with check(f"{what}: even to one element"):
                assert max(shares) - min(shares) <= MASTER_AND_MOMENTS
                assert 0 <= max(shares) - MASTER_AND_MOMENTS * elements / world_size < MASTER_AND_MOMENTS
        for stage in ("zero1", "zero2", "zero3"):
            shares = [rank["bytes"][stage] for rank in found[world_size]]
            fair = MASTER_AND_MOMENTS * ELEMENTS / world_size
            # Rows of blocks spread over all ranks; blocks stored whole would land on the first ones.
            with check(f"{stage}: even within five percent"):
                assert max(shares) / min(shares) <= 1.05
            with check(f"{stage}: the fair share within five percent"):
                assert fair / 1.05 <= min(shares)
                assert max(shares) <= 1.05 * fair
        fake = world_size == FAKE_WORLD
        for index, rank in enumerate(found[world_size]):
            with check(f"rank {index}: the group is what it claims to be"):
                assert rank["world_size"] == world_size
                assert rank["rank"] == (FAKE_RANKS[index] if fake else index)
                assert rank["backend"] == ("fake" if fake else "gloo")
