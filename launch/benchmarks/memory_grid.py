"""The grid of the planner's validation: small models that are run for real, and how far off their plans were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from typing import Any

from transformers import LlamaConfig

from smt_dist.config import SMTConfig
from smt_dist.memory.plan.request import ENGINES, METHODS, Request

DTYPES = ("float32", "bfloat16")
PHASES = ("warmup", "training")
# A plan is right if it is off by no more than one of these.
RELATIVE = 0.05
ABSOLUTE = 16 * 2**20
# Of all, in the median.
MEDIAN = 0.02

_SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 6}
_SHAPES = {
    False: {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 24000, **_SHAPE},
    True: {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 4000, **_SHAPE},
}
# CPUs without bf16 instructions are some fifty times slower in it, so it gets few tokens.
_ROWS_AND_TOKENS = {"float32": (2, 64), "bfloat16": (1, 16)}
# Sizes at which a small model's gradients fill several buckets, and ZeRO-3 gathers each weight for each use, as large
# models do with DeepSpeed's defaults.
_ZERO = {"reduce_bucket_size": 3_000_000}
_ZERO_SMALL = {"reduce_bucket_size": 200_000}
GATHERED = {
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_param_persistence_threshold": 0,
}


@dataclass(frozen=True)
class Cell:
    """One model to run.

    Attributes:
        engine: one of the planner's.
        method: one of the planner's.
        dtype: of the base, or of full fine-tuning's computation.
        checkpointing: recompute activations in the backward.
        ranks: real processes.
        small: about a twentieth of the weights, for a quick check: the percentages mean more then, 16 MiB nothing.
    """

    engine: str
    method: str
    dtype: str
    checkpointing: bool
    ranks: int
    small: bool = False

    @property
    def name(self) -> str:
        """Such as ``zero2 smt bfloat16 checkpointing 2``."""
        return " ".join(
            [self.engine, self.method, self.dtype, *["checkpointing"] * self.checkpointing, str(self.ranks)]
        )

    def request(self) -> Request:
        """What is planned, and run."""
        rows, tokens = _ROWS_AND_TOKENS[self.dtype]
        zero = (_ZERO_SMALL if self.small else _ZERO) | (GATHERED if self.engine == "zero3" else {})
        smt = {"block_size": 64 if not self.small else 32, "groups": [{"fraction": 0.01}], "warmup": {"steps": 1}}
        return Request(
            model=LlamaConfig(**_SHAPES[self.small]),
            smt=SMTConfig.model_validate(smt),
            engine=self.engine,
            world_size=self.ranks,
            method=self.method,
            checkpointing=self.checkpointing,
            batch=rows,
            sequence=tokens,
            dtype=self.dtype,
            zero=zero if self.engine.startswith("zero") else {},
            backend="gloo",
        )

    def to_json(self) -> dict[str, Any]:
        """The attributes."""
        return asdict(self)


def make_grid(small: bool = False) -> list[Cell]:
    """All cells, those of one engine and number of ranks together.

    Left out of the product: on one rank ``fsdp2`` is ``ddp``, and ZeRO is run for SMT in fp32 only; on two ranks
    checkpointing is on where the base is sharded and off elsewhere, and for SMT and full fine-tuning in fp32 both.
    """
    cells = [Cell("ddp", *rest, 1, small) for rest in product(METHODS, DTYPES, (False, True))]
    cells += [Cell(engine, "smt", "float32", False, 1, small) for engine in ENGINES if engine.startswith("zero")]
    for engine, method, dtype in product(ENGINES, METHODS, DTYPES):
        usual = engine in ("fsdp2", "zero3")
        both = dtype == "float32" and method != "lora"
        cells += [Cell(engine, method, dtype, on, 2, small) for on in (False, True) if both or on == usual]
    return cells


@dataclass(frozen=True)
class Deviation:
    """A phase of a cell.

    Attributes:
        cell: its name.
        phase: ``warmup`` or ``training``.
        planned: bytes.
        measured: bytes of the fullest rank.
    """

    cell: str
    phase: str
    planned: int
    measured: int

    @property
    def relative(self) -> float:
        """(planned - measured) / measured."""
        return (self.planned - self.measured) / self.measured

    @property
    def holds(self) -> bool:
        """Whether the plan was near enough."""
        return abs(self.planned - self.measured) <= max(RELATIVE * self.measured, ABSOLUTE)


def deviations(cells: Mapping[str, Mapping[str, Any]]) -> Iterator[Deviation]:
    """Of all phases that were both planned and measured."""
    for name, found in cells.items():
        for phase in PHASES:
            if phase in found.get("planned", {}) and phase in found.get("measured", {}):
                measured = max(rank["total"] for rank in found["measured"][phase])
                yield Deviation(name, phase, found["planned"][phase]["total"], measured)


def summarize(found: Iterable[Deviation]) -> dict[str, Any]:
    """How many phases there are, how many hold, the median and the largest error."""
    found = list(found)
    errors = [abs(deviation.relative) for deviation in found]
    return {
        "phases": len(found),
        "hold": sum(deviation.holds for deviation in found),
        "within_relative": sum(error <= RELATIVE for error in errors),
        "median": median(errors) if errors else None,
        "largest": max(errors, default=None),
    }
