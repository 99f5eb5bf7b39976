"""Choose which blocks a re-selection drops and grows, by scores and magnitudes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from smt_dist.config import SelectionConfig, SMTConfig
from smt_dist.errors import SMTError
from smt_dist.selection.block_scores import BlockScores
from smt_dist.selection.select import Pool, budget_pools, choose_blocks, even_level
from smt_dist.selection.weight_scores import NEVER
from smt_dist.sparse.blocks import Block, BlockSelection
from smt_dist.sparse.layer_names import layer_key


def drop_and_grow(
    scores: BlockScores,
    active: BlockSelection,
    magnitudes: Mapping[str, Mapping[Block, float]],
    config: SMTConfig,
    fraction: float,
) -> BlockSelection:
    """Drop each budget's weakest blocks and grow as many new ones.

    Budgets, strategy and bounds apply as in a selection. Of equally weak blocks the last in (module order, row, col)
    is dropped first. A block that is dropped here isn't grown here; a block that was frozen earlier can be. Blocks of
    modules that aren't targets are kept.

    Args:
        scores: of all targets.
        active: the blocks that are trained now.
        magnitudes: mean \\|delta\\| of each of them; the smallest are the weakest.
        config: gives groups, strategy and bounds; a budget's size is its number of blocks in ``active``.
        fraction: share of each budget's active blocks to drop, rounded down.

    Returns:
        The new selection, with as many blocks as ``active``.

    Raises:
        SMTError: no active block lies in a target, or the bounds can't be kept.
    """
    tables = {module: table.clone() for module, table in scores.tables.items()}
    others = {module: blocks for module, blocks in active.blocks.items() if module not in tables}
    if len(others) == len(active.blocks):
        raise SMTError("reselect: no trained block lies in a target of the smt config")
    pools = []
    for pool in _pools(scores, config):
        own = [(module, block) for module in pool.modules for block in active.blocks.get(module, ())]
        if own:
            pools.append(pool._replace(blocks=len(own)))
            ranked = sorted(own, key=lambda one: -magnitudes[one[0]][one[1]])
            dropped = _weakest(ranked, math.floor(fraction * len(own) + 1e-9), pools[-1], scores, config.selection)
            for module, block in own:
                tables[module][block] = NEVER if (module, block) in dropped else math.inf
    chosen = choose_blocks(BlockScores(**{**vars(scores), "tables": tables}), config, pools)
    kept = {field: {m: v for m, v in getattr(active, field).items() if m in others} for field in ("shapes", "groups")}
    return BlockSelection(
        block_size=active.block_size,
        blocks={**chosen.blocks, **others},
        shapes={**chosen.shapes, **kept["shapes"]},
        groups={**chosen.groups, **kept["groups"]},
    )


def _weakest(
    ranked: list[tuple[str, Block]], count: int, pool: Pool, scores: BlockScores, bounds: SelectionConfig
) -> set[tuple[str, Block]]:
    """Return up to ``count`` of the last ranked blocks that budget and bounds can do without."""
    by_weight = bounds.strategy != "no_restriction" or bounds.bounds_per == "weight"
    place = {module: module if by_weight else layer_key(module) for module in pool.modules}
    left: Counter[str] = Counter()
    for module in pool.modules:
        left[place[module]] += int((scores.tables[module] > NEVER).sum())
    least = dict.fromkeys(left, bounds.floor or 0)
    if bounds.strategy == "norm_dist":
        share, rest = divmod(pool.blocks, len(pool.modules))
        least = {module: share + (index < rest) for index, module in enumerate(pool.modules)}
    most = bounds.ceiling or pool.blocks
    if bounds.strategy == "even":
        level = even_level(left, pool.blocks)
        least, most = {module: min(blocks, level) for module, blocks in left.items()}, level + 1
    room = sum(min(blocks, most) for blocks in left.values())
    dropped: set[tuple[str, Block]] = set()
    for module, block in reversed(ranked):
        where = place[module]
        needed = left[where] <= most  # then dropping this block leaves one block less to choose from
        if len(dropped) < count and left[where] > least[where] and (not needed or room > pool.blocks):
            dropped.add((module, block))
            left[where] -= 1
            room -= needed
    return dropped


def _pools(scores: BlockScores, config: SMTConfig) -> list[Pool]:
    """Return the budgets with their modules; the caller sets their sizes from the active blocks."""
    groups = [group.model_copy(update={"blocks": 1, "fraction": None}) for group in config.groups]
    return budget_pools(scores, config.model_copy(update={"groups": groups}))
