"""Identify a base by the content of the blocks that an adapter was trained on."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from smt_dist.sparse.blocks import BlockSelection, read_blocks
from smt_dist.sparse.in_place import InPlaceLayer
from smt_dist.sparse.layer import layers_of
from smt_dist.sparse.sharded import gathered
from smt_dist.sparse.targets import base_modules, weight_shape


def base_fingerprint(model: nn.Module, selection: BlockSelection) -> str:
    """Identify a base by the content of an adapter's blocks (:class:`Fingerprint`).

    Collective where the base is sharded.
    """
    fingerprint = Fingerprint(selection)
    modules = dict(base_modules(model))
    for name in selection.blocks:
        module = modules[name]
        with gathered(module.weight) as weight:
            fingerprint.add(name, _original(module, weight), weight_shape(module))
    return fingerprint.hexdigest()


def _original(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Return the base's weight, without the values of in-place blocks.

    Collective where an optimizer holds W0.
    """
    written = [layer for layer in layers_of(module) if isinstance(layer, InPlaceLayer) and layer.is_written]
    if written:
        weight = weight.detach().clone()
    for layer in written:
        layer.rows.write(weight, layer.read_original())
    return weight


class Fingerprint:
    """Hash a base's selected blocks with SHA-256.

    They are rounded to bf16, so that the dtype they were loaded in doesn't matter.
    """

    def __init__(self, selection: BlockSelection) -> None:
        self._selection = selection
        self._digest = hashlib.sha256()

    def add(self, name: str, weight: torch.Tensor, shape: tuple[int, int]) -> None:
        """Count one module's weight of ``shape`` (out, in); modules come in the selection's order."""
        grid = self._selection.grid(name, shape)
        self._digest.update(f"{name} {grid}".encode())
        if weight.shape == shape and weight.is_floating_point():
            content = read_blocks(weight, grid, self._selection.blocks[name]).to("cpu", torch.bfloat16)
        else:  # packed by a quantiser: its own bytes
            content = weight.detach().cpu().contiguous()
        self._digest.update(content.view(torch.uint8).numpy().tobytes())

    def hexdigest(self) -> str:
        """Return the fingerprint."""
        return self._digest.hexdigest()
