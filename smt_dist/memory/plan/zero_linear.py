"""Trace ``F.linear`` as ZeRO-3 replaces it.

It keeps each input, even where the weight is frozen.

Read in DeepSpeed 0.19.8 (``runtime/zero/linear.py``, ``memory_efficient_linear``, on by default). torch's own keeps an
input only for the weight's gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from smt_dist.memory.plan.patches import linear_function


def linear_of(engine: str) -> AbstractContextManager[None]:
    """Replace ``torch.nn.functional.linear`` by the engine's inside the context."""
    return linear_function(_linear) if engine == "zero3" else nullcontext()


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    """Compute the gradients of a linear layer from its saved input and weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        y = x.matmul(weight.t())
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad_y.reshape(-1, grad_y.shape[-1])
        return (
            grad_y.matmul(weight) if needs_x else None,
            rows.t().matmul(x.reshape(-1, x.shape[-1])) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
