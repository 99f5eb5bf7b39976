"""Keep in-place weights equal to the rounding of W0 + master, as the masters change."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from smt_dist.distributed import is_distributed
from smt_dist.engines.flat import FlatParameters
from smt_dist.errors import SMTError
from smt_dist.sparse.blocks import merged_blocks
from smt_dist.sparse.in_place import InPlaceLayer
from smt_dist.sparse.sharded import fsdp2_units

SECONDS = 60  # in which all ranks must come, to read W0


class ReadsMasters(Protocol):
    """Define what is needed of the optimizer."""

    def read_master(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a parameter's whole fp32 master on the CPU; collective."""


class PlacedValues:
    """Hold this rank's share of W0, and write all values into its part of the weights.

    Args:
        flat: the parameters; the values of those of in-place layers become weights, no longer deltas.
        layers: parameter -> in-place layer. Their parameters only carry gradients from here on: they read as NaN.
        model: that has the layers. Before it computes it writes again what an exception has kept from being written.
        optimizer: holds the masters.

    Attributes:
        original: W0 of this rank's share of the flat buffer, in its dtype; zeros where blocks are additive.
        is_whole: False between the beginning of a write and its end.
    """

    def __init__(
        self,
        flat: FlatParameters,
        layers: Mapping[nn.Parameter, InPlaceLayer],
        model: nn.Module,
        optimizer: ReadsMasters,
    ) -> None:
        self._flat, self._layers, self._units = flat, dict(layers), fsdp2_units(model)
        self._optimizer = weakref.ref(optimizer)
        self.original = torch.zeros(len(flat.own), dtype=flat.values.dtype, device=flat.values.device)
        self.is_whole = True
        self._are_gathered = True
        for parameter, layer in self._layers.items():
            self._take_over(parameter, layer)
        _finish_before_forward(model, self)

    def _take_over(self, parameter: nn.Parameter, layer: InPlaceLayer) -> None:
        original = layer.read_original()
        place = self._flat.ranges[parameter]
        part = place.within(self._flat.own)
        part.of(self.original, self._flat.own.start).copy_(part.of(original.reshape(-1), place.start))
        values = place.of(self._flat.values).view(parameter.shape)
        values.copy_(merged_blocks(original, parameter.detach()))
        layer.original, layer.values, layer.holder = None, values, self
        # NaN, so that weights are never read as deltas; expanded, so that it takes no memory.
        self._flat.bind(parameter, parameter.new_full((1,), math.nan).expand(parameter.shape))

    def begin(self) -> None:
        """Mark the values as incomplete."""
        self.is_whole = self._are_gathered = False

    @torch.no_grad()
    def write(self) -> None:
        """Write all values into this rank's part of every weight; not collective."""
        self._are_gathered = True
        for unit in self._units:
            unit.reshard()  # outermost units stay gathered after a forward without a backward
        for layer in self._layers.values():
            layer.write(layer.values)
        self.is_whole = True

    def finish(self) -> None:
        """Write again what an exception has kept from being written; not collective.

        Raises:
            RuntimeError: the values never came: a step ended between its update and its all-gather.
        """
        if self.is_whole:
            return
        if not self._are_gathered:
            raise RuntimeError("an optimizer step was interrupted before its values were shared: resume a checkpoint")
        self.write()

    def meet(self) -> None:
        """Wait for all ranks, at most a minute; collective.

        Raises:
            SMTError: not all ranks came.
        """
        if is_distributed():
            try:
                dist.barrier(async_op=True).wait(timedelta(seconds=SECONDS))
            except RuntimeError as error:
                raise SMTError(
                    f"not all ranks came within {SECONDS} s to read the base's blocks: enter "
                    "smt_dist.blocks_disabled on every rank"
                ) from error

    def read_original(self, layer: InPlaceLayer) -> torch.Tensor:
        """Return a layer's whole W0; collective."""
        whole = self.original.new_empty(layer.delta.numel())
        return self._flat.collect(layer.delta, self.original, self._flat.own.start, whole)

    def read_delta(self, layer: InPlaceLayer) -> torch.Tensor:
        """Return a layer's whole fp32 deltas; collective.

        Without the optimizer: those that give its values.
        """
        optimizer = self._optimizer()
        if optimizer is not None:
            return optimizer.read_master(layer.delta)
        return (layer.values.float() - self.read_original(layer).float()).cpu()

    def damaged_layer(self) -> InPlaceLayer | None:
        """Return the first layer whose weight on this rank lacks its values; not collective."""
        layers = list(self._layers.values())
        differs = torch.stack([layer.rows.differs(layer.weight, layer.values) for layer in layers])
        return next((layer for layer, wrong in zip(layers, differs.tolist(), strict=True) if wrong), None)


def _finish_before_forward(model: nn.Module, placed: PlacedValues) -> None:
    """Finish an interrupted write before the model gathers its units.

    This ends when ``placed`` is gone.
    """
    reference = weakref.ref(placed)

    def finish(*_: object) -> None:
        owner = reference()
        if owner is None:
            hook.remove()
        else:
            owner.finish()

    hook = model.register_forward_pre_hook(finish, prepend=True)


def in_place_layers(model: nn.Module | None, parameters: list[nn.Parameter]) -> dict[nn.Parameter, InPlaceLayer]:
    """Map each of ``parameters`` to its in-place layer of the model, where it has one."""
    modules = model.modules() if model is not None else ()
    layers = {module.delta: module for module in modules if isinstance(module, InPlaceLayer)}
    return {parameter: layers[parameter] for parameter in parameters if parameter in layers}
