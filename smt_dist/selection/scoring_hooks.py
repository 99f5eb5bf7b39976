"""Hook the targets' outputs to pass inputs and output gradients to the accumulator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smt_dist.selection.scores import ScoreAccumulator
from smt_dist.sparse.targets import is_embedding


@contextmanager
def scoring_hooks(model: nn.Module, accumulator: ScoreAccumulator, modules: Iterable[str]) -> Iterator[None]:
    """Feed ``accumulator`` from each forward and backward of ``modules`` inside the context."""
    # The anchor makes every scored output require a gradient, so no backward runs below the lowest target and no hook
    # on the embedding is needed.
    anchor = torch.zeros((), requires_grad=True)

    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not torch.is_grad_enabled():
                return None
            return _ScoreGradient.apply(output, _flat_input(module, args[0]), anchor, accumulator, name)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _flat_input(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the input as ``[tokens, in]``, or an embedding's ids ``[tokens]``, -1 at padding."""
    if not is_embedding(module):
        return x.reshape(-1, x.shape[-1])
    ids = x.reshape(-1)
    return ids if module.padding_idx is None else ids.masked_fill(ids == module.padding_idx, -1)


class _ScoreGradient(torch.autograd.Function):
    """Return a target's output unchanged; the backward adds its gradient to the accumulator."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        anchor: torch.Tensor,  # noqa: ARG004 (makes the output require a gradient)
        accumulator: ScoreAccumulator,
        name: str,
    ) -> torch.Tensor:
        ctx.accumulator, ctx.name = accumulator, name
        # Saved by autograd, not in a closure, so that gradient checkpointing can drop and recompute it.
        ctx.save_for_backward(accumulator.keep(name, x))
        # A copy: model code may write into a target's output, which autograd forbids on a view from here.
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        ctx.accumulator.add(ctx.name, grad_y.reshape(-1, grad_y.shape[-1]), kept)
        return grad_y, None, None, None, None
