"""Define ``SparseLayer``, a frozen layer plus trainable blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import nn

from smt_dist.sparse.blocks import Block, BlockGrid


class SparseLayer(nn.Module):
    """Add trainable blocks to a frozen base layer.

    Args:
        base: the layer, with a weight of ``[rows, cols]``.
        grid: the geometry of that weight.
        blocks: the (row, col) of each trainable block, sorted.
        dtype: of ``delta``. fp32 makes the parameter its own master; it computes in the base's output dtype either way.
        device: of ``delta``.

    Attributes:
        delta: ``[len(blocks) * block_rows, block_cols]``, zero at first. Engines shard dimension 0, so rows
            spread evenly over ranks where whole blocks would land on the first ones.
        enabled: False turns the layer into its base.
    """

    is_in_place: ClassVar[bool] = False  # whether the base's weight holds the values

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
        self.delta = nn.Parameter(
            torch.zeros(len(self.blocks) * grid.block_rows, grid.block_cols, dtype=dtype, device=device)
        )
        self.set_up()

    def set_up(self) -> None:
        """Prepare what a subclass needs besides, at the end of the constructor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the base does, plus the blocks."""
        y = self.base(x)
        return self.add_blocks(y, x) if self.enabled else y

    def add_blocks(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the base's output ``y`` for the input ``x`` plus the blocks' part, as a new tensor."""
        raise NotImplementedError

    def read_delta(self) -> torch.Tensor:
        """Return the deltas as this layer holds them, of ``delta``'s shape."""
        return self.delta.detach()

    @torch.no_grad()
    def write_delta(self, delta: torch.Tensor) -> None:
        """Set the deltas, and what computes."""
        self.delta.copy_(delta)

    def write_out(self) -> None:
        """Write the values into the weight, where it holds them, after deltas were changed by hand."""

    def restore(self) -> None:
        """Restore W0 in the weight, where it holds the values."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute what the base does, inside the context."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def expected_values(self, master: torch.Tensor) -> torch.Tensor:
        """Round an fp32 master ``[blocks * block_rows, block_cols]`` to what has to compute."""
        return master.to(self.delta.dtype)

    def computing_values(self) -> torch.Tensor:
        """Return the blocks' values that compute, of ``delta``'s shape; comparable between ranks."""
        return self.delta.detach()

    # Model code reads these of its layers (`self.q_proj.weight.dtype`), so they stay visible.
    @property
    def weight(self) -> torch.Tensor:
        """Return the base's weight."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """Return the base's bias."""
        return getattr(self.base, "bias", None)

    def extra_repr(self) -> str:
        """Return the layer's text for ``print(model)``."""
        return f"blocks={len(self.blocks)} of {self.grid.block_rows}x{self.grid.block_cols}"


def layers_of(module: nn.Module) -> list[SparseLayer]:
    """List the layers with blocks of one base, outermost first: trained ones, frozen ones."""
    found = []
    while isinstance(module, SparseLayer):
        found.append(module)
        module = module.base
    return found


def bare(module: nn.Module) -> nn.Module:
    """Return the base below all blocks."""
    layers = layers_of(module)
    return layers[-1].base if layers else module
