"""Plan the load, warm-up and training of one request, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from smt_dist.errors import SMTError
from smt_dist.memory.plan.categories import Memory, largest
from smt_dist.memory.plan.depth import at_full_depth
from smt_dist.memory.plan.load import host_bytes_per_node, load_peak
from smt_dist.memory.plan.request import Request, text_config
from smt_dist.memory.plan.spread import Shape, even_counts, highest_layer, measure_shape, selection_of, worst_counts
from smt_dist.memory.plan.trace import EDGE, trace_training, trace_warmup
from smt_dist.memory.plan.zero import FP32, ZeroModel, ZeroSettings
from smt_dist.sparse.blocks import BlockSelection

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Phase:
    """Hold the planned peak of a part of a run.

    :mod:`smt_dist.memory.record` measures the same parts, under the same names (``load``, ``warmup``, ``training``).

    Attributes:
        moment: at which its peak is.
        peak: what is held then.
    """

    moment: str
    peak: Memory

    def to_json(self) -> dict[str, Any]:
        """Return the moment and the peak as plain values."""
        return {"moment": self.moment, "peak": self.peak.to_json()}


@dataclass(frozen=True)
class Plan:
    """Hold a rank's planned memory.

    Attributes:
        request: what was planned.
        parameters: the base's.
        trained: elements that are trained.
        lora_rank: for ``lora``.
        phases: ``load``, ``warmup`` (``smt`` without a selection), ``training``.
        worst: training with all blocks as low as they can lie; None where the blocks are known.
        host_bytes: of the fullest node.
    """

    request: Request
    parameters: int
    trained: int
    lora_rank: int | None
    phases: dict[str, Phase]
    worst: Phase | None
    host_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Return the largest peak of all phases, the blocks' worst case included."""
        return max(phase.peak.total for phase in [*self.phases.values(), *([self.worst] if self.worst else [])])

    @property
    def fits(self) -> bool | None:
        """Return whether the peak is within the device's memory; None if that isn't known."""
        return None if self.request.device_memory is None else self.peak_bytes <= self.request.device_memory

    def to_json(self) -> dict[str, Any]:
        """Return plain values; bytes are whole numbers."""
        request = self.request
        names = ("engine", "world_size", "method", "batch", "accumulation", "sequence", "dtype")
        names += ("ranks_per_node", "device_memory")
        return {
            "model_type": request.model.model_type,
            "layers": request.layers,
            "parameters": self.parameters,
            "trained": self.trained,
            "lora_rank": self.lora_rank,
            **{name: getattr(request, name) for name in names},
            "dp_replicate_size": request.replicas,
            "gradient_checkpointing": request.checkpointing,
            "blocks_from": None if request.method != "smt" else "selection" if request.selection else "even spread",
            "phases": {name: phase.to_json() for name, phase in self.phases.items()},
            "worst_case": self.worst.to_json() if self.worst else None,
            "peak_bytes": self.peak_bytes,
            "host_bytes_per_node": self.host_bytes,
            "fits": self.fits,
        }


def make_plan(request: Request, exact: bool = False, on_progress: OnProgress = lambda _: None) -> Plan:
    """Plan a run.

    Args:
        request: the run.
        exact: trace every layer instead of two small depths. A selection's layers differ, so they always are.
        on_progress: called with each phase that begins.

    Raises:
        SMTError: the model can't be traced, or blocks, targets and model don't fit together.
    """
    on_progress("shape")
    shape = measure_shape(request)
    exact = exact or not shape.uniform
    rank = lora_rank(shape) if request.method == "lora" else 0
    phases = {"load": Phase("reading the base", load_peak(request, shape))}
    worst = None
    if request.method == "smt" and request.selection is None:
        on_progress("warm-up")
        phases["warmup"] = _phase(_warmup(request, shape, exact))
    on_progress("training")
    if request.method != "smt":
        trained = shape.parameters if request.method == "full" else rank * _sides(shape)
        phases["training"] = _phase(_training(request, shape, {}, trained, exact, rank))
    elif request.selection is not None:
        trained = request.selection.parameters
        phases["training"] = _phase(_selected(request, shape, request.selection))
    else:
        trained = shape.blocks * shape.block_elements
        counts, _ = even_counts(shape)
        phases["training"] = _phase(_training(request, shape, counts, trained, exact))
        on_progress("worst case")
        worst = _phase(_worst(request, shape, trained, exact))
    return Plan(request, shape.parameters, trained, rank or None, phases, worst, host_bytes_per_node(request, shape))


def _phase(moments: Mapping[str, Memory]) -> Phase:
    return Phase(*largest(moments))


