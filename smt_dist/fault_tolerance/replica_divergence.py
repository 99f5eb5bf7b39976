"""Compare what must be equal on all ranks, and name the first difference.

Under ``ddp``, ``fsdp2`` and ZeRO-1 and 2 each rank computes with a copy of its own of every block: the copies are
compared. Under ZeRO-3 nobody holds a copy; there, and in bf16 under ``ddp`` and ``fsdp2`` too, each rank compares the
values that compute with its own fp32 masters, of which they must be the rounding.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from smt_dist.distributed import collective_device, get_world_size, is_distributed
from smt_dist.errors import SMTError
from smt_dist.sparse.surgery import frozen_layers, sparse_layers

_INTEGERS = {2: torch.int16, 4: torch.int32}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor's bits as integers: NaN equals NaN there, and 0.0 isn't -0.0."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()])


def computing_blocks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Collect the block values by module: trained ones, and those that re-selection froze."""
    frozen = {f"{name} (frozen)": layer.replicated_values() for name, layer in frozen_layers(model).items()}
    trained = {name: layer.computing_values() for name, layer in sparse_layers(model).items()}
    return trained | {name: values for name, values in frozen.items() if values is not None}


def block_checksums(model: nn.Module) -> torch.Tensor:
    """Sum the bits of each module's block values, as int64 on their device."""
    return torch.stack([bits(values).sum(dtype=torch.int64) for values in computing_blocks(model).values()])


def combined_checksum(checksums: torch.Tensor) -> int:
    """Combine all modules' checksums into one int64, to which their order matters."""
    weights = torch.arange(1, 2 * len(checksums), 2, device=checksums.device)
    return int((checksums * weights).sum())


def gather_integers(own: list[int]) -> list[list[int]]:
    """All-gather integers (int64), by rank; collective."""
    if not is_distributed():
        return [own]
    mine = torch.tensor(own, dtype=torch.int64, device=collective_device())
    everyone = [torch.empty_like(mine) for _ in range(get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).tolist()


def refuse_different_blocks(model: nn.Module, when: str) -> None:
    """Compare SHA-256 of each module's block values over the ranks; collective.

    Raises:
        SMTError: on all ranks, naming the first module that differs, and the ranks.
    """
    blocks = computing_blocks(model)
    digests = [hashlib.sha256(bits(values).cpu().numpy().tobytes()).hexdigest() for values in blocks.values()]
    _refuse_different(list(blocks), digests, when)


def refuse_different_checksums(model: nn.Module, checksums: torch.Tensor, when: str) -> None:
    """Raise SMTError for the first module whose checksum differs; collective.

    To be called where :func:`combined_checksum` differs.
    """
    _refuse_different(list(computing_blocks(model)), checksums.tolist(), when)
    raise SMTError(f"{when}: the ranks' blocks differ")  # two differences that cancel out between modules


def _refuse_different(modules: list[str], own: Iterable[str | int], when: str) -> None:
    if not is_distributed():
        return
    everyone: list[list[str | int]] = [[]] * get_world_size()
    dist.all_gather_object(everyone, list(own))
    for module, values in zip(modules, zip(*everyone, strict=True), strict=True):
        if len(set(values)) > 1:
            raise SMTError(f"{when}: the block values of {module} differ between ranks: {describe_odd_ranks(values)}")


def describe_odd_ranks(values: Iterable[str | int]) -> str:
    """Describe which ranks have another value than most."""
    values = list(values)
    (common, count), *_ = Counter(values).most_common()
    odd = [rank for rank, value in enumerate(values) if value != common]
    if count <= len(odd):  # no majority: it isn't known which rank is right
        return f"rank {odd[0]} and rank {values.index(common)}"
    return f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} against the other {count}"


def check_masters(
    model: nn.Module,
    damaged: str | None,
    masters: Iterable[tuple[str, torch.Tensor]],
    local_state: Iterable[tuple[str, torch.Tensor]],
) -> Callable[[], None]:
    """Read what would be saved, and find out whether it may be.

    Args:
        model: with the values that compute.
        damaged: a module whose values the engine knows to be wrong on this rank.
        masters: (module, fp32 master), as the engine reads them; collective.
        local_state: (name, tensor) of this rank's part of the optimizer's state.

    Returns:
        To be called by :func:`smt_dist.distributed.raise_on_any_rank`: raises SMTError for numbers that aren't finite
        and for masters of which the values that compute aren't the rounding.
    """
    wrong = "the block values of {} aren't those of their fp32 masters"
    problem = None if damaged is None else wrong.format(damaged)
    layers = sparse_layers(model)
    for module, master in masters:
        layer = layers[module]
        values, expected = layer.computing_values(), layer.expected_values(master)  # collective
        if not master.isfinite().all():
            problem = problem or f"the blocks of {module} are not finite (NaN or infinity)"
        elif values.numel() and not torch.equal(bits(expected).cpu(), bits(values).cpu().view(master.shape)):
            problem = problem or wrong.format(module)
        del master, expected  # before the next is read
    for module, layer in frozen_layers(model).items():
        if layer.is_damaged():
            problem = problem or f"the frozen block values of {module} aren't those of their fp32 masters"
    for name, tensor in local_state:
        if not tensor.isfinite().all():
            problem = problem or f"the optimizer's {name} is not finite (NaN or infinity)"

    def raise_problem() -> None:
        if problem is not None:
            raise SMTError(f"not saved: {problem}")

    return raise_problem
