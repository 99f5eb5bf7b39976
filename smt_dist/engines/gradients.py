"""Add up the blocks' gradients between two steps.

The sums are whole on every rank, or in slices that are freed early.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from smt_dist.distributed import get_rank, get_world_size, is_distributed, reduce_scatter_rows
from smt_dist.engines.flat import FlatParameters


class GradientSums(Protocol):
    """Sum gradients in fp32 over a step's micro-batches, and average them over ranks."""

    def add(self, parameter: nn.Parameter) -> None:
        """Add ``parameter.grad`` to its sum."""

    def average(self) -> torch.Tensor:
        """Return this rank's fp32 slice of the average over ranks; collective, last in a step."""

    def clear(self) -> None:
        """Drop everything, for the next step."""

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that are held now."""


class WholeGradients:
    """Keep all sums in one buffer, with one reduce-scatter per step.

    It takes 4 bytes per element all the time.

    Args:
        flat: the parameters.
        reduce_dtype: in which they cross the network.
    """

    def __init__(self, flat: FlatParameters, reduce_dtype: torch.dtype) -> None:
        self._flat, self._reduce_dtype = flat, reduce_dtype
        self._sums = torch.zeros(len(flat.values), device=flat.values.device)

    def add(self, parameter: nn.Parameter) -> None:
        self._flat.ranges[parameter].of(self._sums).add_(parameter.grad.reshape(-1))

    def average(self) -> torch.Tensor:
        if not is_distributed():
            return self._sums
        return reduce_scatter_rows(self._sums.to(self._reduce_dtype)).float().div_(get_world_size())

    def clear(self) -> None:
        self._sums.zero_()

    def tensors(self) -> list[torch.Tensor]:
        return [self._sums]


class SlicedGradients:
    """Keep the sums in slices, one per owning rank.

    A slice is reduced to its owner, and freed, when it is full.

    The last layers' gradients come first, so slices fill from the last to the first while the backward runs; a rank
    holds about two of them and its own. As many bytes cross the network as in one reduce-scatter, in one reduction a
    rank. With more than one micro-batch a step, all slices exist until the last one's backward.

    Args:
        flat: the parameters, in the order of the forward.
        reduce_dtype: in which they cross the network.
        micro_batches: backwards in a step. After fewer, or where a parameter got no gradient, :meth:`average` reduces
            what is left.
    """

    def __init__(self, flat: FlatParameters, reduce_dtype: torch.dtype, micro_batches: int) -> None:
        self._flat, self._reduce_dtype, self._micro_batches = flat, reduce_dtype, micro_batches
        self._places = {parameter: list(flat.owners(place)) for parameter, place in flat.ranges.items()}
        self.clear()

    def add(self, parameter: nn.Parameter) -> None:
        place, gradient = self._flat.ranges[parameter], parameter.grad.reshape(-1)
        for owner, part in self._places[parameter]:
            if owner > self._next:
                raise RuntimeError(f"more than the {self._micro_batches} backwards that a step was said to have")
            part.of(self._slice(owner), self._flat.share(owner).start).add_(part.of(gradient, place.start))
            self._awaited[owner] -= 1
        # Reduce in this order on every rank, whatever the order in which gradients arrive.
        while self._next >= 0 and self._awaited[self._next] <= 0:
            self._reduce_next()

    def average(self) -> torch.Tensor:
        while self._next >= 0:
            self._reduce_next()
        return self._own

    def clear(self) -> None:
        self._slices: dict[int, torch.Tensor] = {}
        self._own: torch.Tensor | None = None
        self._next = get_world_size() - 1
        self._awaited = [0] * get_world_size()
        for parts in self._places.values():
            for owner, _ in parts:
                self._awaited[owner] += self._micro_batches

    def tensors(self) -> list[torch.Tensor]:
        return [*self._slices.values(), *([] if self._own is None else [self._own])]

    def _slice(self, owner: int) -> torch.Tensor:
        if owner not in self._slices:
            values = self._flat.values
            self._slices[owner] = torch.zeros(len(self._flat.share(owner)), device=values.device)
        return self._slices[owner]

    def _reduce_next(self) -> None:
        owner = self._next
        sums = self._slice(owner).to(self._reduce_dtype)
        del self._slices[owner]
        dist.reduce(sums, dst=owner)
        if owner == get_rank():
            self._own = sums.float().div_(get_world_size())
        self._next -= 1
