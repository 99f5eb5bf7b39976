"""Put blocks into a model, switch them off, and remove them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from smt_dist.config import SMTConfig
from smt_dist.errors import SMTError
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.sparse.fingerprint import base_fingerprint
from smt_dist.sparse.forms import Form, layer_kind
from smt_dist.sparse.frozen import FROZEN_KINDS, FrozenBlocks
from smt_dist.sparse.in_place import InPlaceLayer
from smt_dist.sparse.layer import SparseLayer, bare, layers_of
from smt_dist.sparse.sharded import full_numel, reshard
from smt_dist.sparse.shared_inputs import choose_kept_inputs
from smt_dist.sparse.state import SparseState
from smt_dist.sparse.targets import (
    base_modules,
    takes_blocks,
    tied_parameter_names,
    weight_shape,
    why_no_blocks,
)


def apply_selection(
    model: nn.Module,
    selection: BlockSelection,
    config: SMTConfig | None = None,
    dtype: torch.dtype = torch.float32,
    untie: bool = False,
    fingerprint: str | None = None,
    device: torch.device | None = None,
    auto_form: Form = "additive",
) -> None:
    """Wrap each selected module in a :class:`SparseLayer` and freeze everything but the blocks.

    Args:
        model: any model; its weights may be partitioned by ZeRO-3 or sharded by FSDP2.
        selection: chosen by :func:`select_blocks`, read from a file or built by hand.
        config: recorded in the adapters that are saved from this model.
        dtype: of the blocks. fp32 makes each block its own master; engines with masters of their own
            (DeepSpeed in bf16) take the base's dtype.
        untie: allow tied targets (also ``config.untie``); the tie is cut at the merge.
        fingerprint: the base's; empty or None: worked out, which gathers every selected weight of a sharded base.
        device: of the blocks; default: each base weight's, which is wrong where the base is offloaded.
        auto_form: what the config's form ``"auto"`` means wherever a weight allows it. ``in_place`` needs
            :class:`~smt_dist.engines.sharded_optimizer.ShardedBlockOptimizer`, or :func:`write_values` after each step.

    Raises:
        SMTError: a module is missing, neither linear nor an embedding, tied, or of another shape; or the model has
            blocks already. The model is unchanged then.
    """
    if sparse_layers(model):
        raise SMTError("the model has blocks already; remove them with smt_dist.remove_blocks(model) first")
    if config is not None:
        _refuse_other_config(selection, config)
    forms = (config.form if config is not None else "auto", auto_form)
    layers = _build_layers(model, selection, dtype, device, untie or (config is not None and config.untie), forms)
    fingerprint = fingerprint or base_fingerprint(model, selection)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    model.smt = SparseState(selection, config, fingerprint)


def _build_layers(
    model: nn.Module,
    selection: BlockSelection,
    dtype: torch.dtype,
    device: torch.device | None,
    untie: bool,
    forms: tuple[str, Form],
) -> dict[str, SparseLayer]:
    modules = dict(base_modules(model))
    layers = {}
    for name, blocks in selection.blocks.items():
        if name not in modules:
            raise SMTError(f"selection: the model ({type(model).__name__}) has no module {name}")
        module = modules[name]
        if not takes_blocks(module):
            raise SMTError(f"selection: {name} {why_no_blocks(module)}")
        grid = selection.grid(name, weight_shape(module))
        if not untie and (others := tied_parameter_names(model, name)):
            raise SMTError(f"selection: {name} is tied to {others[0]}; pass untie=True to cut the tie at the merge")
        kind = layer_kind(model, name, *forms)
        layers[name] = kind(module, grid, blocks, dtype, device or module.weight.device)
        layers[name].train(module.training)
    choose_kept_inputs(layers)
    return layers


def _refuse_other_config(selection: BlockSelection, config: SMTConfig) -> None:
    """Refuse a selection of other groups or blocks than the config's.

    Its multipliers would be lost, and its adapter would hold the wrong config.
    """
    unknown = set(selection.groups.values()) - {group.name for group in config.groups}
    if unknown:
        raise SMTError(f"selection: its group {min(unknown)!r} is not in the smt config's groups")
    size = config.block_size
    given = (size, size) if isinstance(size, int) else size
    if size != "auto" and tuple(given) != selection.block_size:
        raise SMTError(f"selection: its blocks are {selection.block_size}, the smt config's block_size is {size}")


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Return module name -> layer with trainable blocks, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseLayer) and not isinstance(module, FrozenBlocks)
    }


def frozen_layers(model: nn.Module) -> dict[str, FrozenBlocks]:
    """Return module name -> layer with frozen blocks, in the model's order.

    It may lie below one with trainable blocks.
    """
    return {
        name: layer
        for name, module in base_modules(model)
        for layer in layers_of(module)
        if isinstance(layer, FrozenBlocks)
    }


def group_multipliers(model: nn.Module) -> list[float]:
    """Return the learning-rate multipliers of all modules with blocks, each once, ascending.

    There is one parameter group for each.
    """
    return sorted({model.smt.multiplier_of(name) for name in sparse_layers(model)})


def ever_trained_selection(model: nn.Module) -> BlockSelection:
    """Return all blocks that differ from the base.

    These are the trainable ones, and those that re-selection has frozen.
    """
    active, frozen = model.smt.selection, frozen_layers(model)
    if not frozen:
        return active
    order = [name for name, module in base_modules(model) if isinstance(module, SparseLayer)]
    blocks = {
        name: sorted([*active.blocks.get(name, ()), *(frozen[name].blocks if name in frozen else ())]) for name in order
    }
    shapes = {name: (model.get_submodule(name).grid.rows, model.get_submodule(name).grid.cols) for name in order}
    groups = {**model.smt.frozen_groups, **active.groups}
    return BlockSelection(
        block_size=active.block_size,
        blocks=blocks,
        shapes=shapes,
        groups={name: groups[name] for name in order if name in groups},
    )


def add_frozen_blocks(
    model: nn.Module,
    selection: BlockSelection,
    masters: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device | None = None,
    forms: tuple[str, Form] = ("auto", "additive"),
) -> None:
    """Put frozen blocks into ``model``, before :func:`apply_selection`.

    Args:
        model: without blocks.
        selection: the blocks.
        masters: module -> fp32 values ``[blocks * block_rows, block_cols]``.
        dtype: of the values that compute.
        device: of those values; default: each base weight's.
        forms: the config's ``form``, and what its ``"auto"`` means.
    """
    for name, blocks in selection.blocks.items():
        base = model.get_submodule(name)
        grid = selection.grid(name, weight_shape(base))
        layer = FROZEN_KINDS[layer_kind(model, name, *forms)](base, grid, blocks, dtype, device or base.weight.device)
        layer.freeze(masters[name])
        layer.train(base.training)
        model.set_submodule(name, layer)


@contextmanager
def blocks_disabled(model: nn.Module) -> Iterator[None]:
    """Compute the base model's outputs inside the context; no weight is written.

    Entering it is collective where an optimizer holds the base's blocks: in-place layers under ``ddp`` and ``fsdp2``.
    Raises SMTError where not all ranks come within a minute.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLayer)]
    holders = (layer.holder for layer in layers if isinstance(layer, InPlaceLayer) and layer.holder is not None)
    if (holder := next(holders, None)) is not None:
        holder.meet()  # a rank that is alone in here would wait for the others until their collectives time out
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.disabled())
        yield


