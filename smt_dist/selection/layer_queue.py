"""Order gradients by layer, so that all ranks reduce them in the same order."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from smt_dist.distributed import all_reduce_sum, collective_device
from smt_dist.sparse.layer_names import layer_key


class LayerQueue:
    """Hold one layer's gradients and yield them in an order that is the same on all ranks.

    A rank whose tokens reach no expert of a layer gets no gradient there. If gradients were reduced as they arrive,
    this rank's collectives would pair with others of another module, and the job would hang or mix up modules. So
    whole layers are yielded from last to first, with None for a gradient that this rank didn't get.
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
        """Yield the layers above ``module``'s layer, which the backward has finished."""
        while self._current > self._layer_of[module]:
            yield from self._next_layer()

    def put(self, module: str, gradient: torch.Tensor) -> None:
        """Keep a gradient until its layer is yielded."""
        if module in self._pending:
            gradient = self._pending[module] + gradient
        self._pending[module] = gradient

    def drain(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield all remaining layers; repeat while any rank holds a gradient that came late."""
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
