"""Define layers whose base's weight holds the blocks.

The weight holds ``round(W0 + delta)`` at the blocks, so forward and input gradient are the base's own products. A block
parameter costs 2 FLOPs a token in place of 6, and a training step computes bit for bit what the merged model does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.autograd.graph import increment_version
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call

from smt_dist.errors import SMTError
from smt_dist.sparse.block_rows import BlockRows
from smt_dist.sparse.blocks import merged_blocks
from smt_dist.sparse.embedding import SparseEmbedding
from smt_dist.sparse.layer import SparseLayer, bare, layers_of
from smt_dist.sparse.linear import Layout, SparseLinear, block_gradients, flat, kept_inputs
from smt_dist.sparse.sharded import gathered


class InPlaceLayer(SparseLayer):
    """Share what in-place linear layers and embeddings have in common.

    Attributes:
        original: W0 at the blocks, of ``delta``'s shape and the weight's dtype; None while the weight still is W0, and
            where an optimizer holds shares of it.
        values: what the optimizer wrote last, likewise; None without one.
        holder: the optimizer's part that holds W0 and writes values; None without one.
    """

    is_in_place = True
    original: torch.Tensor | None

    def set_up(self) -> None:
        """Locate the blocks' rows in the weight."""
        super().set_up()
        self.rows = BlockRows(self.grid, self.blocks, self.delta.device)
        self.register_buffer("original", None, persistent=False)
        self.values: torch.Tensor | None = None
        self.holder: Holder | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the base does, blocks included.

        Without them where the layer is switched off.
        """
        if self.holder is not None and not self.holder.is_whole:
            raise RuntimeError(
                "a write of the blocks' values was interrupted: call the whole model, or resume a checkpoint"
            )
        if not self.enabled:
            return self.base_forward(x)
        y = self.base(x)
        return self.add_gradients(_own_tensor(y), x) if torch.is_grad_enabled() else y

    def add_gradients(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return ``y``, whose backward also computes the gradient of ``delta``."""
        raise NotImplementedError

    def base_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the base does with W0.

        No weight is written, since a backward may still need it.
        """
        raise NotImplementedError

    # -- values ------------------------------------------------------------------------------------------------

    @property
    def is_written(self) -> bool:
        """Return whether the weight may hold anything else than W0."""
        return self.original is not None or self.holder is not None

    @torch.no_grad()
    def write_values(self) -> None:
        """Write ``round(W0 + delta)`` into the weight, after a step of an optimizer of your own.

        Collective the first time, where the base is sharded. Raises SMTError where a sharded optimizer writes.
        """
        if self.holder is not None:
            raise SMTError("the blocks' optimizer writes their values itself")
        if self.original is None:
            self.original = self.read_original()
        self.write(merged_blocks(self.original, self.delta))

    @torch.no_grad()
    def write(self, values: torch.Tensor) -> None:
        """Put values of ``delta``'s shape into this rank's part of the weight.

        A backward whose forward came before raises RuntimeError, as after any write to what it saved.
        """
        self.rows.write(self.weight, values)
        increment_version(self.delta)  # a gathered weight is another tensor in that backward

    @torch.no_grad()
    def read_original(self) -> torch.Tensor:
        """Return W0 at the blocks, whole; collective where the base or W0 is sharded."""
        if self.original is not None:
            return self.original
        if self.holder is not None:
            return self.holder.read_original(self)
        with gathered(self.weight) as weight:  # not written yet
            return self.rows.read(weight)

    def read_delta(self) -> torch.Tensor:
        """Return the whole deltas; collective where an optimizer holds them."""
        return self.delta.detach() if self.holder is None else self.holder.read_delta(self)

    @torch.no_grad()
    def write_delta(self, delta: torch.Tensor) -> None:
        """Set the deltas and write the values; as :meth:`write_values`."""
        self.delta.copy_(delta)
        self.write_values()

    def write_out(self) -> None:
        """Write the values, unless an optimizer does."""
        if self.holder is None:
            self.write_values()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute what the base does, inside the context.

        Entering it is collective where an optimizer holds W0.
        """
        held = self.original is None and self.holder is not None
        if held:
            self.original = self.read_original()
        try:
            with super().disabled():
                yield
        finally:
            if held:
                self.original = None

    def expected_values(self, master: torch.Tensor) -> torch.Tensor:
        """Round W0 + master, as the merge does; collective where an optimizer holds W0."""
        return merged_blocks(self.read_original(), master)

    def written_values(self) -> torch.Tensor:
        """Return what was written last, computed anew where no optimizer has it."""
        return merged_blocks(self.original, self.delta.detach()) if self.values is None else self.values

    def computing_values(self) -> torch.Tensor:
        """Return what the optimizer wrote last, or the weight's own blocks.

        Collective where the base is sharded.
        """
        if self.values is not None:
            return self.values
        with gathered(self.weight) as weight:
            return self.rows.read(weight)

    @torch.no_grad()
    def take_back(self) -> None:
        """Take W0 and the deltas back from an optimizer; collective.

        The deltas are rounded to ``delta``'s dtype.
        """
        if self.holder is None:
            return
        original, delta = self.read_original(), self.read_delta()
        self.delta.data = delta.to(self.delta.device, self.delta.dtype)
        self.original, self.values, self.holder = original, None, None

    @torch.no_grad()
    def restore(self) -> None:
        """Restore W0 in the weight; collective where an optimizer holds it."""
        if self.is_written:
            self.write(self.read_original())
        self.original, self.values, self.holder = None, None, None


