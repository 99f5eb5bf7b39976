"""Track real tensors with the planner's tracker, with their addresses and times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from smt_dist.memory.plan.tracker import OTHER, MemoryTracker, Record, local_tensor


class Place(NamedTuple):
    """Hold where a storage lies from a moment on.

    Attributes:
        nanoseconds: of the wall clock.
        address: of its first byte.
        bytes: it has; 0: it is gone, or emptied.
    """

    nanoseconds: int
    address: int
    bytes: int


class Mark(NamedTuple):
    """Mark where a moment of a phase begins; it lasts until the next."""

    nanoseconds: int
    phase: str
    moment: str


class RealTracker(MemoryTracker):
    """Track real tensors: the allocator counts bytes, this class tells their category.

    What operators take for themselves while they run isn't seen here, as it never becomes a tensor.

    Args:
        device_type: whose storages are followed.
        on_end: called where a moment ends because the next begins.

    Attributes:
        phase: of the run; each moment that begins belongs to it.
        gathers_in_place: what an all-gather of a forward or backward writes is a weight (ZeRO-3), no buffer (FSDP2).
        marks: the moments that began.
    """

    def __init__(self, device_type: str = "cpu", on_end: Callable[[], None] = lambda: None) -> None:
        super().__init__(device_type)
        self._on_end = on_end
        self.phase = ""
        self.gathers_in_place = False
        self.marks: list[Mark] = []
        self._places: dict[Record, list[Place]] = {}

    def moment(self, name: str) -> None:
        super().moment(name)
        if self.marks:
            self._on_end()
        self.marks.append(Mark(time.time_ns(), self.phase, name))

    def _changed(self, record: Record, change: int, storage: torch.UntypedStorage | None) -> None:
        super()._changed(record, change, storage)
        address, size = (0, 0) if storage is None else (storage.data_ptr(), storage.nbytes())
        self._places.setdefault(record, []).append(Place(time.time_ns(), address, size))

    def _follows(self, tensor: torch.Tensor) -> bool:
        # Fake tensors (DTensor works out shapes on them) and those that wrap others lie nowhere themselves.
        if isinstance(tensor, FakeTensor) or is_traceable_wrapper_subclass(local_tensor(tensor)):
            return False
        return super()._follows(tensor)

    def _mark(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> None:
        gathers = "allgather" in func._schema.name.replace("_", "")
        if self.gathers_in_place and gathers and self.current_pass != OTHER:
            self.register(args[0], "gathered_weights")
        super()._mark(func, args, kwargs)

    def stretches(self) -> list[tuple[str, Place, int | None]]:
        """Yield (category, place, end time) of every storage; call it at the end.

        The time is None for what still exists.
        """
        result = []
        for record, places in self._places.items():
            category = self.category_of(record)
            ends: list[int | None] = [place.nanoseconds for place in places[1:]]
            result += [(category, place, end) for place, end in zip(places, [*ends, None], strict=True) if place.bytes]
        return result
