"""Compute scores of blocks in accumulators that never hold the whole model's gradient.

Notation: ``g`` is one backward's gradient of a weight ``W [out, in]``, that is ``grad_y^T @ x`` with
``grad_y [tokens, out]`` and ``x [tokens, in]``; ``G`` is the sum of ``g`` over ranks, micro-batches and steps.
An embedding's weight is ``[vocabulary, hidden]`` and its ``x`` are token ids: ``g`` adds each token's ``grad_y`` to the
row of its id. Ids of -1 (the padding index) add nothing, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from smt_dist.config import SALIENCY
from smt_dist.distributed import (
    all_gather_rows,
    all_reduce_sum,
    get_rank,
    get_world_size,
    is_distributed,
    reduce_scatter_rows,
)
from smt_dist.selection.layer_queue import LayerQueue
from smt_dist.sparse.blocks import BlockGrid

# Module -> its whole weight [out, in] inside the context; collective where the base is sharded.
WeightReader = Callable[[str], AbstractContextManager[torch.Tensor]]


class ScoreAccumulator(Protocol):
    """Turn (input, output gradient) pairs of the target modules into one score per block.

    The warm-up calls ``keep`` in the forward of a target, ``add`` in its backward, ``end_micro_batch`` after
    each backward, ``end_step`` after each global step and ``tables`` once. On more than one rank
    ``end_micro_batch``, ``end_step`` and ``tables`` are collective.
    """

    def keep(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """Return what the backward needs of the input.

        Args:
            module: its name.
            x: ``[tokens, in]``, or an embedding's ids ``[tokens]``.
        """

    def add(self, module: str, grad_y: torch.Tensor, kept: torch.Tensor) -> None:
        """Add one backward's output gradient ``[tokens, out]``."""

    def end_micro_batch(self) -> None:
        """Finish a micro-batch, all of whose gradients have been added."""

    def end_step(self) -> None:
        """Finish a global step, all of whose micro-batches have been added."""

    def non_finite_module(self) -> str | None:
        """Return the first module whose gradient was NaN or infinite on this rank."""

    def tables(self) -> dict[str, torch.Tensor]:
        """Return module -> fp64 CPU scores ``[block rows, block columns]``, equal on all ranks."""


def make_accumulator(
    score: str, grids: Mapping[str, BlockGrid], device: torch.device, weights: WeightReader | None = None
) -> ScoreAccumulator:
    """Make the accumulator for a gradient score.

    Args:
        score: its name, see :class:`smt_dist.config.SelectionConfig`.
        grids: of the modules to score, in the model's order.
        device: of the accumulated values.
        weights: needed for ``grad_x_weight`` only.
    """
    name = score.removesuffix("_per_step")
    per_step = score != name
    if name == SALIENCY:
        assert weights is not None
        return SaliencyAccumulator(grids, device, weights)
    if name == "mean_abs":
        return BlockMeanAccumulator(grids, device, per_step)
    return ElementwiseAccumulator(name, grids, device, per_step)


