"""Provide shared collective helpers, which also work in one process without a process group."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from smt_dist.errors import SMTError, first_line

T = TypeVar("T")


def is_distributed() -> bool:
    """Return whether a process group of more than one rank exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def get_rank() -> int:
    """Return this process's rank; without a process group, the environment's ``RANK`` or 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def get_world_size() -> int:
    """Return the number of ranks of the process group (1 without one)."""
    return dist.get_world_size() if is_distributed() else 1


def collective_device() -> torch.device:
    """Return the device that tensors need for collectives with the process group's backend."""
    if is_distributed() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over all ranks, in place; the result is bitwise equal on every rank."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def broadcast_first(tensor: torch.Tensor) -> torch.Tensor:
    """Return rank 0's ``tensor`` on every rank, as a new CPU tensor; collective.

    Args:
        tensor: on the CPU, of the same shape and dtype on all ranks.
    """
    if not is_distributed():
        return tensor
    moved = tensor.to(collective_device(), copy=True)
    dist.broadcast(moved, src=0)
    return moved.cpu()


def reduce_scatter_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over all ranks and return this rank's rows.

    Args:
        tensor: its dimension 0 must be a multiple of the world size.
    """
    shard = tensor.new_empty(tensor.shape[0] // dist.get_world_size(), *tensor.shape[1:])
    # torch 2.13 deprecates the old name.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce_scatter(shard, tensor)
    return shard


def all_gather_rows(output: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Gather the ranks' shards, one after the other, into ``output``.

    Args:
        output: as many elements as all shards.
        shard: this rank's; can be a view of its own part of ``output``.
        group: the process group; None: all ranks.
    """
    # torch 2.13 deprecates the old name.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(output, shard, group=group)


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def raise_on_any_rank(action: Callable[[], T], what: str) -> T:
    """Run ``action`` on every rank, and raise on every rank if it raised on one; collective.

    Without this, a rank that finds wrong input exits, while the others wait in the next collective until the time-out.

    Args:
        action: reads or checks something local; must not contain collectives.
        what: what the ranks were doing, for the message on ranks without an error of their own.

    Returns:
        The result of ``action`` on this rank.

    Raises:
        SMTError: ``action`` raised it on a rank; a rank without an error of its own raises the first failing rank's
            message.
    """
    result, error = None, None
    try:
        result = action()
    except SMTError as caught:
        error = caught
    if is_distributed():
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, None if error is None else str(error))
        failed = [rank for rank, message in enumerate(errors) if message is not None]
        if failed and error is None:
            raise SMTError(f"rank {failed[0]}, {what}: {errors[failed[0]]}")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def gather_objects(value: T) -> list[T]:
    """Return every rank's value on every rank, sent by pickle between this run's processes."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main_process(action: Callable[[], T], what: str) -> T:
    """Run ``action`` on rank 0 only and return its result on every rank; collective.

    Raises:
        SMTError: ``action`` raised it; on all ranks.
    """
    result = raise_on_any_rank(lambda: action() if get_rank() == 0 else None, what)
    return gather_objects(result)[0]


def main_process_first(action: Callable[[], T], what: str) -> T:
    """Run ``action`` on rank 0 first, then on the other ranks, which can use rank 0's cache.

    Raises:
        SMTError: ``action`` raised it on a rank; on all ranks.
    """
    if get_rank() == 0:
        result = raise_on_any_rank(action, what)
        raise_on_any_rank(lambda: None, what)
        return result
    raise_on_any_rank(lambda: None, what)  # waits for rank 0, and raises its error
    return raise_on_any_rank(action, what)


def assert_same_on_all_ranks(content: bytes, what: str) -> None:
    """Compare a SHA-256 of ``content`` over all ranks; collective.

    Raises:
        RuntimeError: the content differs between ranks (a defect, or ranks that read different files); on every rank.
    """
    if not is_distributed():
        return
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(content).hexdigest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise RuntimeError(f"{what} differs between ranks: ranks {different} differ from rank 0")


def write_on_rank_zero(write: Callable[[], object], source: str, doing: str) -> None:
    """Run ``write`` on rank 0 while the other ranks wait; collective.

    Args:
        write: writes files; can raise SMTError.
        source: the name of what is written, for the message.
        doing: what the other ranks wait for, for their message.

    Raises:
        SMTError: ``write`` raised it, or a file can't be written (a full disk); on all ranks.
    """

    def attempt() -> None:
        if get_rank() == 0:
            try:
                write()
            except (OSError, SafetensorError) as error:
                reason = getattr(error, "strerror", None) or first_line(error)
                raise SMTError(f"{source}: can't be written ({reason})") from None

    raise_on_any_rank(attempt, doing)
