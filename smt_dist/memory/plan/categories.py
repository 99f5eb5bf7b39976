"""Count bytes by category, and parse and format sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from smt_dist.errors import SMTError

GIB = 2**30
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}ib": 2 ** (10 * power) for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {f"{prefix}b": 10 ** (3 * power) for power, prefix in enumerate("kmgt", start=1)}


@dataclass(frozen=True)
class Memory:
    """Hold a rank's bytes by category at one moment.

    Attributes:
        base_weights: this rank's part of the weights, as stored (its shard, its replica).
        gathered_weights: whole weights that FSDP2 or ZeRO-3 put together for a while.
        blocks: what is trained beside a frozen base: SMT's blocks, as they compute, or LoRA's adapters.
        gradients: of weights, blocks or adapters, and the buffers where they add up.
        optimizer_state: fp32 masters and moments.
        activations: what the forward (or a recomputation) leaves for the backward.
        communication: what collectives read and write, and their buffers.
        temporary: all else: gradients of activations, intermediate results, the warm-up's accumulators' copies.
        statistics: what the warm-up's score accumulators keep between backwards.
    """

    base_weights: int = 0
    gathered_weights: int = 0
    blocks: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    activations: int = 0
    communication: int = 0
    temporary: int = 0
    statistics: int = 0

    @property
    def total(self) -> int:
        """Return the bytes of all categories together."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        """Return category -> bytes."""
        return {name: getattr(self, name) for name in CATEGORIES}

    def plus(self, **changes: int) -> Memory:
        """Return a copy with ``changes`` bytes more of some categories."""
        return replace(self, **{name: getattr(self, name) + change for name, change in changes.items()})

    def with_(self, **values: int) -> Memory:
        """Return a copy with other bytes of some categories."""
        return replace(self, **values)

    def to_json(self) -> dict[str, int]:
        """Return category -> bytes, and their ``total``."""
        return self.as_dict() | {"total": self.total}


CATEGORIES = tuple(field.name for field in fields(Memory))


def largest(moments: Mapping[str, Memory]) -> tuple[str, Memory]:
    """Return the moment with the largest total, and its memory."""
    name = max(moments, key=lambda key: moments[key].total)
    return name, moments[name]


def parse_size(text: str) -> int:
    """Parse ``80GiB``, ``40GB``, ``512 MiB`` or a plain number as bytes.

    Raises:
        SMTError: it isn't a size, or zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise SMTError(f"{text!r} is no size: write 80GiB (2^30 bytes each), 40GB (10^9) or a number of bytes")
    size = round(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise SMTError(f"{text!r} is no size: it must be at least one byte")
    return size


def format_size(size: int) -> str:
    """Format bytes in GiB, or in MiB where they are few."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
