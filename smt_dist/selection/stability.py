"""Compare two selections or two rankings, also of different block sizes."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from smt_dist.errors import SMTError
from smt_dist.selection.block_scores import BlockScores
from smt_dist.sparse.blocks import BlockSelection


def jaccard(first: BlockSelection, second: BlockSelection) -> float:
    """Return the Jaccard index of two selections' elements: 1 if equal, 0 if disjoint.

    Raises:
        SMTError: a weight has different shapes in the two selections.
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
    """Return the Jaccard index expected of two independent random choices of many blocks.

    Args:
        first: share of all blocks in the first choice.
        second: share of all blocks in the second choice. For equal shares p the result is p / (2 - p).
    """
    both = first * second
    return both / (first + second - both)


def chosen_share(selection: BlockSelection, scores: BlockScores) -> float:
    """Return the chosen elements as a share of all elements of the targets."""
    return selection.parameters / sum(rows * cols for rows, cols in scores.shapes.values())


def rank_correlation(first: BlockScores, second: BlockScores) -> float | None:
    """Return Spearman's rank correlation of the blocks' scores over all targets.

    Ties share their mean rank. Different block sizes are compared on the largest cells that divide both. Each cell has
    its block's score, so a block counts by its area. Blocks that can't be chosen (minus infinity in either) are left
    out.

    Returns:
        The correlation, or None if all scores of one side are equal.

    Raises:
        SMTError: the targets differ in name or shape.
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
    """Return the chosen cells of a weight; a block is a whole number of cells."""
    down, across = selection.block_size[0] // height, selection.block_size[1] // width
    return {
        (row * down + i, col * across + j)
        for row, col in selection.blocks.get(module, ())
        for i in range(down)
        for j in range(across)
    }


def _spread(scores: BlockScores, module: str, height: int, width: int) -> np.ndarray:
    """Return the table of cells, each with its block's score."""
    table = scores.tables[module].numpy()
    return table.repeat(scores.block_size[0] // height, axis=0).repeat(scores.block_size[1] // width, axis=1)
