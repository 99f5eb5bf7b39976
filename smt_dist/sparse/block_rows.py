"""Read and write the blocks of a weight in one pass, whole or sharded."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from smt_dist.sparse.blocks import Block, BlockGrid


class BlockRows(nn.Module):
    """Locate the rows of stacked blocks in a weight.

    Stacked blocks are ``[blocks * block_rows, block_cols]``, the weight is ``[rows, cols]``.

    A module without parameters, so that its tables follow the model to its device.

    Args:
        grid: the weight's.
        blocks: the (row, col) of each block, sorted.
    """

    rows: torch.Tensor
    cols: torch.Tensor

    def __init__(self, grid: BlockGrid, blocks: list[Block], device: torch.device | str | None = None) -> None:
        super().__init__()
        self._width = grid.block_cols
        table = np.array(blocks, dtype=np.int64).reshape(-1, 2)
        # Worked out on the host, where nothing has to be waited for.
        self._table = (table[:, :1] * grid.block_rows + np.arange(grid.block_rows)).flatten()
        self.register_buffer("rows", torch.from_numpy(self._table).to(device), persistent=False)
        cols = torch.from_numpy(table[:, 1].repeat(grid.block_rows))
        self.register_buffer("cols", cols.to(device), persistent=False)
        # The shard of the weight that was seen last, and the tables of the rows in it.
        self._shard: tuple[int, int, torch.device] | None = None
        self._tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def read(self, weight: torch.Tensor) -> torch.Tensor:
        """Copy the rows that this rank's part of ``weight`` has, in the stacked blocks' order."""
        own = self._own(weight)
        return own.cut[own.rows, own.cols]

    @torch.no_grad()
    def write(self, weight: torch.Tensor, values: torch.Tensor) -> None:
        """Put the rows that this rank's part of ``weight`` has where they belong.

        Args:
            weight: whole, or sharded by FSDP2 over dimension 0.
            values: all ranks' rows, ``[blocks * block_rows, block_cols]``.
        """
        own = self._own(weight)
        own.cut[own.rows, own.cols] = self._of(own, values)

    @torch.no_grad()
    def differs(self, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return whether this rank's part differs in any bit from its rows of ``values``.

        A bool tensor on their device.
        """
        own = self._own(weight)
        found, wanted = own.cut[own.rows, own.cols], self._of(own, values)
        return (found.view(torch.uint8) != wanted.contiguous().view(torch.uint8)).any()

    @staticmethod
    def _of(own: _Own, values: torch.Tensor) -> torch.Tensor:
        # An offloaded shard lies in host memory.
        mine = values if own.places is None else values[own.places.to(values.device)]
        return mine.to(own.cut.device)

    def _own(self, weight: torch.Tensor) -> _Own:
        if not isinstance(weight, DTensor):
            return _Own(self._cut(weight.detach()), self.rows, self.cols, None)
        local = weight.to_local().detach()
        shard = (_first_row(weight), len(local), local.device)
        if self._shard != shard:
            self._shard, (first, length, device) = shard, shard
            found = ((self._table >= first) & (self._table < first + length)).nonzero()[0]
            places = torch.from_numpy(found).to(self.rows.device)
            self._tables = tuple(t.to(device) for t in (self.rows[places] - first, self.cols[places], places))
        return _Own(self._cut(local), *self._tables)

    def _cut(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.unflatten(1, (-1, self._width))


class _Own(NamedTuple):
    """Hold the rows that one rank has.

    Attributes:
        cut: its part of the weight, ``[rows, block columns, block_cols]``; a view.
        rows: index into it, for each row of a block.
        cols: likewise.
        places: among all stacked rows; None: it has all.
    """

    cut: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    places: torch.Tensor | None


def _first_row(weight: DTensor) -> int:
    """Return the first row of this rank's shard.

    FSDP2 cuts as ``torch.chunk`` does, and the last shards may be empty.
    """
    for dimension, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            if placement.dim != 0:
                raise ValueError(f"a weight that is sharded over dimension {placement.dim}")
            mesh = weight.device_mesh
            rows = -(-weight.shape[0] // mesh.size(dimension))
            return min(rows * mesh.get_local_rank(dimension), weight.shape[0])
    return 0
