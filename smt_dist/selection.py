"""Ranking scores under budgets: ``BlockScores`` -> ``BlockSelection``, the same on every rank."""

from __future__ import annotations

import logging

from smt_dist.blocks import Block, BlockSelection
from smt_dist.config import GroupConfig, SMTConfig
from smt_dist.distributed import assert_same_on_all_ranks
from smt_dist.errors import SMTError
from smt_dist.scores import BlockScores

logger = logging.getLogger(__name__)

Candidate = tuple[str, Block]


def select_blocks(scores: BlockScores, config: SMTConfig) -> BlockSelection:
    """Choose each group's best blocks within its budget.

    Ties break by (module order, row, col), so that equal scores give equal files on any world size and engine.
    With a process group, the ranks compare a hash of the result.

    Args:
        scores: of all groups' modules.
        config: its budgets and strategy.

    Raises:
        SMTError: a budget is smaller than one block or larger than its targets; names the group.
        RuntimeError: the ranks disagree.
    """
    chosen: dict[str, list[Block]] = {}
    groups: dict[str, str] = {}
    elements = scores.block_size[0] * scores.block_size[1]
    for group in config.groups:
        modules = scores.groups[group.name]
        budget = _checked_budget(group, scores, modules, elements)
        if config.selection.strategy == "norm_dist":
            picks = _best_of_each(scores, modules, budget, group)
        else:
            picks = _best_of_all(scores, modules, budget, group.name)
        for module, block in picks:
            chosen.setdefault(module, []).append(block)
            groups[module] = group.name
    # The model's order, so that the file doesn't depend on which block came first.
    order = [module for module in scores.tables if module in chosen]
    selection = BlockSelection(
        block_size=scores.block_size,
        blocks={module: sorted(chosen[module]) for module in order},
        shapes={module: scores.shapes[module] for module in order},
        groups={module: groups[module] for module in order},
    )
    assert_same_on_all_ranks(selection.to_json().encode(), "the block selection")
    return selection


def _checked_budget(group: GroupConfig, scores: BlockScores, modules: list[str], elements: int) -> int:
    budget = group.budget(scores.parameters_2d, elements)
    available = sum(scores.tables[module].numel() for module in modules)
    if budget > available:
        given = f"blocks: {group.blocks}" if group.blocks is not None else f"fraction: {group.fraction}"
        raise SMTError(
            f"smt config groups[{group.name}].{given} asks for {budget} blocks, but its {len(modules)} targets have "
            f"{available} (fraction {available * elements / scores.parameters_2d:.4f})"
        )
    return budget


def _ranked(scores: BlockScores, modules: list[str]) -> list[tuple[float, Candidate]]:
    """All blocks of ``modules``, best first; a stable sort keeps (module order, row, col) among equals."""
    candidates: list[tuple[float, Candidate]] = []
    for module in modules:
        table = scores.tables[module]
        columns = table.shape[1]
        candidates += [
            (score, (module, divmod(index, columns))) for index, score in enumerate(table.flatten().tolist())
        ]
    return sorted(candidates, key=lambda candidate: -candidate[0])


def _best_of_all(scores: BlockScores, modules: list[str], budget: int, name: str) -> list[Candidate]:
    ranked = _ranked(scores, modules)
    _log_gap(name, _cut_off_gap(ranked, budget))
    return [candidate for _, candidate in ranked[:budget]]


def _best_of_each(scores: BlockScores, modules: list[str], budget: int, group: GroupConfig) -> list[Candidate]:
    """``norm_dist``: the same number from every weight, the rest one each to the first weights of the model."""
    share, rest = divmod(budget, len(modules))
    picks: list[Candidate] = []
    gaps = []
    for index, module in enumerate(modules):
        count = share + (index < rest)
        if count > scores.tables[module].numel():
            raise SMTError(
                f"smt config groups[{group.name}]: strategy norm_dist wants {count} blocks of {module}, which has "
                f"{scores.tables[module].numel()}; lower the budget or use no_restriction"
            )
        if count:
            ranked = _ranked(scores, [module])
            gaps.append(_cut_off_gap(ranked, count))
            picks += [candidate for _, candidate in ranked[:count]]
    _log_gap(group.name, min(gaps))
    return picks


def _cut_off_gap(ranked: list[tuple[float, Candidate]], budget: int) -> float:
    """How much less, relative to the last chosen score, the first block that isn't chosen has."""
    if budget >= len(ranked):
        return float("inf")
    last, first_out = ranked[budget - 1][0], ranked[budget][0]
    return (last - first_out) / last if last else 0.0


def _log_gap(name: str, gap: float) -> None:
    """Below about 1e-5 another world size may choose otherwise (rounding)."""
    logger.info("selection %s: relative gap at the cut-off %.2e", name, gap)
