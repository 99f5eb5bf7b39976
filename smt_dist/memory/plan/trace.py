"""Trace one phase of a rank on fake tensors: moment -> memory at its peak."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from smt_dist.distributed import get_world_size, is_distributed
from smt_dist.errors import SMTError, first_line
from smt_dist.memory.plan.categories import Memory
from smt_dist.memory.plan.fake import decoder_layers, fake_batch, fake_model
from smt_dist.memory.plan.patches import unpacked_rows
from smt_dist.memory.plan.request import Request
from smt_dist.memory.plan.tracker import BACKWARD, FORWARD, RECOMPUTE, MemoryTracker
from smt_dist.memory.plan.trained import Task, prepare
from smt_dist.memory.plan.zero_linear import linear_of
from smt_dist.selection.scores import ElementwiseAccumulator, make_accumulator
from smt_dist.selection.scoring_hooks import scoring_hooks
from smt_dist.selection.steps import frozen
from smt_dist.selection.warmup import _split_layers, plan_grids
from smt_dist.sparse.blocks import BlockGrid, BlockSelection

# The lowest and highest layers are different moments; between them peaks grow evenly.
EDGE = 2
_IGNORED = "ignored"


def trace_training(
    request: Request, layers: int, selection: BlockSelection | None, rank: int = 0, special: int = EDGE
) -> dict[str, Memory]:
    """Trace a training step with all of the optimizer's state.

    Under ZeRO only what the model itself holds is traced: weights, blocks and gradients count as on one plain rank.

    Args:
        request: the run.
        layers: depth to trace.
        selection: the blocks, for ``smt``.
        rank: LoRA's.
        special: lowest layers, each of which is a moment of its own.

    Returns:
        Moment -> the peak inside it.
    """
    with _traced(request, layers) as (model, tracker):
        optimize = prepare(Task(model, tracker, request, selection, rank))
        watch_layers(model, tracker, layers, special)
        _forward_backward(model, tracker, request)
        tracker.register([p.grad for p in model.parameters() if p.grad is not None], "gradients")
        tracker.moment("step")
        optimize()
        tracker.moment(_IGNORED)
        return _without_ignored(tracker)


def trace_warmup(request: Request, layers: int) -> dict[str, Memory]:
    """Trace a step of scoring, with all that the accumulators ever hold, and the tables."""
    with _traced(request, layers) as (model, tracker):
        _, grids = plan_grids(model, request.smt)
        part = _split_layers(grids, request.smt.warmup.passes)[-1]
        accumulator = make_accumulator(request.score, part, torch.device("cpu"))
        # Set: it doesn't look for infinities, which fake tensors don't have.
        accumulator._non_finite = ""
        _fill(accumulator, part, request)
        tracker.register(tensors_of(accumulator), "statistics")
        watch_layers(model, tracker, layers)
        with frozen(model), scoring_hooks(model, accumulator, part):
            _forward_backward(model, tracker, request)
            tracker.moment("statistics")
            _end_micro_batch(accumulator)
            accumulator._step_count += 1
            tracker.moment("tables")
            accumulator.tables()
        tracker.moment(_IGNORED)
        return _without_ignored(tracker)


@contextmanager
def _traced(request: Request, layers: int) -> Iterator[tuple[PreTrainedModel, MemoryTracker]]:
    tracker = MemoryTracker(copies=request.backend == "gloo")
    try:
        with linear_of(request.engine), fake_model(request, layers) as model, tracker:
            tracker.moment(_IGNORED)
            tracker.register([list(model.parameters()), list(model.buffers())], "base_weights")
            yield model, tracker
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if isinstance(error, SMTError):
            raise
        raise SMTError(f"{type(request.model).__name__}: this model can't be traced ({first_line(error)})") from error


def _without_ignored(tracker: MemoryTracker) -> dict[str, Memory]:
    return {name: memory for name, memory in tracker.peaks().items() if name != _IGNORED}


# -- a step ----------------------------------------------------------------------------------------------------------


def _forward_backward(model: nn.Module, tracker: MemoryTracker, request: Request) -> None:
    batch = fake_batch(request)
    # Full fine-tuning of fp32 weights computes in bf16: FSDP2 casts what it gathers, elsewhere autocast does it.
    mixed = request.base_dtype == torch.float32 and request.dtype == "bfloat16" and request.shards == 1
    tracker.moment("forward embedding")
    with unpacked_rows(), tracker.in_pass(FORWARD), torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
        loss = model(**batch, use_cache=False, num_items_in_batch=batch["labels"].numel()).loss
    tracker.moment("backward head")
    with tracker.in_pass(BACKWARD):
        loss.backward()


def watch_layers(model: nn.Module, tracker: MemoryTracker, layers: int, special: int = EDGE) -> list[RemovableHandle]:
    """Name the moments by layer, and tell recomputation from backward; the handles end it."""
    handles = []
    for index, layer in enumerate(decoder_layers(model, layers)):
        handles += _watch_layer(layer, tracker, _place(index, layers, special), last=index == layers - 1)
    return handles


def _place(index: int, layers: int, special: int) -> str:
    if index < special:
        return f"layer {index}"
    return f"layer -{layers - index}" if index >= layers - EDGE else "layers between"


def _watch_layer(layer: nn.Module, tracker: MemoryTracker, place: str, last: bool) -> list[RemovableHandle]:
    recomputing: list[ExitStack] = []

    def before(*_: Any) -> None:
        if tracker.current_pass == BACKWARD:
            recomputing.append(ExitStack())
            recomputing[-1].enter_context(tracker.in_pass(RECOMPUTE))
        else:
            tracker.moment(f"forward {place}")

    def after(_layer: nn.Module, _args: Any, output: Any) -> None:
        if recomputing:  # a recomputation that has all it needs stops early, by an exception
            recomputing.pop().close()
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: tracker.moment(f"backward {place}"))
        if last:
            tracker.moment("forward head")

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)]


# -- the warm-up's accumulators --------------------------------------------------------------------------------------


def _fill(accumulator: Any, grids: Mapping[str, BlockGrid], request: Request) -> None:
    """Make what earlier steps left: this rank's rows of each gradient."""
    starts_empty = request.score.endswith("_per_step") and request.accumulation == 1
    if isinstance(accumulator, ElementwiseAccumulator) and not starts_empty:
        ranks = get_world_size()
        for name, grid in grids.items():
            accumulator._add_shard(name, torch.zeros(-(-grid.rows // ranks), grid.cols))


def _end_micro_batch(accumulator: Any) -> None:
    """End a micro-batch as the accumulator does.

    Without the last question whether any rank has more, which reads a value.
    """
    if isinstance(accumulator, ElementwiseAccumulator) and is_distributed():
        queue = accumulator._queue
        while queue._current >= 0:
            for module, gradient in queue._next_layer():
                accumulator._reduce(module, gradient)
        queue._current = len(queue._layers) - 1
        dist.all_reduce(torch.zeros(1))
    else:
        accumulator.end_micro_batch()


def tensors_of(accumulator: Any) -> list[torch.Tensor]:
    """Return what a score accumulator keeps between backwards."""
    tables = [accumulator._sums, getattr(accumulator, "_steps", None), getattr(accumulator, "_step_sums", None)]
    return [*(table.flat for table in tables if table is not None), *getattr(accumulator, "_shards", {}).values()]
