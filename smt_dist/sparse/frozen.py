"""Define layers with frozen blocks, which re-selection dropped and which still compute."""

from __future__ import annotations

import torch
from torch import nn

from smt_dist.sparse.blocks import Block, BlockGrid
from smt_dist.sparse.embedding import SparseEmbedding
from smt_dist.sparse.layer import SparseLayer
from smt_dist.sparse.linear import SparseLinear


class FrozenBlocks(SparseLayer):
    """Add frozen blocks to a base layer, without a parameter, gradient or optimizer state.

    Attributes:
        master: fp32 values ``[blocks * block_rows, block_cols]`` on the CPU, which adapters and checkpoints save.
        delta: ``master`` in the compute dtype, used by the forward; a non-persistent buffer.
    """

    master: torch.Tensor

    def freeze(self, master: torch.Tensor) -> None:
        """Set the blocks to ``master``, and make ``delta`` a buffer instead of a parameter."""
        dtype, device = self.delta.dtype, self.delta.device
        if isinstance(self.delta, nn.Parameter):
            del self.delta
            self.register_buffer("delta", torch.empty(0), persistent=False)
        self.master = master.detach().to("cpu", torch.float32, copy=True)
        self.delta = self.master.to(device, dtype)


class FrozenLinear(FrozenBlocks, SparseLinear):
    """Add frozen blocks to a linear layer."""


class FrozenEmbedding(FrozenBlocks, SparseEmbedding):
    """Add frozen blocks to an embedding."""


def make_frozen(
    base: nn.Module,
    grid: BlockGrid,
    blocks: list[Block],
    master: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> FrozenBlocks:
    """Make the frozen layer for ``base``, a linear layer or an embedding.

    Args:
        base: the layer that the blocks are added to.
        grid: of its weight.
        blocks: the (row, col) of each block.
        master: their values, see :class:`FrozenBlocks`.
        dtype: of ``delta``.
        device: of ``delta``.
    """
    kind = FrozenEmbedding if isinstance(base, nn.Embedding) else FrozenLinear
    layer = kind(base, grid, blocks, dtype, device)
    layer.freeze(master)
    layer.train(base.training)
    return layer
