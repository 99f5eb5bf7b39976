"""Define ``SparseEmbedding``: a frozen embedding plus trainable blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from smt_dist.sparse.layer import SparseLayer


class SparseEmbedding(SparseLayer):
    """Add to ``base(ids)`` the row of every block that covers an id, in the block's columns.

    The weight is ``[vocabulary, hidden]``: block rows are ranges of token ids, block columns ranges of hidden features.
    Gradients of ``delta`` are those of the weight's blocks; the base's ``padding_idx`` gets neither block nor gradient,
    as in PyTorch. ``[...]`` ids -> ``[..., hidden]``.

    Arguments and attributes: :class:`SparseLayer`.
    """

    def set_up(self) -> None:
        """Map each block row to its block."""
        super().set_up()
        self._columns = sorted({col for _, col in self.blocks})
        # For each column: block row -> index of its block, -1 for none.
        places = torch.full((len(self._columns), self.grid.shape[0]), -1)
        for index, (row, col) in enumerate(self.blocks):
            places[self._columns.index(col), row] = index
        self.register_buffer("places", places.to(self.delta.device), persistent=False)

    def add_blocks(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = y.clone()
        for columns, rows, hit in self.looked_up(x):
            found = _Rows.apply(self.delta, rows.flatten()).to(y.dtype).view(*x.shape, self.grid.block_cols)
            out[..., columns] += torch.where(hit.unsqueeze(-1), found, 0)
        return out

    def looked_up(self, ids: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield what ids ``[...]`` look up in each block column.

        That is: the column's features, each id's row of ``delta``, and a mask.

        Ids outside of the mask have no block there and name some other row: to leave them out, the host would have to
        wait for the device.
        """
        height = self.grid.block_rows
        for col, places in zip(self._columns, self.places, strict=True):
            block = places[torch.div(ids, height, rounding_mode="floor")]
            hit = block >= 0
            if self.padding_idx is not None:
                hit &= ids != self.padding_idx
            yield self.grid.col_slice(col), block.clamp(min=0) * height + ids % height, hit

    @property
    def padding_idx(self) -> int | None:
        """Return the id that takes no gradient."""
        return self.base.padding_idx

    @property
    def num_embeddings(self) -> int:
        """Return the rows of the weight."""
        return self.grid.rows

    @property
    def embedding_dim(self) -> int:
        """Return the columns of the weight."""
        return self.grid.cols


class _Rows(torch.autograd.Function):
    """Return ``delta[rows]``, whose gradient is summed in fp32.

    A frequent token has thousands of rows.
    """

    @staticmethod
    def forward(ctx: Any, delta: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.shape, ctx.dtype = delta.shape, delta.dtype
        return delta[rows]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        whole = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device).index_add_(0, rows, grad.float())
        return whole.to(ctx.dtype), None
