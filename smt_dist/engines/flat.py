"""Lay parameters end to end in one flat buffer, cut into equal shares, one per rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from smt_dist.distributed import get_rank, get_world_size, is_distributed


@dataclass(frozen=True)
class Range:
    """Hold the range of elements from ``start`` to ``stop`` (exclusive) of the flat buffer."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def within(self, other: Range) -> Range:
        """Return the part of this range that lies in ``other``; of length 0 if none does."""
        start = min(max(self.start, other.start), other.stop)
        return Range(start, max(start, min(self.stop, other.stop)))

    def of(self, tensor: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Return a view of these elements of a flat tensor.

        Its own first element is number ``first``.
        """
        return tensor[self.start - first : self.stop - first]


class FlatParameters:
    """Move parameters into one flat buffer, of which they become views.

    Args:
        parameters: of equal dtype and device.

    Attributes:
        values: the buffer; padded with zeros to a multiple of the world size.
        ranges: parameter -> its place.
        own: this rank's share; all ranks' are of the same size.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        world_size = get_world_size()
        self.ranges: dict[nn.Parameter, Range] = {}
        start = 0
        for parameter in parameters:
            self.ranges[parameter] = Range(start, start + parameter.numel())
            start += parameter.numel()
        padded = -(-start // world_size) * world_size
        self.values = torch.zeros(padded, dtype=parameters[0].dtype, device=parameters[0].device)
        self._storages: dict[nn.Parameter, StorageWeakRef] = {}
        for parameter, place in self.ranges.items():
            view = place.of(self.values).view(parameter.shape)
            view.copy_(parameter.detach())
            self.bind(parameter, view)
        self.own = self.share(get_rank() if is_distributed() else 0)

    def bind(self, parameter: nn.Parameter, data: torch.Tensor) -> None:
        """Set a parameter's data, and remember where it lies."""
        parameter.data = data
        self._storages[parameter] = StorageWeakRef(data.untyped_storage())

    def check(self) -> None:
        """Raise RuntimeError if a parameter was moved (``model.to``) out of the optimizer's reach."""
        if any(StorageWeakRef(parameter.untyped_storage()) != own for parameter, own in self._storages.items()):
            raise RuntimeError("the blocks were moved (model.to?) after their optimizer was made; make it again")

    def share(self, rank: int) -> Range:
        """Return a rank's part of the buffer."""
        size = len(self.values) // get_world_size()
        return Range(rank * size, (rank + 1) * size)

    def owners(self, place: Range) -> Iterator[tuple[int, Range]]:
        """Yield (rank, part) for each rank whose share has a part of ``place``, in order."""
        for rank in range(get_world_size()):
            part = place.within(self.share(rank))
            if len(part):
                yield rank, part

    def collect(self, parameter: nn.Parameter, own: torch.Tensor, first: int, whole: torch.Tensor) -> torch.Tensor:
        """Fill ``whole`` with a parameter's parts of all ranks; collective.

        Args:
            parameter: one of the buffer's.
            own: flat; holds this rank's part.
            first: the number of ``own``'s first element in the buffer.
            whole: flat, of the parameter's size; on any device.

        Returns:
            ``whole`` in the parameter's shape.
        """
        place = self.ranges[parameter]
        for rank, part in self.owners(place):
            piece = part.of(own.detach(), first) if part == part.within(self.own) else own.new_empty(len(part))
            if is_distributed():
                dist.broadcast(piece, src=rank)
            part.of(whole, place.start).copy_(piece)
        return whole.view(parameter.shape)
