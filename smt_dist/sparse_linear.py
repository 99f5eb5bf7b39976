"""``SparseLinear``: a frozen linear layer plus trainable blocks. The hot path."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from smt_dist.blocks import Block, BlockGrid


class SparseLinear(nn.Module):
    """``y = base(x) + scatter(x[:, cols] @ delta^T)``: a frozen base and additive blocks.

    The base's weight is never written, so it may be sharded, quantised or tensor-parallel; the blocks can be
    switched off, swapped and merged. Gradients of ``delta`` are those of the weight's blocks
    (arXiv 2405.15525, section 3).

    Args:
        base: a module that computes ``x @ weight^T (+ bias)`` with a weight of ``[out, in]``.
        grid: the geometry of the base's weight.
        blocks: the (row, col) of each trainable block, sorted.
        dtype: of ``delta``. fp32 makes the parameter its own master; it computes in the input's dtype either way.
        device: of ``delta``.

    Attributes:
        delta: ``[len(blocks) * block_rows, block_cols]``, zero at first. Engines shard dimension 0, so rows
            spread evenly over ranks where whole blocks would land on the first ones.
        enabled: False turns the layer into its base.
    """

    def __init__(
        self,
        base: nn.Module,
        grid: BlockGrid,
        blocks: list[Block],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.grid = grid
        self.blocks = list(blocks)
        self.enabled = True
        self._layout = _Layout.of(grid, self.blocks)
        self.delta = nn.Parameter(
            torch.zeros(len(self.blocks) * grid.block_rows, grid.block_cols, dtype=dtype, device=device)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        y = self.base(x)
        if not self.enabled:
            return y
        return _AddBlocks.apply(y, x, self.delta, self._layout)

    # Model code reads these of its projections (`self.q_proj.weight.dtype`), so they stay visible.
    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, without the blocks."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        return getattr(self.base, "bias", None)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.grid.cols

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.grid.rows

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"blocks={len(self.blocks)} of {self.grid.block_rows}x{self.grid.block_cols}"


class _Layout:
    """Where each block reads its input and writes its output, as slices, worked out once."""

    def __init__(self, columns: list[slice], reads: list[slice], writes: list[slice], deltas: list[slice]) -> None:
        self.columns = columns  # input columns to keep, each once
        self.reads = reads  # per block: its place in the kept columns
        self.writes = writes  # per block: its output rows
        self.deltas = deltas  # per block: its rows of delta

    @staticmethod
    def of(grid: BlockGrid, blocks: list[Block]) -> _Layout:
        cols = sorted({col for _, col in blocks})
        place = {col: index for index, col in enumerate(cols)}
        return _Layout(
            columns=[grid.col_slice(col) for col in cols],
            reads=[grid.col_slice(place[col]) for _, col in blocks],
            writes=[grid.row_slice(row) for row, _ in blocks],
            deltas=[grid.row_slice(index) for index in range(len(blocks))],
        )

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """A copy ``[tokens, kept columns]``: a saved view would keep all of ``x`` alive."""
        flat = x.reshape(-1, x.shape[-1])
        return torch.cat([flat[:, columns] for columns in self.columns], dim=1)


class _AddBlocks(torch.autograd.Function):
    """``y + scatter(x[:, cols] @ delta^T)``; saves the needed input columns only."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, layout: _Layout) -> torch.Tensor:
        kept = layout.keep(x)
        weights = delta.to(x.dtype)
        out = y.clone()
        flat = out.view(-1, out.shape[-1])
        for read, write, rows in zip(layout.reads, layout.writes, layout.deltas, strict=True):
            flat[:, write].addmm_(kept[:, read], weights[rows].t())
        ctx.save_for_backward(kept, delta)
        ctx.layout, ctx.x_shape = layout, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, delta = ctx.saved_tensors
        layout: _Layout = ctx.layout
        flat = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_delta = None
        if ctx.needs_input_grad[2]:
            grad_delta = torch.empty_like(delta)
            for read, write, rows in zip(layout.reads, layout.writes, layout.deltas, strict=True):
                grad_delta[rows] = flat[:, write].t() @ kept[:, read]
        if ctx.needs_input_grad[1]:
            weights = delta.to(flat.dtype)
            grad_kept = torch.zeros_like(kept)
            for read, write, rows in zip(layout.reads, layout.writes, layout.deltas, strict=True):
                grad_kept[:, read].addmm_(flat[:, write], weights[rows])
            grad_x = flat.new_zeros(ctx.x_shape)
            grad_x_flat = grad_x.view(-1, grad_x.shape[-1])
            for place, columns in enumerate(layout.columns):
                width = columns.stop - columns.start
                grad_x_flat[:, columns] = grad_kept[:, place * width : (place + 1) * width]
        return grad_y, grad_x, grad_delta, None