class BlockMeanAccumulator:
    """Compute ``mean_abs``, the absolute value of the mean of G over the block.

    The mean is linear, so it can be streamed: the sum of a block of ``grad_y^T @ x`` is the product of the row sums
    of grad_y and the column sums of x. No weight gradient is computed, and of the input only
    ``[tokens, block columns]`` is kept. With ``per_step`` the score is the mean over steps of each step's score.

    State: 8 bytes per block, 16 with ``per_step``.
    """

    def __init__(self, grids: Mapping[str, BlockGrid], device: torch.device, per_step: bool) -> None:
        self._grids = grids
        self._per_step = per_step
        self._sums = _Tables(grids, device)
        self._steps = _Tables(grids, device) if per_step else None
        self._step_count = 0
        self._non_finite: str | None = None

    def keep(self, module: str, x: torch.Tensor) -> torch.Tensor:
        grid = self._grids[module]
        if not x.is_floating_point():
            return torch.div(x, grid.block_rows, rounding_mode="floor")
        return x.reshape(len(x), grid.shape[1], grid.block_cols).sum(-1, dtype=torch.float64)

    def add(self, module: str, grad_y: torch.Tensor, kept: torch.Tensor) -> None:
        grid = self._grids[module]
        if kept.is_floating_point():
            row_sums = grad_y.reshape(len(grad_y), grid.shape[0], grid.block_rows).sum(-1, dtype=torch.float64)
            sums = row_sums.t() @ kept
        else:
            col_sums = grad_y.reshape(len(grad_y), grid.shape[1], grid.block_cols).sum(-1, dtype=torch.float64)
            sums = _add_rows(col_sums, kept, grid.shape[0])
        if self._non_finite is None and not sums.sum().isfinite():
            self._non_finite = module
        self._sums[module].add_(sums)

    def end_micro_batch(self) -> None:
        """Do nothing: block sums need no communication before the end of the step."""

    def end_step(self) -> None:
        self._step_count += 1
        if self._steps is not None:
            all_reduce_sum(self._sums.flat)
            self._steps.flat.add_(self._sums.flat.abs_())
            self._sums.flat.zero_()

    def non_finite_module(self) -> str | None:
        return self._non_finite

    def tables(self) -> dict[str, torch.Tensor]:
        if self._steps is not None:
            result = self._steps.copy(scale=1 / self._step_count)
        else:
            result = self._sums.copy()
            all_reduce_sum(result.flat).abs_()
        return {name: result[name] / grid.block_elements for name, grid in self._grids.items()}


