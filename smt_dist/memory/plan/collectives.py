"""Count the collectives that code starts: kind, bytes, dtype and group size.

with CollectiveCounter() as counter:
    trainer.train()
print(totals(counter.collectives))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# Of every operator that communicates: its kind, the number of the argument that is measured, and whether that holds one
# rank's part only, so that the whole is as many times larger as there are ranks.
_FULL, _PART = False, True
OPERATORS: dict[str, tuple[str, int, bool]] = {
    "c10d::_allgather_base_": ("all_gather", 0, _FULL),
    "c10d::allgather_": ("all_gather", 0, _FULL),
    "c10d::allgather_coalesced_": ("all_gather", 0, _FULL),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 0, _FULL),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1, _FULL),
    "c10d::reduce_scatter_": ("reduce_scatter", 1, _FULL),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, _FULL),
    "c10d::allreduce_": ("all_reduce", 0, _FULL),
    "c10d::allreduce_coalesced_": ("all_reduce", 0, _FULL),
    "c10d::broadcast_": ("broadcast", 0, _FULL),
    "c10d::reduce_": ("reduce", 0, _FULL),
    "c10d::gather_": ("gather", 1, _PART),
    "c10d::scatter_": ("scatter", 0, _PART),
    "c10d::alltoall_": ("all_to_all", 1, _FULL),
    "c10d::alltoall_base_": ("all_to_all", 1, _FULL),
    "c10d::send": ("send", 0, _FULL),
    "c10d::recv_": ("recv", 0, _FULL),
    "c10d::recv_any_source_": ("recv", 0, _FULL),
    "c10d::barrier": ("barrier", 0, _FULL),
    "c10d::monitored_barrier_": ("barrier", 0, _FULL),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0, _PART),
    "_c10d_functional::all_gather_into_tensor_out": ("all_gather", 0, _PART),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", 0, _PART),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0, _FULL),
    "_c10d_functional::reduce_scatter_tensor_out": ("reduce_scatter", 0, _FULL),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", 0, _FULL),
    "_c10d_functional::all_reduce": ("all_reduce", 0, _FULL),
    "_c10d_functional::all_reduce_": ("all_reduce", 0, _FULL),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", 0, _FULL),
    "_c10d_functional::all_reduce_coalesced_": ("all_reduce", 0, _FULL),
    "_c10d_functional::broadcast": ("broadcast", 0, _FULL),
    "_c10d_functional::broadcast_": ("broadcast", 0, _FULL),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0, _FULL),
    "_c10d_functional::isend": ("send", 0, _FULL),
    "_c10d_functional::irecv": ("recv", 0, _FULL),
    "_c10d_functional::batch_p2p_ops": ("send", 3, _FULL),
    "_c10d_functional_autograd::all_gather_into_tensor": ("all_gather", 0, _PART),
    "_c10d_functional_autograd::reduce_scatter_tensor": ("reduce_scatter", 0, _FULL),
    "_c10d_functional_autograd::all_to_all_single": ("all_to_all", 0, _FULL),
    # DeepSpeed's own, in shared memory; only its inference engine calls it.
    "deepspeed::inference_all_reduce": ("all_reduce", 0, _FULL),
    "deepspeed::inference_all_reduce_": ("all_reduce", 0, _FULL),
}
# Operators of the same namespaces that send nothing.
SILENT = {"c10d::check_for_nan", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}
NAMESPACES = {name.partition("::")[0] for name in OPERATORS}


@dataclass(frozen=True)
class Collective:
    """Describe one call.

    Attributes:
        kind: ``all_gather``, ``reduce_scatter``, ``all_reduce``, ``broadcast``, ...
        bytes: of the whole tensor: what an all-gather ends with, what a reduce-scatter or all-reduce starts from.
            Coalesced calls count once, with the bytes of all their tensors; a barrier has none.
        dtype: of its (first) tensor.
        ranks: in the group.
    """

    kind: str
    bytes: int
    dtype: torch.dtype
    ranks: int

    @property
    def sent(self) -> float:
        """Return the bytes that a rank sends in a ring; the mean over ranks."""
        # An all-reduce is a reduce-scatter and an all-gather. Of a message between two ranks, one sends all.
        if self.kind in ("send", "recv"):
            return self.bytes if self.kind == "send" else 0
        return self.bytes * (2 if self.kind == "all_reduce" else 1) * (self.ranks - 1) / self.ranks


class Total(NamedTuple):
    """Sum several calls, such as those of a step."""

    calls: float
    bytes: float
    sent: float


class CollectiveCounter(TorchDispatchMode):
    """List all collectives of this process inside the context, in the order of their start.

    Counted is what goes through the dispatcher, that is, what is called by ``torch.distributed``, its functional form,
    DTensor, DDP, FSDP2 and DeepSpeed, coalesced or not, on any backend and on the fake process group; not what is
    called by a backend object itself (``ProcessGroupNCCL.allreduce`` instead of ``ProcessGroup.allreduce``), nor what
    goes through the store. Objects (``all_gather_object``) show as the tensors of sizes and bytes that they are.

    A dispatch mode belongs to a thread. The backward takes it along: autograd copies the thread's state, modes
    included, into its graph task and restores it in each thread that works on it (the caller itself for CPU, one
    thread a device for CUDA) and for the callbacks at the end. Other threads' calls aren't counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        # A DTensor takes its operation apart first; its collectives then come here one by one.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if isinstance(func, torch._ops.OpOverload) and func.namespace in NAMESPACES:
            self._count(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _count(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> None:
        name = func._schema.name
        if name in SILENT:
            return
        if name not in OPERATORS:
            raise RuntimeError(f"CollectiveCounter doesn't know {name} (checked on torch 2.13)")
        kind, measured, is_part = OPERATORS[name]
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        tensors = list(_tensors(given[func._schema.arguments[measured].name]))
        ranks = _group_size(given)
        size = 0 if kind == "barrier" else sum(tensor.nbytes for tensor in tensors) * (ranks if is_part else 1)
        self.collectives.append(Collective(kind, size, tensors[0].dtype, ranks))


def totals(collectives: Iterable[Collective], steps: int = 1) -> dict[str, Total]:
    """Return kind -> calls, bytes and bytes sent by a rank, divided by ``steps``."""
    by_kind: dict[str, list[Collective]] = defaultdict(list)
    for collective in collectives:
        by_kind[collective.kind].append(collective)
    return {
        kind: Total(
            calls=len(calls) / steps,
            bytes=sum(call.bytes for call in calls) / steps,
            sent=sum(call.sent for call in calls) / steps,
        )
        for kind, calls in by_kind.items()
    }


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for inner in value:
            yield from _tensors(inner)


def _group_size(given: dict[str, Any]) -> int:
    group = given.get("process_group", given.get("group_name"))
    if group is None:
        return dist.get_world_size()
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group).size()
    return (group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)).size()
