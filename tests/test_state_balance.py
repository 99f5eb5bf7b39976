"""No rank holds more optimizer state than the others: the largest share decides what fits."""

from __future__ import annotations

import math

import pytest
from harness import launch
from workers.balance import BLOCKS, ODD_SHAPES, SIDE

MASTER_AND_MOMENTS = 12
ELEMENTS = sum(BLOCKS) * SIDE * SIDE
FAKE_WORLD, FAKE_RANKS = 64, [0, 1, 31, 63]
WORLD_SIZES = (2, 4, FAKE_WORLD)
each_size = pytest.mark.parametrize("world_size", WORLD_SIZES)
each_stage = pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """World size -> each rank's findings; of the largest only some ranks', on the fake process group."""
    real = {size: launch("workers.balance:measure", size, tmp_path_factory.mktemp(f"ranks{size}")) for size in (2, 4)}
    folder = tmp_path_factory.mktemp("fake")
    arguments = {"fake_ranks": FAKE_RANKS, "fake_world": FAKE_WORLD}
    return real | {FAKE_WORLD: launch("workers.balance:measure", len(FAKE_RANKS), folder, **arguments)}


def bytes_of(found, world_size, what):
    return [rank["bytes"][what] for rank in found[world_size]]


@each_size
@pytest.mark.parametrize(
    ("what", "elements"), [("sharded", ELEMENTS), ("sharded, odd shapes", sum(map(math.prod, ODD_SHAPES)))]
)
def test_ddp_and_fsdp2_share_evenly_to_one_element(found, world_size, what, elements):
    """Whole modules or blocks on one rank would fit on paper and run out of memory on that rank."""
    shares = bytes_of(found, world_size, what)
    assert max(shares) - min(shares) <= MASTER_AND_MOMENTS
    assert 0 <= max(shares) - MASTER_AND_MOMENTS * elements / world_size < MASTER_AND_MOMENTS


@each_size
@each_stage
def test_zero_shares_within_five_percent(found, world_size, stage):
    """Rows of blocks spread over all ranks; blocks stored whole would land on the first ones."""
    shares = bytes_of(found, world_size, stage)
    assert max(shares) / min(shares) <= 1.05
    fair = MASTER_AND_MOMENTS * ELEMENTS / world_size
    assert fair / 1.05 <= min(shares)
    assert max(shares) <= 1.05 * fair


@each_size
def test_group_was_what_it_claims_to_be(found, world_size):
    """Guards the tests above."""
    fake = world_size == FAKE_WORLD
    for index, rank in enumerate(found[world_size]):
        assert rank["world_size"] == world_size
        assert rank["rank"] == (FAKE_RANKS[index] if fake else index)
        assert rank["backend"] == ("fake" if fake else "gloo")