class ElementwiseAccumulator:
    """Compute ``abs_mean``, ``l1`` or ``l2``, which need G element by element, sharded by rows.

    Each layer's gradient is reduce-scattered in fp32 as soon as it is complete, and each rank adds its rows to its
    shard. Shards needn't end on block edges: each rank sums its part of each block, then the block table is
    all-reduced.

    State per rank: 4 bytes x (elements of the targets) / world size; with ``per_step`` only until the end of a step.
    """

    def __init__(self, score: str, grids: Mapping[str, BlockGrid], device: torch.device, per_step: bool) -> None:
        self._score = score
        self._grids = grids
        self._per_step = per_step
        self._shards: dict[str, torch.Tensor] = {}
        self._sums = _Tables(grids, device)
        self._step_sums = _Tables(grids, device) if per_step else None
        self._step_count = 0
        self._non_finite: str | None = None
        self._queue = LayerQueue(list(grids))

    def keep(self, module: str, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return x

    def add(self, module: str, grad_y: torch.Tensor, kept: torch.Tensor) -> None:
        if is_distributed():
            for finished, gradient in self._queue.move_to(module):
                self._reduce(finished, gradient)
        if kept.is_floating_point():
            gradient = grad_y.t() @ kept
        else:
            gradient = _add_rows(grad_y.float(), kept, self._grids[module].rows)
        if self._non_finite is None and not gradient.sum(dtype=torch.float32).isfinite():
            self._non_finite = module
        if is_distributed():
            self._queue.put(module, gradient)
        else:
            self._add_shard(module, gradient.float())

    def end_micro_batch(self) -> None:
        if is_distributed():
            for module, gradient in self._queue.drain():
                self._reduce(module, gradient)

    def end_step(self) -> None:
        self._step_count += 1
        if self._step_sums is not None:
            self._collect_shards(self._step_sums)
            self._shards.clear()
            self._finish_score(all_reduce_sum(self._step_sums.flat))
            self._sums.flat.add_(self._step_sums.flat)
            self._step_sums.flat.zero_()

    def non_finite_module(self) -> str | None:
        return self._non_finite

    def tables(self) -> dict[str, torch.Tensor]:
        if self._per_step:
            result = self._sums.copy(scale=1 / self._step_count)
        else:
            result = self._sums.copy()
            self._collect_shards(result)
            self._finish_score(all_reduce_sum(result.flat))
        is_mean = self._score in ("abs_mean", SALIENCY)
        return {name: result[name] / (grid.block_elements if is_mean else 1) for name, grid in self._grids.items()}

    def _reduce(self, module: str, gradient: torch.Tensor | None) -> None:
        """Reduce-scatter a gradient and add this rank's rows to its shard; None counts as zero."""
        grid, world_size = self._grids[module], get_world_size()
        rows = -(-grid.rows // world_size)
        padded = torch.zeros(rows * world_size, grid.cols, device=self._sums.flat.device)
        if gradient is not None:
            padded[: grid.rows] = gradient
        self._add_shard(module, reduce_scatter_rows(padded))

    def _add_shard(self, module: str, shard: torch.Tensor) -> None:
        if module in self._shards:
            self._shards[module].add_(shard)
        else:
            self._shards[module] = shard

    def _collect_shards(self, tables: _Tables) -> None:
        """Add this rank's part of each block's sum of |G| (or G^2, or |G * weight|) to ``tables``."""
        for module, grid in self._grids.items():
            if (shard := self._shards.get(module)) is None:
                continue
            first = get_rank() * len(shard) if is_distributed() else 0
            own = shard[: max(0, min(len(shard), grid.rows - first))]
            values = self._values(module, own, first)
            by_row = values.view(len(own), grid.shape[1], grid.block_cols).sum(-1, dtype=torch.float64)
            block_row = torch.arange(first, first + len(own), device=own.device) // grid.block_rows
            tables[module].index_add_(0, block_row, by_row)

    def _values(self, module: str, own: torch.Tensor, first: int) -> torch.Tensor:  # noqa: ARG002
        """Return the elements to sum over a block, for this rank's rows of G from row ``first`` on."""
        return own.square() if self._score == "l2" else own.abs()

    def _finish_score(self, sums: torch.Tensor) -> None:
        if self._score == "l2":
            sums.sqrt_()


class SaliencyAccumulator(ElementwiseAccumulator):
    """Compute ``grad_x_weight``, the mean of ``|G * weight|`` over the block.

    ``|G * weight|`` is, to first order, the change of the loss if the element is set to zero (Molchanov et al.,
    arXiv 1906.10771). Weights are read at the end, one at a time: memory is that of ``abs_mean`` and one whole weight.
    """

    def __init__(self, grids: Mapping[str, BlockGrid], device: torch.device, weights: WeightReader) -> None:
        super().__init__(SALIENCY, grids, device, per_step=False)
        self._weights = weights

    def _values(self, module: str, own: torch.Tensor, first: int) -> torch.Tensor:
        with self._weights(module) as weight:
            return (own * weight.detach()[first : first + len(own)].to(own.device, torch.float32)).abs()


class GradientAccumulator(ElementwiseAccumulator):
    """Accumulate G in shards and return it whole for one module at a time, for custom scores."""

    def __init__(self, grids: Mapping[str, BlockGrid], device: torch.device) -> None:
        super().__init__("l1", grids, device, per_step=False)

    def gradient(self, module: str) -> torch.Tensor:
        """Return a module's whole G, fp32 ``[out, in]``, on every rank; collective."""
        grid, shard = self._grids[module], self._shards.get(module)
        if shard is None:  # on one process: no batch reached this module
            return torch.zeros(grid.rows, grid.cols, device=self._sums.flat.device)
        if is_distributed():
            whole = shard.new_empty(len(shard) * get_world_size(), grid.cols)
            all_gather_rows(whole, shard)
            return whole[: grid.rows]
        return shard


def _add_rows(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Sum ``values [tokens, columns]`` by row index into ``[count, columns]``; -1 is left out."""
    # The extra row takes the values of -1: a boolean mask would make the host wait for the device.
    return values.new_zeros(count + 1, values.shape[1]).index_add_(0, rows.where(rows >= 0, count), values)[:count]


class _Tables:
    """Hold each module's block table as a view of one flat fp64 tensor, for a single all-reduce."""

    def __init__(self, grids: Mapping[str, BlockGrid], device: torch.device | str) -> None:
        self._grids = grids
        self.flat = torch.zeros(sum(len(grid) for grid in grids.values()), dtype=torch.float64, device=device)
        pieces = self.flat.split([len(grid) for grid in grids.values()])
        self._views = {name: piece.view(grids[name].shape) for name, piece in zip(grids, pieces, strict=True)}

    def __getitem__(self, module: str) -> torch.Tensor:
        return self._views[module]

    def copy(self, scale: float = 1.0) -> _Tables:
        result = _Tables(self._grids, self.flat.device)
        torch.mul(self.flat, scale, out=result.flat)
        return result