def write_values(model: nn.Module) -> None:
    """Write in-place layers' values into their weights, after a step of your own optimizer.

    :class:`~smt_dist.engines.sharded_optimizer.ShardedBlockOptimizer` does so itself. Collective the first time, where
    the base is sharded.

    Raises:
        SMTError: the model has no in-place layers, or a sharded optimizer writes them.
    """
    layers = [layer for layer in sparse_layers(model).values() if isinstance(layer, InPlaceLayer)]
    if not layers:
        raise SMTError('the model has no blocks inside its weights ("form": "in_place"); there is nothing to write')
    reshard(model)  # a weight that is gathered would keep its old values
    for layer in layers:
        layer.write_values()


def remove_blocks(model: nn.Module) -> None:
    """Put the base modules back, in place; the blocks are dropped. Parameters stay frozen."""
    layers = {name: module for name, module in base_modules(model) if isinstance(module, SparseLayer)}
    for name, layer in layers.items():
        for part in layers_of(layer):
            part.restore()
        model.set_submodule(name, bare(layer))
    if hasattr(model, "smt"):
        del model.smt


def describe_blocks(model: nn.Module) -> str:
    """Describe in one line what is trained: blocks, parameters, share of the model."""
    layers = sparse_layers(model)
    trained = sum(full_numel(layer.delta) for layer in layers.values())
    base = sum(full_numel(p) for name, p in model.named_parameters() if not name.endswith(".delta"))
    count = sum(len(layer.blocks) for layer in layers.values())
    return (
        f"{count} blocks in {len(layers)} modules, {trained:,} trainable parameters = "
        f"{trained / base:.2%} of the model's {base:,}"
    )
