"""Define layers with frozen blocks, which re-selection dropped and which still compute."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from smt_dist.sparse.blocks import merged_blocks
from smt_dist.sparse.embedding import SparseEmbedding
from smt_dist.sparse.in_place import InPlaceEmbedding, InPlaceLinear
from smt_dist.sparse.layer import SparseLayer
from smt_dist.sparse.linear import SparseLinear


class FrozenBlocks(SparseLayer):
    """Add blocks that no engine, optimizer or gradient has to a base.

    Attributes:
        master: fp32 values ``[blocks * block_rows, block_cols]`` on the CPU: what adapters and checkpoints hold.
    """

    master: torch.Tensor

    def freeze(self, master: torch.Tensor) -> None:
        """Set the masters and drop the parameter; collective where an in-place base is sharded."""
        self.master = master.detach().to("cpu", torch.float32, copy=True)
        dtype, device = self.delta.dtype, self.delta.device
        if isinstance(self.delta, nn.Parameter):
            del self.delta
            self.register_buffer("delta", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.set_values()

    def set_values(self) -> None:
        """Set what computes to the rounding of the masters."""
        raise NotImplementedError

    def replicated_values(self) -> torch.Tensor | None:
        """Return the values that compute if every rank has all of them, else None."""
        raise NotImplementedError

    def is_damaged(self) -> bool:
        """Return whether this rank's values aren't the rounding of the masters; not collective."""
        raise NotImplementedError


class FrozenAdditive(FrozenBlocks):
    """Keep frozen blocks beside the weight; ``delta`` is a buffer that no state dict holds."""

    def set_values(self) -> None:
        self.delta = self.master.to(self.delta.device, self.delta.dtype)

    def replicated_values(self) -> torch.Tensor | None:
        return self.delta

    def is_damaged(self) -> bool:
        expected = self.master.to(self.delta.dtype)
        return not torch.equal(expected.view(torch.uint8), self.delta.cpu().view(torch.uint8))


class FrozenInPlace(FrozenBlocks):
    """Keep frozen blocks inside the weight, where they cost nothing; ``delta`` is empty."""

    def set_values(self) -> None:
        self.original = self.read_original().cpu()
        self.write(self.written_values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the base does, blocks included; without them where the layer is switched off."""
        return self.base(x) if self.enabled else self.base_forward(x)

    def written_values(self) -> torch.Tensor:
        """Round W0 + master."""
        return merged_blocks(self.original, self.master)

    def replicated_values(self) -> torch.Tensor | None:
        return None if isinstance(self.weight, DTensor) else self.rows.read(self.weight)

    def is_damaged(self) -> bool:
        return bool(self.rows.differs(self.weight, self.written_values()))


class FrozenLinear(FrozenAdditive, SparseLinear):
    """Keep frozen blocks beside a linear layer's weight."""


class FrozenEmbedding(FrozenAdditive, SparseEmbedding):
    """Keep frozen blocks beside an embedding's weight."""


class FrozenInPlaceLinear(FrozenInPlace, InPlaceLinear):
    """Keep frozen blocks inside a linear layer's weight."""


class FrozenInPlaceEmbedding(FrozenInPlace, InPlaceEmbedding):
    """Keep frozen blocks inside an embedding's weight."""


# The class of the trained layer -> that of the frozen one.
FROZEN_KINDS: dict[type[SparseLayer], type[FrozenBlocks]] = {
    SparseLinear: FrozenLinear,
    SparseEmbedding: FrozenEmbedding,
    InPlaceLinear: FrozenInPlaceLinear,
    InPlaceEmbedding: FrozenInPlaceEmbedding,
}
