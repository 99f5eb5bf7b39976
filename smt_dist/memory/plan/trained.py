"""Attach what each method trains to a fake model, and make its optimizer's step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from smt_dist.distributed import is_distributed
from smt_dist.engines.replicated import ReplicatedBlocks
from smt_dist.errors import SMTError, require_peft
from smt_dist.memory.plan.patches import modules_that_stay
from smt_dist.memory.plan.request import Request
from smt_dist.memory.plan.tracker import MemoryTracker
from smt_dist.selection.warmup import plan_grids
from smt_dist.sparse.block_gradients import ColumnGroup
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.sparse.linear import Place, SparseLinear
from smt_dist.sparse.surgery import apply_selection, sparse_layers
from smt_dist.training.trainer import block_parameter_groups

Step = Callable[[], None]


class Task(NamedTuple):
    """Hold what is needed to make a model ready for training.

    Attributes:
        model: the base, fake.
        tracker: is told what belongs to which category.
        request: the run.
        selection: the blocks, for ``smt``.
        rank: LoRA's.
    """

    model: nn.Module
    tracker: MemoryTracker
    request: Request
    selection: BlockSelection | None
    rank: int


def prepare(task: Task) -> Step:
    """Attach what the method trains; return the optimizer's step.

    The step is made once before, so that all of the state exists.
    """
    kinds = {"smt": _prepare_smt, "full": _prepare_full, "lora": _prepare_lora}
    return kinds[task.request.method](task)


def watch_gradients(model: nn.Module, tracker: MemoryTracker) -> None:
    """Register gradients before the optimizer's own hooks remove them."""
    for parameter in model.parameters():
        if parameter.requires_grad and not isinstance(parameter, torch.distributed.tensor.DTensor):
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.register(p.grad, "gradients"))


def _prepare_smt(task: Task) -> Step:
    model, tracker, request = task.model, task.tracker, task.request
    if task.selection is None:
        raise SMTError("the budget leaves no block in the traced layers; trace the full depth (--exact)")
    # The fingerprint would read the weights, which have no values.
    apply_selection(
        model,
        task.selection,
        dtype=request.base_dtype,
        fingerprint="fake",
        device=torch.device("cpu"),
        auto_form=request.form,
    )
    _join_columns(model)
    watch_gradients(model, tracker)  # these hooks must run before the optimizer's
    if request.engine.startswith("zero"):
        tracker.register([layer.delta for layer in sparse_layers(model).values()], "blocks")
        return _no_step
    groups = block_parameter_groups(model, 1e-4, 0.0)
    engine = ReplicatedBlocks(micro_batches=request.accumulation if request.engine == "fsdp2" else None)
    optimizer = engine.make_optimizer(groups, torch.optim.AdamW, {"fused": True}, model=model)
    tracker.register(optimizer.gradients.tensors(), "gradients")
    for layer in sparse_layers(model).values():  # sums that appear while the backward runs
        layer.delta.register_post_accumulate_grad_hook(
            lambda _: tracker.register(optimizer.gradients.tensors(), "gradients")
        )

    def step() -> None:
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()

    step()
    states = [list(state.values()) for state in optimizer.inner.state.values()]
    tracker.register([optimizer._masters, states], "optimizer_state")
    if optimizer._placed is not None:
        tracker.register(optimizer._placed.original, "blocks")
    tracker.register(optimizer._flat.values, "blocks")  # in fp32 the masters are a part of them
    for layer in list(sparse_layers(model).values()) * (request.accumulation - 1):  # what earlier micro-batches left
        layer.delta.grad = torch.zeros_like(layer.delta)
        optimizer.add_gradient(layer.delta)
    tracker.register(optimizer.gradients.tensors(), "gradients")
    return step


def _join_columns(model: nn.Module) -> None:
    """Stack the blocks that read one column of a weight, so that they count as one.

    They hold as much in as few operations as possible: a plan of 70B has thousands of blocks.
    """
    for layer in sparse_layers(model).values():
        if not isinstance(layer, SparseLinear):
            continue
        rows, places, groups, first = layer.grid.block_rows, [], [], 0
        heights = Counter(place.column for place in layer._layout.places)
        for column, height in sorted(heights.items()):
            part, outputs = slice(first * rows, (first + height) * rows), slice(0, height * rows)
            places.append(Place(column, outputs, part))
            groups.append(ColumnGroup(column, [outputs], [part]))
            first += height
        layer._layout = replace(layer._layout, places=places, groups=groups, dense_parts=[])


def _prepare_full(task: Task) -> Step:
    return _plain_adamw(list(task.model.requires_grad_(True).parameters()), task)


def attach_lora(model: nn.Module, request: Request, rank: int) -> None:
    """Attach PEFT's adapters to the targets of the SMT config, in place.

    Raises SMTError without PEFT.

    They are in fp32, PEFT's default; DeepSpeed would cast them, so under ZeRO they are in the base's dtype at once.
    """
    require_peft("--method lora")
    from peft import LoraConfig, get_peft_model

    groups, _ = plan_grids(model, request.smt)
    targets = [name for names in groups.values() for name in names]
    config = LoraConfig(r=rank, target_modules=targets, lora_dropout=0.0)
    get_peft_model(model, config, autocast_adapter_dtype=not request.engine.startswith("zero"))


def _prepare_lora(task: Task) -> Step:
    with modules_that_stay():  # adapters are made on this device
        attach_lora(task.model, task.request, task.rank)
    adapters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    task.tracker.register(adapters, "blocks")
    return _plain_adamw(adapters, task)


def _plain_adamw(parameters: list[nn.Parameter], task: Task) -> Step:
    watch_gradients(task.model, task.tracker)
    if task.request.engine.startswith("zero"):
        return _no_step
    if task.request.engine == "ddp" and is_distributed():
        # DDP's reducer doesn't run on fake tensors. Its buckets hold all gradients once more.
        task.model.smt_buckets = torch.empty(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
        task.tracker.register(task.model.smt_buckets, "communication")
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)  # Trainer's default

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, math.inf)
        optimizer.step()
        optimizer.zero_grad()

    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    step()
    task.tracker.register([list(state.values()) for state in optimizer.state.values()], "optimizer_state")
    if task.request.accumulation > 1:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        task.tracker.register([parameter.grad for parameter in parameters], "gradients")
    return step


def _no_step() -> None:
    """Do nothing: zero.py calculates ZeRO's optimizer."""