def _warmup(request: Request, shape: Shape, exact: bool) -> dict[str, Memory]:
    if request.smt.warmup.mode == "full_ft":
        full = replace(request, method="full", masters=False)
        moments = _training(full, shape, {}, shape.parameters, exact)
        targets = sum(len(grid) * grid.block_elements for grid in shape.grids.values())
        mean = request.score.startswith("mean_abs")
        kept = 8 * sum(map(len, shape.grids.values())) if mean else FP32 * targets // request.world_size
        return {name: memory.plus(statistics=kept) for name, memory in moments.items()}
    # The passes split the layers; how many lie in one isn't even in the depth.
    exact = exact or request.smt.warmup.passes > 1
    moments = at_full_depth(partial(trace_warmup, request), request.layers, exact=exact)
    if not request.engine.startswith("zero"):
        return moments
    zero = _zero(request, shape, [])
    base = zero.resident(training=False).base_weights
    return {name: memory.with_(base_weights=base) for name, memory in zero.with_gathered(moments).items()}


def _training(
    request: Request, shape: Shape, counts: Mapping[str, int], trained: int, exact: bool, rank: int = 0
) -> dict[str, Memory]:
    """Plan blocks in equal numbers in all layers, and add the remaining ones at the end."""

    def trace(layers: int) -> dict[str, Memory]:
        return trace_training(request, layers, selection_of(counts, shape.grids, layers), rank)

    if request.method == "smt" and not any(counts.values()):  # fewer blocks than modules
        return _worst(request, shape, trained, exact)
    moments = at_full_depth(trace, request.layers, exact=exact)
    if request.engine.startswith("zero"):
        return _with_zero(request, shape, trained, moments)
    left = trained - sum(counts.values()) * shape.block_elements if request.method == "smt" else 0
    return {name: _with_more_blocks(memory, request, left) for name, memory in moments.items()}


def _worst(request: Request, shape: Shape, trained: int, exact: bool) -> dict[str, Memory]:
    counts = worst_counts(shape)
    special = max(EDGE, highest_layer(counts) + 1)

    def trace(layers: int) -> dict[str, Memory]:
        return trace_training(request, layers, selection_of(counts, shape.grids, layers), special=special)

    moments = at_full_depth(trace, request.layers, special, exact)
    return _with_zero(request, shape, trained, moments) if request.engine.startswith("zero") else moments


def _selected(request: Request, shape: Shape, selection: BlockSelection) -> dict[str, Memory]:
    for name in selection.blocks:
        if name not in shape.grids:
            raise SMTError(f"--selection: {name} is no target of the smt config in this model")
    moments = trace_training(request, request.layers, selection, special=request.layers)
    if request.engine.startswith("zero"):
        return _with_zero(request, shape, selection.parameters, moments)
    return moments


def _with_more_blocks(memory: Memory, request: Request, elements: int) -> Memory:
    width, in_place = request.base_dtype.itemsize, request.form == "in_place"
    states = 12 if width < FP32 or in_place else 8  # in fp32 the masters are a part of additive blocks
    share = -(-elements // request.world_size)
    blocks = width * (elements + (share if in_place else 0))  # values, and this rank's share of W0
    return memory.plus(blocks=blocks, gradients=FP32 * elements, optimizer_state=states * share)


def _zero(request: Request, shape: Shape, trained: list[int]) -> ZeroModel:
    full = request.method == "full"
    settings = ZeroSettings.of(int(request.engine[-1]), request.zero)
    if request.method == "smt":  # as DeepSpeedEngine.make_optimizer tells DeepSpeed
        settings = replace(settings, reduce_bucket_size=min(settings.reduce_bucket_size, sum(trained)))
    frozen, width = [] if full else shape.sizes, request.base_dtype.itemsize
    logits = 0 if shape.chunked else request.batch * request.sequence * text_config(request.model).vocab_size
    copies = request.backend == "gloo"
    return ZeroModel(
        settings, request.world_size, width, frozen, trained, full, shape.largest_in_layers, logits, copies
    )


def _with_zero(request: Request, shape: Shape, trained: int, moments: dict[str, Memory]) -> dict[str, Memory]:
    """Replace what ZeRO partitions in a traced plan."""
    sizes = shape.sizes if request.method == "full" else [trained]
    return _zero(request, shape, sizes).moments(moments, request.base_dtype.itemsize)


def _sides(shape: Shape) -> int:
    """Return the trained elements of LoRA for each unit of rank."""
    return sum(grid.rows + grid.cols for grid in shape.grids.values())


def lora_rank(shape: Shape) -> int:
    """Return the LoRA rank with as many trained parameters as the budget's blocks."""
    return max(1, round(shape.blocks * shape.block_elements / _sides(shape)))
