"""Choose where blocks lie: as selected, evenly, or as bad for memory as a budget allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from smt_dist.errors import SMTError
from smt_dist.memory.plan.base import chunk_base_loss
from smt_dist.memory.plan.fake import decoder_layers
from smt_dist.memory.plan.request import Request, text_config
from smt_dist.selection.select import even_level
from smt_dist.selection.warmup import plan_grids
from smt_dist.sparse.blocks import BlockGrid, BlockSelection
from smt_dist.sparse.layer_names import layer_key
from smt_dist.sparse.targets import count_parameters_2d


@dataclass(frozen=True)
class Shape:
    """Hold what a plan needs of the whole model.

    Attributes:
        parameters: elements, tied ones once.
        sizes: elements of each parameter.
        largest: elements of the largest one.
        largest_in_layers: elements of the largest one of a layer.
        grids: target module -> grid, in the model's order.
        groups: config group, or all of them if their budget is joint -> its target modules.
        budgets: the same -> blocks.
        uniform: all layers are alike, so that two small depths tell the others.
        chunked: the loss is worked out over chunks of the vocabulary.
    """

    parameters: int
    sizes: list[int]
    largest: int
    largest_in_layers: int
    grids: dict[str, BlockGrid]
    groups: dict[str, list[str]]
    budgets: dict[str, int]
    uniform: bool
    chunked: bool

    @property
    def blocks(self) -> int:
        """Return all groups' budgets together."""
        return sum(self.budgets.values())

    @property
    def block_elements(self) -> int:
        """Return the elements of one block."""
        return next(iter(self.grids.values())).block_elements


def measure_shape(request: Request) -> Shape:
    """Measure the whole model on fake tensors.

    Raises SMTError as finding targets and budgets does.
    """
    with FakeTensorMode():
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(request.model)]
        model = kind._from_config(request.at_depth(request.layers), dtype=torch.bfloat16)
        groups, grids = plan_grids(model, request.smt)
        sizes = [parameter.numel() for parameter in model.parameters()]
        parameters_2d = count_parameters_2d(model)
        uniform = _is_uniform(model, request)
        layers = decoder_layers(model, request.layers)
        chunked = chunk_base_loss(model, request)
        in_layers = max(parameter.numel() for layer in layers for parameter in layer.parameters())
    elements = next(iter(grids.values())).block_elements
    budgets = {group.name: group.budget(parameters_2d, elements) for group in request.smt.groups}
    if request.smt.selection.budget == "joint":
        together = " + ".join(groups)
        groups, budgets = {together: list(grids)}, {together: sum(budgets.values())}
    for name, budget in budgets.items():
        available = sum(len(grids[module]) for module in groups[name])
        if budget > available:
            raise SMTError(f"smt config groups[{name}]: {budget} blocks are asked for, its targets have {available}")
    return Shape(sum(sizes), sizes, max(sizes), in_layers, grids, groups, budgets, uniform, chunked)


def _is_uniform(model: nn.Module, request: Request) -> bool:
    kinds = getattr(text_config(request.model), "layer_types", None) or []
    shapes = [[tuple(p.shape) for p in layer.parameters()] for layer in decoder_layers(model, request.layers)]
    return len(set(kinds)) <= 1 and all(shape == shapes[0] for shape in shapes)


def layer_of(module: str) -> int | None:
    """Return ``3`` for ``model.layers.3.self_attn.q_proj``; None outside the layers."""
    number = layer_key(module).rpartition(".")[2]
    return int(number) if number.isdigit() else None


def even_counts(shape: Shape) -> tuple[dict[str, int], int]:
    """Return module -> blocks, equal for equal modules, and the remaining number of blocks.

    Fewer remain than there are modules.
    """
    counts: dict[str, int] = {}
    left = 0
    for name, modules in shape.groups.items():
        available = {module: len(shape.grids[module]) for module in modules}
        level = even_level(available, shape.budgets[name])
        own = {module: min(blocks, level) for module, blocks in available.items()}
        left += shape.budgets[name] - sum(own.values())
        counts |= own
    return counts, left


def worst_counts(shape: Shape) -> dict[str, int]:
    """Place all blocks as low as possible: in whole layers from the bottom.

    The backward then goes through every layer, and the lowest layers save all of their inputs' columns.
    """
    counts: dict[str, int] = {}
    for name, modules in shape.groups.items():
        left = shape.budgets[name]
        for module in modules:
            take = min(left, len(shape.grids[module]))
            if take:
                counts[module] = take
            left -= take
    return counts


def selection_of(counts: Mapping[str, int], grids: Mapping[str, BlockGrid], layers: int) -> BlockSelection | None:
    """Select blocks in a model of ``layers``, filling block rows in order; None without blocks."""
    chosen = {name: count for name, count in counts.items() if count and (layer_of(name) or 0) < layers}
    if not chosen:
        return None
    grid = next(iter(grids.values()))
    blocks = {name: [divmod(index, grids[name].shape[1]) for index in range(count)] for name, count in chosen.items()}
    return BlockSelection(block_size=(grid.block_rows, grid.block_cols), blocks=blocks)


def highest_layer(modules: Iterable[str]) -> int:
    """Return the highest layer's number among modules; -1 if all lie outside the layers."""
    return max((layer for layer in map(layer_of, modules) if layer is not None), default=-1)