class Holder(Protocol):
    """Define what an in-place layer needs of the optimizer that writes its values.

    Attributes:
        is_whole: False between the beginning of a write and its end.
    """

    is_whole: bool

    def meet(self) -> None:
        """Wait for all ranks, at most a minute; collective."""

    def read_original(self, layer: InPlaceLayer) -> torch.Tensor:
        """Return W0 at the layer's blocks, whole; collective."""

    def read_delta(self, layer: InPlaceLayer) -> torch.Tensor:
        """Return the layer's whole deltas; collective."""


class InPlaceLinear(InPlaceLayer, SparseLinear):
    """Compute ``y = x @ (W0 + blocks)^T (+ bias)`` in one product.

    ``[..., in]`` -> ``[..., out]``.

    Arguments and attributes: :class:`SparseLayer`, :class:`InPlaceLayer`.
    """

    def add_gradients(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return _LinearGradients.apply(y, x, self.delta, self._layout)

    def base_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the base does with W0.

        Its bits, or within rounding where the weight is an FSDP2 unit of its own.
        """
        if not self.is_written:
            return self.base(x)
        parts = [part for part in layers_of(self) if isinstance(part, InPlaceLinear)]
        if isinstance(bare(self), FSDPModule):  # whole only inside its own forward
            y = bare(self)(x)
            for part in parts:
                change = _require_original(part).float() - part.written_values().float()
                y = part.change_blocks(y, x, change.to(x.device))
            return y
        weight = self.weight.detach().clone()
        for part in parts:
            part.rows.write(weight, _require_original(part))
        return functional_call(bare(self), {"weight": weight}, (x,))


class InPlaceEmbedding(InPlaceLayer, SparseEmbedding):
    """Look up rows of a weight that holds its blocks' values.

    ``[...]`` ids -> ``[..., hidden]``.

    Arguments and attributes: :class:`SparseLayer`, :class:`InPlaceLayer`.
    """

    def add_gradients(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return _RowGradients.apply(y, x, self.delta, self)

    def base_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Look up W0's rows, bit for bit."""
        y = self.base(x)
        if not self.is_written:
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
    """Return ``y`` as a tensor that isn't a view and shares its memory.

    Before a view, autograd would copy the whole gradient.
    """
    return torch.ops.aten._unsafe_view(y, y.shape)


class _LinearGradients(torch.autograd.Function):
    """Return a linear layer's output unchanged; compute its blocks' gradients in the backward.

    The output is marked as written, although it isn't: model code may not write a view of a Function in place.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.save_for_backward(delta, *kept_inputs(x, layout, y.dtype))
        ctx.layout = layout
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        delta, *kept = ctx.saved_tensors
        return grad_y, None, block_gradients(flat(grad_y), kept, ctx.layout, delta), None


class _RowGradients(torch.autograd.Function):
    """Return an embedding's output unchanged; compute its blocks' gradients in the backward."""

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
