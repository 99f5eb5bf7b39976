"""Blocks inside the base's weight: the base computes them, and one autograd node makes their gradients.

The weight holds ``round(W0 + delta)`` at the blocks, so forward and input gradient are the base's own products. A block
parameter costs 2 FLOPs a token in place of 6, and a training step computes bit for bit what the merged model does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call

from smt_dist.errors import SMTError
from smt_dist.sparse.block_rows import BlockRows
from smt_dist.sparse.blocks import Block, BlockGrid, merged_blocks
from smt_dist.sparse.embedding import SparseEmbedding
from smt_dist.sparse.layer import SparseLayer
from smt_dist.sparse.linear import Layout, SparseLinear, block_gradients, flat, kept_columns
from smt_dist.sparse.sharded import gathered


class InPlaceLayer(SparseLayer):
    """A layer whose weight holds its blocks' values: what :class:`InPlaceLinear` and ``InPlaceEmbedding`` share.

    Attributes:
        original: W0 at the blocks, of ``delta``'s shape and the weight's dtype; None while the weight still is W0, and
            where an optimizer holds a share of it.
        values: what an optimizer wrote last, likewise; None without one.
    """

    original: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(
        self,
        base: nn.Module,
        grid: BlockGrid,
        blocks: list[Block],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(base, grid, blocks, dtype, device)
        self.rows = BlockRows(grid, blocks, self.delta.device)
        self.register_buffer("original", None, persistent=False)
        self.values = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the base computes, blocks included; without them where the layer is switched off."""
        if not self.enabled:
            return self.base_forward(x)
        y = self.base(x)
        return self.add_gradients(_own_tensor(y), x) if torch.is_grad_enabled() else y

    def add_gradients(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``y``, whose backward also makes the gradient of ``delta``."""
        raise NotImplementedError

    def base_forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the base computes with W0. No weight is written: a backward may be waiting for it."""
        raise NotImplementedError

    # -- values ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def keep_original(self) -> torch.Tensor:
        """Read W0 before the first write, and keep it; collective where the base is sharded."""
        if self.original is None:
            with gathered(self.weight) as weight:
                self.original = self.rows.read(weight)
        return self.original

    @torch.no_grad()
    def write_values(self) -> None:
        """Write ``round(W0 + delta)`` into the weight, after a step that an optimizer of the user's made."""
        self.write(merged_blocks(self.keep_original(), self.delta))

    @torch.no_grad()
    def write(self, values: torch.Tensor) -> None:
        """Put values of ``delta``'s shape into this rank's part of the weight.

        A backward whose forward came before raises RuntimeError, as after any write to what it saved.
        """
        self.rows.write(self.weight, values)
        increment_version(self.delta)  # a gathered weight is another tensor in that backward

    def computing_values(self) -> torch.Tensor:
        """What the weight holds at the blocks, all ranks' parts of it."""
        if self.values is not None:
            return self.values
        with gathered(self.weight) as weight:
            return self.rows.read(weight)


class InPlaceLinear(InPlaceLayer, SparseLinear):
    """``y = x @ (W0 + blocks)^T (+ bias)`` in one product. ``[..., in]`` -> ``[..., out]``.

    Arguments and attributes: :class:`SparseLayer`, :class:`InPlaceLayer`.
    """

    def add_gradients(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return _LinearGradients.apply(y, x, self.delta, self._layout)

    def base_forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the base computes with W0: its bits, or within rounding where the weight is an FSDP2 unit of its own."""
        if self.values is None and self.original is None:
            return self.base(x)  # never written
        original = _require_original(self)
        if isinstance(self.base, FSDPModule):  # whole only inside its own forward
            change = original.float() - self.computing_values().float()
            return self.change_blocks(self.base(x), x, change)
        weight = self.weight.detach().clone()
        self.rows.write(weight, original)
        return functional_call(self.base, {"weight": weight}, (x,))


class InPlaceEmbedding(InPlaceLayer, SparseEmbedding):
    """An embedding whose weight holds its blocks' values. ``[...]`` ids -> ``[..., hidden]``.

    Arguments and attributes: :class:`SparseLayer`, :class:`InPlaceLayer`.
    """

    def add_gradients(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return _RowGradients.apply(y, x, self.delta, self)

    def base_forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the base looks up in W0: its bits."""
        y = self.base(x)
        if self.values is None and self.original is None:
            return y
        original, out = _require_original(self), y.clone()
        for columns, rows, hit in self.looked_up(x):
            out[..., columns] = torch.where(hit.unsqueeze(-1), original[rows].to(y.dtype), y[..., columns])
        return out


def _require_original(layer: InPlaceLayer) -> torch.Tensor:
    if layer.original is None:
        raise SMTError("the blocks' optimizer holds W0: switch blocks off with smt_dist.blocks_disabled(model)")
    return layer.original


def _own_tensor(y: torch.Tensor) -> torch.Tensor:
    """``y`` as a tensor of its own, which shares its memory: in front of a view autograd copies the whole gradient."""
    return torch.ops.aten._unsafe_view(y, y.shape)


class _LinearGradients(torch.autograd.Function):
    """The identity of a linear layer's output, with the gradients of its blocks in its backward.

    The output is marked as written, which nobody does: as a view, model code couldn't write it in place.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.save_for_backward(delta, *kept_columns(x, layout, y.dtype))
        ctx.layout = layout
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        delta, *inputs = ctx.saved_tensors
        return grad_y, None, block_gradients(flat(grad_y), inputs, ctx.layout, delta), None


class _RowGradients(torch.autograd.Function):
    """The identity of an embedding's output, with the gradients of its blocks in its backward."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, ids: torch.Tensor, delta: torch.Tensor, layer: SparseEmbedding
    ) -> torch.Tensor:
        ctx.save_for_backward(delta, ids)
        ctx.layer = layer
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        delta, ids = ctx.saved_tensors
        # In fp32: a frequent token has thousands of rows to add up.
        gradient = torch.zeros(delta.shape, dtype=torch.float32, device=delta.device)
        for columns, rows, hit in ctx.layer.looked_up(ids):
            found = torch.where(hit.unsqueeze(-1), grad_y[..., columns].float(), 0)
            gradient.index_add_(0, rows.flatten(), found.flatten(0, -2))
        return grad_y, None, gradient.to(delta.dtype), None
