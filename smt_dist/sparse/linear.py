"""Define ``SparseLinear``, a frozen linear layer plus additive blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from smt_dist.sparse.block_gradients import (
    ColumnGroup,
    DensePart,
    dense_parts,
    group_by_column,
    is_dense_faster,
    multiply_columns,
    multiply_densely,
)
from smt_dist.sparse.blocks import Block, BlockGrid
from smt_dist.sparse.layer import SparseLayer


class SparseLinear(SparseLayer):
    """Compute ``y = base(x) + scatter(x[:, cols] @ delta^T)``.

    The base computes ``x @ weight^T (+ bias)`` with a weight of ``[out, in]``, which is never written, so it may be
    sharded, quantised or tensor-parallel; the blocks can be switched off, swapped and merged. Gradients of ``delta``
    are those of the weight's blocks (arXiv 2405.15525, section 3). ``[..., in]`` -> ``[..., out]``.

    Arguments and attributes: :class:`SparseLayer`.
    """

    def set_up(self) -> None:
        """Locate the blocks."""
        super().set_up()
        self._layout = Layout.of(self.grid, self.blocks)

    def add_blocks(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.change_blocks(y, x, self.delta)

    def change_blocks(self, y: torch.Tensor, x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """Return the base's output ``y`` for ``x`` with its weight's blocks changed.

        ``change`` has ``delta``'s shape.
        """
        return _AddBlocks.apply(y, x, change, self._layout)

    @property
    def copied_columns(self) -> int:
        """Return the number of input columns that blocks read, each counted once."""
        return len(self._layout.columns) * self.grid.block_cols

    def keep_whole_input(self, whole: bool) -> None:
        """Choose between the input itself and copies of its columns for the backward."""
        self._layout = replace(self._layout, keeps_whole=whole)

    @property
    def in_features(self) -> int:
        """Return the columns of the weight."""
        return self.grid.cols

    @property
    def out_features(self) -> int:
        """Return the rows of the weight."""
        return self.grid.rows


@dataclass(frozen=True)
class Place:
    """Locate one block's input columns, output features and rows of ``delta``."""

    column: int  # index into the layout's columns
    outputs: slice  # of the base's output features
    rows: slice  # of delta


@dataclass(frozen=True)
class Layout:
    """Hold the places of all blocks, computed once."""

    columns: list[slice]  # of the input features; each that a block reads, once
    places: list[Place]
    groups: list[ColumnGroup]
    dense_parts: list[DensePart]  # empty where products by columns are faster
    keeps_whole: bool = False  # whether the backward gets the input itself

    @staticmethod
    def of(grid: BlockGrid, blocks: list[Block]) -> Layout:
        column = {col: index for index, col in enumerate(sorted({col for _, col in blocks}))}
        return Layout(
            columns=[grid.col_slice(col) for col in column],
            places=[
                Place(column[col], grid.row_slice(row), grid.row_slice(index))
                for index, (row, col) in enumerate(blocks)
            ],
            groups=group_by_column(grid, blocks),
            dense_parts=dense_parts(grid, blocks) if is_dense_faster(grid, blocks) else [],
        )


class _AddBlocks(torch.autograd.Function):
    """Compute ``y + scatter(x[:, cols] @ delta^T)`` in y's dtype; save only needed columns.

    Out of place: y may be a view that a custom Function made (ZeRO-3's hooks do) or a tensor that a hook on the
    base holds, and neither may be written. The copy costs under 1 % of the base's matrix products.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, layout: Layout) -> torch.Tensor:
        kept = kept_inputs(x, layout, y.dtype)
        inputs = read_columns(kept, layout, y.dtype)
        weights = delta.to(y.dtype)
        out = y.clone(memory_format=torch.contiguous_format)
        for place in layout.places:
            flat(out)[:, place.outputs].addmm_(inputs[place.column], weights[place.rows].t())
        ctx.save_for_backward(delta, *(kept if ctx.needs_input_grad[2] else []))
        ctx.layout, ctx.x_shape = layout, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        delta, *kept = ctx.saved_tensors
        rows = flat(grad_y)
        grad_x = grad_delta = None
        if ctx.needs_input_grad[1]:
            weights = delta.to(grad_y.dtype)
            grad_x = grad_y.new_zeros(ctx.x_shape)  # autograd converts it to x's dtype
            for place in ctx.layout.places:
                columns = ctx.layout.columns[place.column]
                flat(grad_x)[:, columns].addmm_(rows[:, place.outputs], weights[place.rows])
        if ctx.needs_input_grad[2]:
            grad_delta = block_gradients(rows, kept, ctx.layout, delta)
        return grad_y, grad_x, grad_delta, None


def kept_inputs(x: torch.Tensor, layout: Layout, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the tensors to save for :func:`read_columns` in the backward.

    They are the columns that blocks read, or ``x`` itself.
    """
    if layout.keeps_whole:
        return [x]
    # Copies, as a saved view would keep all of x alive. x may be wider than y: autocast converts inside the base.
    return [flat(x)[:, columns].to(dtype, copy=True) for columns in layout.columns]


def read_columns(kept: list[torch.Tensor], layout: Layout, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the input columns that blocks read, ``[tokens, block_cols]`` each, in ``dtype``."""
    if not layout.keeps_whole:
        return kept
    return [flat(kept[0])[:, columns].to(dtype) for columns in layout.columns]


def block_gradients(grad_y: torch.Tensor, kept: list[torch.Tensor], layout: Layout, like: torch.Tensor) -> torch.Tensor:
    """Return the blocks' gradients, of ``like``'s shape and dtype.

    ``grad_y`` is ``[tokens, out]``.
    """
    gradient, columns = torch.empty_like(like), read_columns(kept, layout, grad_y.dtype)
    if layout.dense_parts:
        multiply_densely(grad_y, columns, layout.dense_parts, gradient)
    else:
        multiply_columns(grad_y, columns, layout.groups, gradient)
    return gradient


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Reshape ``[..., features]`` to ``[tokens, features]``; a view of contiguous tensors."""
    return tensor.reshape(-1, tensor.shape[-1])
