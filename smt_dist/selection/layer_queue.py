"""Gradients handed out layer by layer in an order that all ranks share."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from smt_dist.distributed import all_reduce_sum, collective_device
from smt_dist.sparse.layer_names import layer_key


class LayerQueue:
    """Holds one layer's gradients and hands them out in an order that all ranks share.

    A rank whose tokens reach no expert of a layer gets no gradient there; were gradients reduced as they come,
    its collectives would pair with others' and the job would hang or mix up modules. So layers are handed out
    from last to first, whole, with None for what this rank didn't get.
    """

    def __init__(self, modules: list[str]) -> None:
        self._layers: list[list[str]] = []
        self._layer_of: dict[str, int] = {}
        for module in modules:
            if not self._layers or layer_key(self._layers[-1][0]) != layer_key(module):
                self._layers.append([])
            self._layers[-1].append(module)
            self._layer_of[module] = len(self._layers) - 1
        self._current = len(self._layers) - 1
        self._pending: dict[str, torch.Tensor] = {}

    def move_to(self, module: str) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield the layers above ``module``'s, which this backward has left."""
        while self._current > self._layer_of[module]:
            yield from self._next_layer()

    def put(self, module: str, gradient: torch.Tensor) -> None:
        """Keep a gradient until its layer is handed out."""
        if module in self._pending:
            gradient = self._pending[module] + gradient
        self._pending[module] = gradient

    def drain(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield all layers that are left. Repeats while any rank holds a gradient that came out of order."""
        while True:
            while self._current >= 0:
                yield from self._next_layer()
            self._current = len(self._layers) - 1
            late = torch.tensor([float(len(self._pending))])
            if not all_reduce_sum(late.to(collective_device())).item():
                return

    def _next_layer(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name in self._layers[self._current]:
            yield name, self._pending.pop(name, None)
        self._current -= 1
