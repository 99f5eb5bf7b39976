"""Blocks that are no longer trained and go on computing: what re-selection leaves of the ones that it drops."""

from __future__ import annotations

import torch
from torch import nn

from smt_dist.sparse.blocks import Block, BlockGrid
from smt_dist.sparse.embedding import SparseEmbedding
from smt_dist.sparse.layer import SparseLayer
from smt_dist.sparse.linear import SparseLinear


class FrozenBlocks(SparseLayer):
    """A base plus blocks that no engine, optimizer or gradient knows of.

    Attributes:
        master: fp32 values ``[blocks * block_rows, block_cols]`` on the CPU: what adapters and checkpoints hold.
        delta: their rounding, which computes; a buffer that no state dict holds.
    """

    master: torch.Tensor

    def freeze(self, master: torch.Tensor) -> None:
        """Take these values, and be no parameter from here on."""
        dtype, device = self.delta.dtype, self.delta.device
        if isinstance(self.delta, nn.Parameter):
            del self.delta
            self.register_buffer("delta", torch.empty(0), persistent=False)
        self.master = master.detach().to("cpu", torch.float32, copy=True)
        self.delta = self.master.to(device, dtype)


class FrozenLinear(FrozenBlocks, SparseLinear):
    """Frozen blocks of a linear layer."""


class FrozenEmbedding(FrozenBlocks, SparseEmbedding):
    """Frozen blocks of an embedding."""


def make_frozen(
    base: nn.Module,
    grid: BlockGrid,
    blocks: list[Block],
    master: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> FrozenBlocks:
    """The layer for ``base``; ``master`` as in :class:`FrozenBlocks`."""
    kind = FrozenEmbedding if isinstance(base, nn.Embedding) else FrozenLinear
    layer = kind(base, grid, blocks, dtype, device)
    layer.freeze(master)
    layer.train(base.training)
    return layer
