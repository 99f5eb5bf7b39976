"""Compute the scores that need no batch: ``magnitude``, ``random`` and ``diagonal``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from tqdm.auto import tqdm

from smt_dist.distributed import get_rank
from smt_dist.selection.scores import WeightReader
from smt_dist.sparse.blocks import Block, BlockGrid

NEVER = -math.inf  # the score of a block that can't be chosen


def score_without_data(
    score: str, grids: Mapping[str, BlockGrid], weights: WeightReader, seed: int, progress: bool = False
) -> dict[str, torch.Tensor]:
    """Compute the scores of all modules without data; collective for ``magnitude``.

    Args:
        score: one of :data:`smt_dist.config.DATA_FREE_SCORES`.
        grids: of the modules to score, in the model's order.
        weights: for ``magnitude``; reads one whole weight at a time.
        seed: for ``random``.
        progress: show a progress bar on rank 0.

    Returns:
        Module -> fp64 CPU scores ``[block rows, block columns]``, equal on all ranks.
    """
    tables = {}
    for name, grid in tqdm(grids.items(), desc=score, unit="weight", disable=not progress or get_rank() != 0):
        if score == "magnitude":
            with weights(name) as weight:
                tables[name] = mean_magnitude(weight.detach(), grid)
        else:
            tables[name] = random_scores(name, grid, seed) if score == "random" else diagonal_scores(grid)
    return tables


def mean_magnitude(weight: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Return the ``magnitude`` score, the mean of \\|weight\\| over the block, fp64 on the CPU."""
    by_row = weight.float().abs().reshape(grid.rows, grid.shape[1], grid.block_cols).sum(-1, dtype=torch.float64)
    sums = by_row.reshape(grid.shape[0], grid.block_rows, grid.shape[1]).sum(1)
    return sums.cpu() / grid.block_elements


def random_scores(module: str, grid: BlockGrid, seed: int) -> torch.Tensor:
    """Return the ``random`` score, uniform in [0, 1).

    It depends only on the seed and the module's name, so it is the same on any machine and rank.
    """
    digest = hashlib.sha256(f"{seed} {module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(grid.shape, dtype=torch.float64, generator=generator)


def diagonal(grid: BlockGrid) -> list[Block]:
    """Return the blocks of a weight's diagonal, from the first corner to the last.

    A grid of R x C blocks has max(R, C) of them: block i lies at (i R // max, i C // max). So every block row and
    every block column has at least one. If the short side divides the long side, these are exactly the
    N = min(R, C) rectangular blocks of DiaBlo (arXiv 2506.03230), each cut into squares.
    """
    rows, cols = grid.shape
    longer = max(rows, cols)
    return [(index * rows // longer, index * cols // longer) for index in range(longer)]


def diagonal_scores(grid: BlockGrid) -> torch.Tensor:
    """Return the ``diagonal`` score: above 0 on the diagonal, :data:`NEVER` elsewhere.

    For any n, the n best blocks of a weight lie evenly along its diagonal, so a budget smaller than the diagonals is
    spread evenly over and along them.
    """
    cells = diagonal(grid)
    table = torch.full(grid.shape, NEVER, dtype=torch.float64)
    for rank, index in enumerate(_spread(len(cells))):
        table[cells[index]] = 1 - rank / len(cells)
    return table


def _spread(count: int) -> list[int]:
    """Return 0 to count - 1 in bit-reversed order, so that every prefix is spread evenly."""
    bits = max(1, (count - 1).bit_length())
    backwards = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return [number for number in backwards if number < count]
