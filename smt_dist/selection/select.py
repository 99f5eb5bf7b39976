"""Rank blocks by score and select them within budgets, equally on every rank."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from smt_dist.config import SelectionConfig, SMTConfig
from smt_dist.distributed import assert_same_on_all_ranks
from smt_dist.errors import SMTError
from smt_dist.selection.block_scores import BlockScores
from smt_dist.selection.weight_scores import NEVER
from smt_dist.sparse.blocks import Block, BlockSelection
from smt_dist.sparse.layer_names import layer_key

logger = logging.getLogger(__name__)

Candidate = tuple[str, Block]


class Pool(NamedTuple):
    """Describe one budget: the modules it covers and its number of blocks.

    Attributes:
        name: name of the config's group, or of all groups; used in messages.
        modules: in the model's order.
        blocks: the number of blocks to choose.
    """

    name: str
    modules: list[str]
    blocks: int


def select_blocks(scores: BlockScores, config: SMTConfig) -> BlockSelection:
    """Choose the best blocks that each budget, its strategy and its bounds allow.

    Ties break by (module order, row, col), so that equal scores give equal files for any world size and engine.
    With a process group, the ranks compare a hash of the result. A block whose score is minus infinity is never chosen.

    Args:
        scores: of all groups' modules.
        config: gives budgets, strategy and bounds.

    Returns:
        The selection, equal on all ranks.

    Raises:
        SMTError: a budget is smaller than one block or larger than its targets, or floor, ceiling or strategy can't be
            kept within it; names the group.
        RuntimeError: the ranks' selections differ.
    """
    selection = choose_blocks(scores, config)
    assert_same_on_all_ranks(selection.to_json().encode(), "the block selection")
    return selection


def choose_blocks(scores: BlockScores, config: SMTConfig, pools: list[Pool] | None = None) -> BlockSelection:
    """Choose blocks as :func:`select_blocks` does, without comparing ranks.

    Args:
        scores: as for :func:`select_blocks`.
        config: as for :func:`select_blocks`.
        pools: used instead of the config's budgets.
    """
    chosen: dict[str, list[Block]] = {}
    for pool in budget_pools(scores, config) if pools is None else pools:
        if config.selection.strategy == "norm_dist":
            picks = _best_of_each(scores, pool)
        elif config.selection.strategy == "even":
            picks = _spread_evenly(scores, pool)
        elif config.selection.floor is None and config.selection.ceiling is None:
            picks = _best_of_all(scores, pool)
        else:
            picks = best_within_bounds(_ranked(scores, pool.modules), pool, config.selection)
        for module, block in picks:
            chosen.setdefault(module, []).append(block)
    # The model's order, so that the file doesn't depend on the order of choice.
    order = [module for module in scores.tables if module in chosen]
    group_of = {module: group for group, modules in scores.groups.items() for module in modules}
    return BlockSelection(
        block_size=scores.block_size,
        blocks={module: sorted(chosen[module]) for module in order},
        shapes={module: scores.shapes[module] for module in order},
        groups={module: group_of[module] for module in order},
    )


def budget_pools(scores: BlockScores, config: SMTConfig) -> list[Pool]:
    """Return one pool per group, or one for all groups if ``selection.budget`` is ``joint``.

    Raises:
        SMTError: a budget is smaller than one block or larger than its targets; names the group.
    """
    elements = scores.block_size[0] * scores.block_size[1]
    pools = [
        Pool(group.name, scores.groups[group.name], group.budget(scores.parameters_2d, elements))
        for group in config.groups
    ]
    if config.selection.budget == "joint":
        targets = {module for pool in pools for module in pool.modules}
        modules = [module for module in scores.tables if module in targets]
        pools = [Pool(" + ".join(pool.name for pool in pools), modules, sum(pool.blocks for pool in pools))]
    for pool in pools:
        _refuse_too_large(pool, scores, config, elements)
    return pools


def _refuse_too_large(pool: Pool, scores: BlockScores, config: SMTConfig, elements: int) -> None:
    available = sum(int((scores.tables[module] > NEVER).sum()) for module in pool.modules)
    if pool.blocks <= available:
        return
    given = ", ".join(
        f"blocks: {group.blocks}" if group.blocks is not None else f"fraction: {group.fraction}"
        for group in config.groups
        if config.selection.budget == "joint" or group.name == pool.name
    )
    what = "targets have" if scores.score != "diagonal" else "targets' diagonals have"
    raise SMTError(
        f"smt config groups[{pool.name}].{given} asks for {pool.blocks} blocks, but its {len(pool.modules)} {what} "
        f"{available} (fraction {available * elements / scores.parameters_2d:.4f})"
    )


def _ranked(scores: BlockScores, modules: list[str]) -> list[tuple[float, Candidate]]:
    """Return all blocks that can be chosen, best first; ties keep (module, row, col) order."""
    candidates: list[tuple[float, Candidate]] = []
    for module in modules:
        table = scores.tables[module]
        columns = table.shape[1]
        candidates += [
            (score, (module, divmod(index, columns)))
            for index, score in enumerate(table.flatten().tolist())
            if score > NEVER
        ]
    return sorted(candidates, key=lambda candidate: -candidate[0])


def _best_of_all(scores: BlockScores, pool: Pool) -> list[Candidate]:
    ranked = _ranked(scores, pool.modules)
    _log_gap(pool.name, _cut_off_gap(ranked, pool.blocks))
    return [candidate for _, candidate in ranked[: pool.blocks]]


def _best_of_each(scores: BlockScores, pool: Pool) -> list[Candidate]:
    """Apply ``norm_dist``: equally many blocks of each weight, the rest from the first weights."""
    share, rest = divmod(pool.blocks, len(pool.modules))
    picks: list[Candidate] = []
    gaps = []
    for index, module in enumerate(pool.modules):
        count = share + (index < rest)
        ranked = _ranked(scores, [module])
        if count > len(ranked):
            raise SMTError(
                f"smt config groups[{pool.name}]: strategy norm_dist needs {count} blocks of {module}, which has "
                f"{len(ranked)}; lower the budget, or use even or no_restriction"
            )
        if count:
            gaps.append(_cut_off_gap(ranked, count))
            picks += [candidate for _, candidate in ranked[:count]]
    _log_gap(pool.name, min(gaps))
    return picks


def _spread_evenly(scores: BlockScores, pool: Pool) -> list[Candidate]:
    """Apply ``even``: equally many blocks of each weight, or all it has; the rest by score.

    Blocks with an infinite score, which a re-selection keeps, are always chosen, even beyond a weight's share.
    """
    ranked = {module: _ranked(scores, [module]) for module in pool.modules}
    available = {module: len(found) for module, found in ranked.items()}
    fixed = {module: sum(score == math.inf for score, _ in found) for module, found in ranked.items()}
    level = even_level(available, pool.blocks, fixed)
    counts = {module: max(min(available[module], level), fixed[module]) for module in pool.modules}
    following = [module for module in pool.modules if counts[module] == level < available[module]]
    following.sort(key=lambda module: -ranked[module][level][0])
    rest = pool.blocks - sum(counts.values())
    for module in following[:rest]:
        counts[module] += 1
    gaps = [_cut_off_gap(ranked[module], count) for module, count in counts.items() if count]
    if 0 < rest < len(following):
        gaps.append(_gap(*(ranked[module][level][0] for module in following[rest - 1 : rest + 1])))
    _log_gap(pool.name, min(gaps))
    return [candidate for module, count in counts.items() for _, candidate in ranked[module][:count]]


def even_level(available: Mapping[str, int], budget: int, fixed: Mapping[str, int] | None = None) -> int:
    """Return the largest number of blocks per weight that a budget covers.

    Args:
        available: eligible blocks of each weight; a weight with fewer than the level gives all.
        budget: number of blocks.
        fixed: blocks of a weight that are chosen in any case; 0 for a weight that isn't a key.
    """
    least = fixed or {}

    def spent(level: int) -> int:
        return sum(max(min(count, level), least.get(module, 0)) for module, count in available.items())

    return bisect_right(range(1, max(available.values(), default=0) + 1), budget, key=spent)


def best_within_bounds(ranked: list[tuple[float, Candidate]], pool: Pool, bounds: SelectionConfig) -> list[Candidate]:
    """Choose the best blocks with at least ``floor`` and at most ``ceiling`` of each layer.

    Each layer's best blocks up to the floor come first, then the best of the others in layers below the ceiling. No
    other choice has a larger sum of scores.

    Args:
        ranked: (score, block) of all eligible blocks, best first.
        pool: the budget.
        bounds: gives ``floor``, ``ceiling`` and ``bounds_per``.

    Raises:
        SMTError: the floors exceed the budget or a layer, or the ceilings don't leave room for the budget.
    """
    layer_of = {module: layer_key(module) if bounds.bounds_per == "layer" else module for module in pool.modules}
    available = Counter(layer_of[module] for _, (module, _) in ranked)
    _refuse_bounds(pool, bounds, {layer: available[layer] for layer in layer_of.values()})
    floor, ceiling = bounds.floor or 0, bounds.ceiling or len(ranked)
    taken: Counter[str] = Counter()
    chosen = [False] * len(ranked)
    left = pool.blocks
    for limit in (floor, ceiling):
        for index, (_, (module, _)) in enumerate(ranked):
            layer = layer_of[module]
            if left and not chosen[index] and taken[layer] < limit:
                chosen[index] = True
                taken[layer] += 1
                left -= 1
    _log_gap(pool.name, _smallest_gap(ranked, chosen, [layer_of[module] for _, (module, _) in ranked], floor, ceiling))
    return [candidate for index, (_, candidate) in enumerate(ranked) if chosen[index]]


def _refuse_bounds(pool: Pool, bounds: SelectionConfig, available: Mapping[str, int]) -> None:
    where = f"smt config selection, groups[{pool.name}]"
    kind = f"{bounds.bounds_per}s"
    if bounds.floor is not None:
        if bounds.floor * len(available) > pool.blocks:
            raise SMTError(
                f"{where}: floor {bounds.floor} of {len(available)} {kind} needs {bounds.floor * len(available)} "
                f"blocks, the budget is {pool.blocks}; lower the floor, or raise the budget"
            )
        for layer, count in available.items():
            if count < bounds.floor:
                raise SMTError(f"{where}: floor {bounds.floor}: {layer} has {count} blocks; use at most {count}")
    if bounds.ceiling is not None:
        room = sum(min(count, bounds.ceiling) for count in available.values())
        if room < pool.blocks:
            raise SMTError(
                f"{where}: ceiling {bounds.ceiling} of {len(available)} {kind} leaves room for {room} blocks, the "
                f"budget is {pool.blocks}; raise the ceiling, or lower the budget"
            )


def _smallest_gap(
    ranked: list[tuple[float, Candidate]], chosen: list[bool], layers: list[str], floor: int, ceiling: int
) -> float:
    """Return the smallest relative gap between a chosen block and one that could replace it.

    A block can replace one of its own layer; or one of another layer, if that layer is above the floor and its own is
    below the ceiling.
    """
    taken = Counter(layer for layer, is_in in zip(layers, chosen, strict=True) if is_in)
    last: dict[str, float] = {}
    first_out: dict[str, float] = {}
    for (score, _), layer, is_in in zip(ranked, layers, chosen, strict=True):
        if is_in:
            last[layer] = score
            if taken[layer] > floor:
                last["all"] = score
        else:
            first_out.setdefault(layer, score)
            if taken[layer] < ceiling:
                first_out.setdefault("all", score)
    return min((_gap(last[scope], first_out[scope]) for scope in last if scope in first_out), default=math.inf)


def _cut_off_gap(ranked: list[tuple[float, Candidate]], budget: int) -> float:
    """Return the relative gap between the last chosen score and the first one not chosen."""
    return _gap(ranked[budget - 1][0], ranked[budget][0]) if budget < len(ranked) else math.inf


def _gap(last: float, first_out: float) -> float:
    return (last - first_out) / abs(last) if math.isfinite(last) and last else math.inf if last else 0.0


def _log_gap(name: str, gap: float) -> None:
    """Log the gap: below about 1e-5, rounding may give another selection on another world size."""
    logger.info("selection %s: relative gap at the cut-off %.2e", name, gap)
