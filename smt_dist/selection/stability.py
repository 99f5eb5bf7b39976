"""How much two selections have in common, and two rankings; also between different block sizes."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from smt_dist.errors import SMTError
from smt_dist.selection.block_scores import BlockScores
from smt_dist.sparse.blocks import BlockSelection


def jaccard(first: BlockSelection, second: BlockSelection) -> float:
    """The elements that both chose, as a share of those that either chose: 1 for equal choices, 0 for disjoint ones.

    Raises:
        SMTError: a weight has different shapes in the two.
    """
    common = either = 0
    for module in first.blocks.keys() | second.blocks.keys():
        height, width = _common_cell(first.block_size, second.block_size)
        cells = [_cells(selection, module, height, width) for selection in (first, second)]
        shapes = {selection.shapes[module] for selection in (first, second) if module in selection.shapes}
        if len(shapes) > 1:
            raise SMTError(f"{module} is {' and '.join(map(str, sorted(shapes)))} in the two selections")
        common += len(cells[0] & cells[1])
        either += len(cells[0] | cells[1])
    return common / either


def chance_jaccard(first: float, second: float) -> float:
    """What two independent random choices of these shares of all blocks are expected to have in common (large numbers).

    For equal shares p: p / (2 - p).
    """
    both = first * second
    return both / (first + second - both)


def chosen_share(selection: BlockSelection, scores: BlockScores) -> float:
    """The chosen elements as a share of all elements of the targets."""
    return selection.parameters / sum(rows * cols for rows, cols in scores.shapes.values())


def rank_correlation(first: BlockScores, second: BlockScores) -> float | None:
    """Spearman's correlation of the blocks' scores over all targets; ties share their mean rank.

    Different block sizes are compared on the largest cells that both are made of, each with its block's score, so a
    block weighs by its area. Blocks that may not be chosen (minus infinity in either) are left out.

    Returns:
        None where one of the two ranks nothing: all scores are equal.

    Raises:
        SMTError: the targets aren't the same weights.
    """
    if first.shapes != second.shapes:
        raise SMTError("rank correlation: the two scores are of different weights")
    height, width = _common_cell(first.block_size, second.block_size)
    columns = [
        np.concatenate([_spread(scores, module, height, width).ravel() for module in first.tables])
        for scores in (first, second)
    ]
    known = np.isfinite(columns[0]) & np.isfinite(columns[1])
    ranks = [pd.Series(column[known]).rank().to_numpy() for column in columns]
    if any(rank.size < 2 or rank.min() == rank.max() for rank in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _common_cell(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    return math.gcd(first[0], second[0]), math.gcd(first[1], second[1])


def _cells(selection: BlockSelection, module: str, height: int, width: int) -> set[tuple[int, int]]:
    """The chosen cells of a weight; each of its blocks is a whole number of them."""
    down, across = selection.block_size[0] // height, selection.block_size[1] // width
    return {
        (row * down + i, col * across + j)
        for row, col in selection.blocks.get(module, ())
        for i in range(down)
        for j in range(across)
    }


def _spread(scores: BlockScores, module: str, height: int, width: int) -> np.ndarray:
    """Every cell's score: its block's."""
    table = scores.tables[module].numpy()
    return table.repeat(scores.block_size[0] // height, axis=0).repeat(scores.block_size[1] // width, axis=1)
