"""Scores of blocks, and the accumulators that compute them without ever holding the model's gradient.

Notation: ``g`` is one backward's gradient of a weight ``W [out, in]``, that is ``grad_y^T @ x`` with
``grad_y [tokens, out]`` and ``x [tokens, in]``; ``G`` is the sum of ``g`` over ranks, micro-batches and steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from smt_dist.blocks import BlockGrid
from smt_dist.distributed import (
    all_reduce_sum,
    collective_device,
    get_rank,
    get_world_size,
    is_distributed,
    reduce_scatter_rows,
)


@dataclass(frozen=True)
class BlockScores:
    """One number for each block of each target; the same on every rank.

    Attributes:
        block_size: (rows, cols) in elements.
        tables: module name -> fp64 CPU tensor ``[block rows, block columns]``, in the model's order.
        shapes: module name -> weight shape (out, in).
        groups: config group name -> its module names.
        parameters_2d: elements of all 2-D parameters of the model, which fractions refer to.
        score: the score's name in the config.
        steps: global steps that were scored.
    """

    block_size: tuple[int, int]
    tables: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, int]]
    groups: dict[str, list[str]]
    parameters_2d: int
    score: str
    steps: int


class ScoreAccumulator(Protocol):
    """Turns (input, output gradient) pairs of the target modules into one score a block.

    The warm-up calls ``keep`` in the forward of a target, ``add`` in its backward, ``end_micro_batch`` after
    each backward, ``end_step`` after each global step and ``tables`` once. On more than one rank
    ``end_micro_batch``, ``end_step`` and ``tables`` are collective.
    """

    def keep(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """What the backward will need of the input ``[tokens, in]``."""

    def add(self, module: str, grad_y: torch.Tensor, kept: torch.Tensor) -> None:
        """Count one backward's output gradient ``[tokens, out]``."""

    def end_micro_batch(self) -> None:
        """All gradients of this micro-batch have been added."""

    def end_step(self) -> None:
        """All micro-batches of this global step have been added."""

    def non_finite_module(self) -> str | None:
        """The first module whose gradient was NaN or infinite on this rank."""

    def tables(self) -> dict[str, torch.Tensor]:
        """Module -> fp64 CPU scores ``[block rows, block columns]``, equal on all ranks."""


def make_accumulator(score: str, grids: Mapping[str, BlockGrid], device: torch.device) -> ScoreAccumulator:
    """The accumulator for a score's name (see :class:`smt_dist.config.SelectionConfig`)."""
    name = score.removesuffix("_per_step")
    per_step = score != name
    if name == "mean_abs":
        return BlockMeanAccumulator(grids, device, per_step)
    return ElementwiseAccumulator(name, grids, device, per_step)


class BlockMeanAccumulator:
    """``mean_abs``: the absolute value of the mean of G over the block.

    The mean is linear, so it streams: the sum of a block of ``grad_y^T @ x`` is the product of the row sums of
    grad_y and the column sums of x. No weight gradient is ever computed, and of the input only
    ``[tokens, block columns]`` is kept.

    State: 8 bytes a block. With ``per_step``, the mean over steps of each step's score.
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
        return x.reshape(len(x), grid.shape[1], grid.block_cols).sum(-1, dtype=torch.float64)

    def add(self, module: str, grad_y: torch.Tensor, kept: torch.Tensor) -> None:
        grid = self._grids[module]
        row_sums = grad_y.reshape(len(grad_y), grid.shape[0], grid.block_rows).sum(-1, dtype=torch.float64)
        sums = row_sums.t() @ kept
        if self._non_finite is None and not sums.sum().isfinite():
            self._non_finite = module
        self._sums[module].add_(sums)

    def end_micro_batch(self) -> None:
        """Nothing to do: block sums need no communication before the end of the step."""

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
    """``abs_mean``, ``l1`` and ``l2``: they need G element by element, which is sharded over ranks by rows.

    Each layer's gradient is reduce-scattered in fp32 as it appears and dropped; each rank adds its rows to its
    shard. Rows needn't end on block edges: ranks sum what they hold of each block, then share the block table.

    State a rank: 4 bytes x (elements of the targets) / world size; with ``per_step`` only within a step of more
    than one micro-batch.
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
        self._queue = _LayerQueue(list(grids))

    def keep(self, module: str, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return x

    def add(self, module: str, grad_y: torch.Tensor, kept: torch.Tensor) -> None:
        if is_distributed():
            for finished, gradient in self._queue.move_to(module):
                self._reduce(finished, gradient)
        gradient = grad_y.t() @ kept
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
        scale = {name: grid.block_elements if self._score == "abs_mean" else 1 for name, grid in self._grids.items()}
        return {name: result[name] / scale[name] for name in self._grids}

    def _reduce(self, module: str, gradient: torch.Tensor | None) -> None:
        """Sum a gradient over ranks, keep this rank's rows. None: this rank saw none, which counts as zero."""
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
        """Add this rank's part of each block's sum of |G| (or G^2) to ``tables``."""
        for module, shard in self._shards.items():
            grid = self._grids[module]
            first = get_rank() * len(shard) if is_distributed() else 0
            own = shard[: max(0, min(len(shard), grid.rows - first))]
            values = own.square() if self._score == "l2" else own.abs()
            by_row = values.view(len(own), grid.shape[1], grid.block_cols).sum(-1, dtype=torch.float64)
            block_row = torch.arange(first, first + len(own), device=own.device) // grid.block_rows
            tables[module].index_add_(0, block_row, by_row)

    def _finish_score(self, sums: torch.Tensor) -> None:
        if self._score == "l2":
            sums.sqrt_()


class _Tables:
    """A block table for each module, as views of one flat fp64 tensor, so that one all-reduce serves all."""

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


class _LayerQueue:
    """Holds one layer's gradients and hands them out in an order that all ranks share.

    A rank whose tokens reach no expert of a layer gets no gradient there; were gradients reduced as they come,
    its collectives would pair with others' and the job would hang or mix up modules. So layers are handed out
    from last to first, whole, with None for what this rank didn't get.
    """

    def __init__(self, modules: list[str]) -> None:
        self._layers: list[list[str]] = []
        self._layer_of: dict[str, int] = {}
        for module in modules:
            if not self._layers or layer_key(self._layers[-1][0]) != layer_key(module):
                self._layers.append([])
            self._layers[-1].append(module)
            self._layer_of[module] = len(self._layers) - 1
        self._current = len(self._layers) - 1
        self._pending: dict[str, torch.Tensor] = {}

    def move_to(self, module: str) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield the layers above ``module``'s, which this backward has left."""
        while self._current > self._layer_of[module]:
            yield from self._next_layer()

    def put(self, module: str, gradient: torch.Tensor) -> None:
        """Keep a gradient until its layer is handed out."""
        if module in self._pending:
            gradient = self._pending[module] + gradient
        self._pending[module] = gradient

    def drain(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield all layers that are left. Repeats while any rank holds a gradient that came out of order."""
        while True:
            while self._current >= 0:
                yield from self._next_layer()
            self._current = len(self._layers) - 1
            late = torch.tensor([float(len(self._pending))])
            if not all_reduce_sum(late.to(collective_device())).item():
                return

    def _next_layer(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name in self._layers[self._current]:
            yield name, self._pending.pop(name, None)
        self._current -= 1


def layer_key(module: str) -> str:
    """The name up to its first number: ``model.layers.3`` of ``model.layers.3.self_attn.q_proj``."""
    parts = module.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return module
