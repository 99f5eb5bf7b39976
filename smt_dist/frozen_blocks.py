"""Blocks that are no longer trained and go on computing: what re-selection leaves of the ones that it drops."""

from __future__ import annotations

import torch
from torch import nn

from smt_dist.blocks import Block, BlockGrid, BlockSelection
from smt_dist.sparse_embedding import SparseEmbedding
from smt_dist.sparse_linear import SparseLayer, SparseLinear


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


def rearrange(values: torch.Tensor | None, source: BlockSelection, target: BlockSelection, module: str) -> torch.Tensor:
    """A module's stacked blocks in another selection's order: zeros for blocks that ``source`` doesn't have.

    Args:
        values: ``[source's blocks * block_rows, block_cols]``; None where the source has none of this module.
        source: the selection that they belong to.
        target: of the same block size, with blocks of the module.
        module: its name.
    """
    height, width = target.block_size
    places = {block: index for index, block in enumerate(source.blocks.get(module, ()))}
    result = torch.zeros(len(target.blocks[module]) * height, width)
    for index, block in enumerate(target.blocks[module]):
        if values is not None and block in places:
            start = places[block] * height
            result[index * height : (index + 1) * height] = values[start : start + height]
    return result


def without(touched: BlockSelection, active: BlockSelection) -> BlockSelection | None:
    """The blocks of ``touched`` that aren't in ``active``; None if all are."""
    left = {
        module: [block for block in blocks if block not in set(active.blocks.get(module, ()))]
        for module, blocks in touched.blocks.items()
    }
    left = {module: blocks for module, blocks in left.items() if blocks}
    return touched.model_copy(update={"blocks": left}) if left else None
