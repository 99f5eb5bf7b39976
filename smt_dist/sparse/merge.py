"""Merge blocks into the base's weights in memory, and undo it.

On disk: ``merge_files.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from smt_dist.errors import SMTError
from smt_dist.sparse.blocks import merged_blocks, read_blocks, write_blocks
from smt_dist.sparse.frozen import FrozenBlocks
from smt_dist.sparse.layer import SparseLayer, bare, layers_of
from smt_dist.sparse.surgery import sparse_layers
from smt_dist.sparse.targets import base_modules, tied_parameter_names

# Where a merged base keeps what `unmerge_blocks` needs: in `__dict__`, so that no submodule is registered.
_UNDO = "_smt_undo"


class _Undo(NamedTuple):
    layer: SparseLayer
    weight: nn.Parameter  # the parameter before the merge: another one after it, if it was tied
    blocks: list[tuple[SparseLayer, torch.Tensor]]  # additive layers, outermost first, and the weight's blocks before


def merge_blocks(model: nn.Module) -> None:
    """Add the blocks into the base's weights, in place; the model is an ordinary one afterwards.

    ``model.save_pretrained`` then writes an ordinary checkpoint. :func:`unmerge_blocks` undoes it bit for bit.

    Raises:
        SMTError: the model has no blocks, or a weight is sharded or quantised (merge the saved adapter with
            ``smt-merge``). The model is unchanged then.
    """
    layers = {name: module for name, module in base_modules(model) if isinstance(module, SparseLayer)}
    if not layers:
        raise SMTError("the model has no blocks to merge")
    for name, layer in layers.items():
        _refuse_unmergeable(name, layer)
    for module in model.modules():
        module.__dict__.pop(_UNDO, None)  # of an earlier merge, which is part of the base from here on
    for name, layer in layers.items():
        base, original = bare(layer), layer.weight
        layer.write_out()
        parts = [part for part in layers_of(layer) if not part.is_in_place]
        before = [(part, read_blocks(original, part.grid, part.blocks)) for part in parts]
        if tied_parameter_names(model, name):
            base.weight = nn.Parameter(original.detach().clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
        for part, blocks in before:
            delta = part.master if isinstance(part, FrozenBlocks) else part.delta.detach()
            write_blocks(base.weight, part.grid, part.blocks, merged_blocks(blocks, delta))
        base.__dict__[_UNDO] = _Undo(layer, original, before)
        model.set_submodule(name, base)


def unmerge_blocks(model: nn.Module) -> None:
    """Undo :func:`merge_blocks`: the blocks are separate again.

    Weights with additive blocks get their own bits back; weights with in-place blocks hold their values.

    Raises:
        SMTError: nothing was merged, or the model got other blocks since.
    """
    if sparse_layers(model):
        raise SMTError("the model has blocks that aren't merged; remove them with smt_dist.remove_blocks(model) first")
    merged = {name: module for name, module in model.named_modules() if _UNDO in module.__dict__}
    if not merged:
        raise SMTError("the model has no merged blocks")
    for name, base in merged.items():
        undo: _Undo = base.__dict__.pop(_UNDO)
        if base.weight is not undo.weight:
            base.weight = undo.weight
            model.config.tie_word_embeddings = True
        else:
            for part, blocks in undo.blocks:
                write_blocks(base.weight, part.grid, part.blocks, blocks)
        model.set_submodule(name, undo.layer)


def _refuse_unmergeable(name: str, layer: SparseLayer) -> None:
    weight = layer.weight
    sharded = hasattr(weight, "ds_id") or hasattr(weight, "full_tensor")
    if sharded or not weight.is_floating_point():
        kind = "sharded" if sharded else f"quantised ({weight.dtype})"
        raise SMTError(f"{name}: its weight is {kind}; save the adapter and use smt-merge")
