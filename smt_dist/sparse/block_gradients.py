"""Compute the gradients of a weight's blocks, by columns or as one dense product.

Many small products are slow, and a dense one computes what nobody needs: which is faster depends on the number of
blocks and on their sides. Measured on CPU: 1024 x 1024 weights, 2,048 tokens, fp32 and bf16, one thread.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from smt_dist.sparse.blocks import Block, BlockGrid

# A product with a side below this takes as long as one with this side.
LEAST_SIDE = 96
SCRATCH_BYTES = 2**26


@dataclass(frozen=True)
class ColumnGroup:
    """Hold the blocks of one block column.

    Attributes:
        column: index among the columns that blocks read.
        outputs: of each block, in the weight's rows.
        rows: of each block, in the stacked blocks.
    """

    column: int
    outputs: list[slice]
    rows: list[slice]


@dataclass(frozen=True)
class DensePart:
    """Hold some block rows, to be multiplied by all columns that blocks read.

    Attributes:
        outputs: of each block row, in the weight's rows.
        picked: (block row, column) of each block, among those of the product.
        rows: of these blocks, in the stacked blocks; they lie one after the other.
    """

    outputs: list[slice]
    picked: tuple[list[int], list[int]]
    rows: slice


def group_by_column(grid: BlockGrid, blocks: list[Block]) -> list[ColumnGroup]:
    """Group blocks, sorted by (row, col), by their column."""
    cols = sorted({col for _, col in blocks})
    places: dict[int, list[int]] = defaultdict(list)
    for index, (_, col) in enumerate(blocks):
        places[col].append(index)
    return [
        ColumnGroup(
            number,
            [grid.row_slice(blocks[index][0]) for index in places[col]],
            [grid.row_slice(index) for index in places[col]],
        )
        for number, col in enumerate(cols)
    ]


def dense_parts(grid: BlockGrid, blocks: list[Block]) -> list[DensePart]:
    """Cut the product of all rows and columns that blocks use into parts of at most 64 MiB.

    The size is that of an fp32 product.
    """
    column = {col: index for index, col in enumerate(sorted({col for _, col in blocks}))}
    by_row: dict[int, list[int]] = defaultdict(list)
    for index, (row, _) in enumerate(blocks):
        by_row[row].append(index)
    at_once = max(1, SCRATCH_BYTES // (4 * grid.block_elements * len(column)))
    used, parts = list(by_row), []
    for first in range(0, len(used), at_once):
        chosen = used[first : first + at_once]
        indices = [index for row in chosen for index in by_row[row]]
        number = {row: index for index, row in enumerate(chosen)}
        picked = ([number[blocks[index][0]] for index in indices], [column[blocks[index][1]] for index in indices])
        rows = slice(indices[0] * grid.block_rows, (indices[-1] + 1) * grid.block_rows)
        parts.append(DensePart([grid.row_slice(row) for row in chosen], picked, rows))
    return parts


def is_dense_faster(grid: BlockGrid, blocks: list[Block]) -> bool:
    """Return whether one dense product takes less time than one product per column."""
    counts: dict[int, int] = defaultdict(int)
    for _, col in blocks:
        counts[col] += 1
    width = max(grid.block_cols, LEAST_SIDE)
    grouped = sum(max(count * grid.block_rows, LEAST_SIDE) * width for count in counts.values())
    dense = len({row for row, _ in blocks}) * len(counts) * grid.block_elements
    return dense < grouped


def multiply_columns(
    grad_y: torch.Tensor, columns: list[torch.Tensor], groups: list[ColumnGroup], gradient: torch.Tensor
) -> None:
    """Fill ``gradient`` ``[blocks * block_rows, block_cols]`` group by group.

    Args:
        grad_y: ``[tokens, out]``.
        columns: the input columns that blocks read, ``[tokens, block_cols]`` each.
        groups: of :func:`group_by_column`.
        gradient: written.
    """
    for group in groups:
        outputs = [grad_y[:, outputs] for outputs in group.outputs]
        if len(outputs) == 1:
            gradient[group.rows[0]] = outputs[0].t() @ columns[group.column]
            continue
        product = torch.cat(outputs, dim=1).t() @ columns[group.column]
        for rows, part in zip(group.rows, product.chunk(len(outputs)), strict=True):
            gradient[rows] = part


def multiply_densely(
    grad_y: torch.Tensor, columns: list[torch.Tensor], parts: list[DensePart], gradient: torch.Tensor
) -> None:
    """Fill ``gradient`` from dense products, as :func:`multiply_columns` does.

    ``parts`` are those of :func:`dense_parts`.
    """
    width = columns[0].shape[1]
    inputs = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
    for part in parts:
        outputs = torch.cat([grad_y[:, outputs] for outputs in part.outputs], dim=1)
        product = (outputs.t() @ inputs).unflatten(0, (len(part.outputs), -1)).unflatten(2, (-1, width))
        row, col = (torch.tensor(index, device=grad_y.device) for index in part.picked)
        gradient[part.rows] = product[row, :, col].flatten(0, 1)
