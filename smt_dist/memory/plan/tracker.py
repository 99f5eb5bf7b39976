"""Track every storage from its creation to its end, with its category.

Why not ``torch.distributed._tools.FSDPMemTracker``: it knows parameters, gradients and optimizers of ``nn.Module`` and
``torch.optim``, while the blocks' values, gradients and states lie in flat buffers of ``ShardedBlockOptimizer``; and it
keeps the peak only, not the moments that are needed to reckon other depths. Checked on torch 2.13.0.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smt_dist.memory.plan.categories import Memory
from smt_dist.memory.plan.collectives import NAMESPACES
from smt_dist.memory.plan.patches import unseen_shape_propagation, watched_resizes

# What gloo copies whole (torch 2.13.0, ProcessGroupGloo.cpp: it flattens outputs, or inputs, once more).
_COPYING = ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_")

FORWARD, RECOMPUTE, BACKWARD, OTHER = "forward", "recompute", "backward", "other"


@dataclass(eq=False)
class Record:
    """Describe one storage."""

    bytes: int
    made_in: str  # the pass: forward, recompute, backward or other
    span: int  # of that pass
    category: str | None = None
    died: int | None = None  # the event at which it went


@dataclass
class _Log:
    """Log (storage, change in bytes) and where moments begin, in order."""

    events: list[tuple[Record, int]] = field(default_factory=list)
    moments: list[tuple[int, str]] = field(default_factory=list)
    span_ends: dict[int, int] = field(default_factory=dict)


class MemoryTracker(TorchDispatchMode):
    """Track storages made inside the context.

    Enter it inside ``FakeTensorMode``, or around real tensors.

    Storages that exist before are told by :meth:`register`. A storage that nobody registered is an activation if it
    was made in the forward (or a recomputation) and outlived it, communication if a collective reads or writes it,
    else temporary. Categories are settled at the end, so a gradient may be named when it is found.

    Args:
        device_type: whose storages are followed; all others are ignored.
        copies: count a copy of the whole where ranks gather it, or reduce and scatter it: what gloo does inside.
    """

    def __init__(self, device_type: str = "cpu", copies: bool = False) -> None:
        super().__init__()
        self.device_type = device_type
        self._copies = copies
        self._log = _Log()
        self._records: dict[int, tuple[weakref.ref, Record]] = {}
        self._pass, self._span, self._spans = OTHER, 0, 0

    # -- what the traced program says ----------------------------------------------------------------------------

    def register(self, value: Any, category: str) -> None:
        """Assign all tensors in ``value`` to ``category``.

        Nested lists and dicts too, and tensors that already have one.
        """
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor) and self._follows(tensor):
                self._record_of(local_tensor(tensor)).category = category

    def moment(self, name: str) -> None:
        """Count peaks for moment ``name``, until the next call."""
        self._log.moments.append((len(self._log.events), name))

    @property
    def current_pass(self) -> str:
        """Name the innermost :meth:`in_pass`."""
        return self._pass

    @contextmanager
    def in_pass(self, name: str) -> Iterator[None]:
        """Count what is made inside as made in this pass."""
        before = self._pass, self._span
        self._spans += 1
        self._pass, self._span = name, self._spans
        try:
            yield
        finally:
            self._log.span_ends[self._span] = len(self._log.events)
            self._pass, self._span = before

    # -- following -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        # A DTensor takes its operation apart first; what it does locally comes here piece by piece.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and self._follows(value):
                self._record_of(value)
        if isinstance(func, torch._ops.OpOverload):
            self._mark(func, args, kwargs or {})
            if self._copies and func._schema.name in _COPYING:
                self._copy(args)
        return result

    def __enter__(self) -> MemoryTracker:
        with ExitStack() as patches:
            patches.enter_context(watched_resizes(self.resized))
            patches.enter_context(unseen_shape_propagation())
            super().__enter__()
            self._patches = patches.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._patches:
            super().__exit__(*error)
        self._records.clear()  # and the references with them: callbacks after the end would write into the log

    def _follows(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self.device_type

    def _mark(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> None:
        if func.namespace in NAMESPACES:
            category = "communication"
        elif func._schema.name == "fsdp::chunk_cat":  # FSDP2 packs whole gradients to reduce them
            category = "gradients"
            args, kwargs = (args[0],), {}
        elif func._schema.name == "fsdp::all_gather_copy_in":
            return
        else:
            return
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and self._follows(value):
                record = self._record_of(value)
                record.category = record.category or category

    def _copy(self, args: tuple) -> None:
        """Count the copy of the whole that exists for a moment: a collective's largest tensor."""
        size = max(value.nbytes for value in tree_leaves(args) if isinstance(value, torch.Tensor))
        record = Record(size, self._pass, self._span, "communication")
        self._log.events += [(record, size), (record, -size)]

    def _record_of(self, tensor: torch.Tensor) -> Record:
        storage = tensor.untyped_storage()
        found = self._records.get(storage._cdata)
        if found is not None:
            return found[1]
        record = Record(storage.nbytes(), self._pass, self._span)
        key = storage._cdata

        def gone(_: weakref.ref) -> None:
            if self._records.pop(key, None) is not None:
                record.died = len(self._log.events)
                self._changed(record, -record.bytes, storage=None)

        self._records[key] = (weakref.ref(storage, gone), record)
        self._changed(record, record.bytes, storage)
        return record

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Track whole weights that FSDP2 frees and fills in place, without an operation."""
        found = self._records.get(storage._cdata)
        if found is None:
            return
        record, size = found[1], storage.nbytes()
        if record.category in (None, "temporary"):  # all that was there at the beginning counts as temporary at first
            record.category = "gathered_weights"
        change, record.bytes = size - record.bytes, size
        self._changed(record, change, storage)

    def _changed(self, record: Record, change: int, storage: torch.UntypedStorage | None) -> None:
        """Log that ``record`` changed by ``change`` bytes; ``storage`` is None when it is freed."""
        del storage  # for those who want to know where it lies
        self._log.events.append((record, change))

    # -- the result ----------------------------------------------------------------------------------------------

    def peaks(self) -> dict[str, Memory]:
        """Return moment -> memory at its peak.

        A moment that began more than once has its largest.
        """
        events, moments = self._log.events, self._log.moments
        ends = [start for start, _ in moments[1:]] + [len(events)]
        best: dict[str, tuple[int, int]] = {}
        level, position = 0, 0
        for (start, name), end in zip(moments, ends, strict=True):
            level += sum(change for _, change in events[position:start])
            position = start
            if name not in best or level > best[name][0]:
                best[name] = (level, start)
            for index in range(start, end):
                level += events[index][1]
                if level > best[name][0]:
                    best[name] = (level, index + 1)
            position = end
        return self._snapshots({name: index for name, (_, index) in best.items()})

    def _snapshots(self, wanted: dict[str, int]) -> dict[str, Memory]:
        held: dict[str, int] = {}
        snapshots = {}
        by_index: dict[int, list[str]] = {}
        for name, index in wanted.items():
            by_index.setdefault(index, []).append(name)
        for index in range(len(self._log.events) + 1):
            for name in by_index.get(index, ()):
                snapshots[name] = Memory(**held)
            if index < len(self._log.events):
                record, change = self._log.events[index]
                category = self.category_of(record)
                held[category] = held.get(category, 0) + change
        return snapshots

    def category_of(self, record: Record) -> str:
        """Return the category that is known at the end."""
        if record.category is not None:
            return record.category
        end = self._log.span_ends.get(record.span)
        outlived = end is not None and (record.died is None or record.died > end)
        return "activations" if record.made_in in (FORWARD, RECOMPUTE) and outlived else "temporary"


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, and any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
