"""Score functions such as a user may write, right and wrong ones."""

from __future__ import annotations

import torch

not_a_function = 3


def by_name(module, grid):
    """Needs no data: the deeper the layer, the better."""
    return torch.full(grid.shape, float(module.split(".")[1]) if "." in module else -1.0)


def inputs_only(input_rms, grid):
    """Needs forwards only."""
    return [[float(columns.mean()) for columns in input_rms.split(grid.block_cols)]] * grid.shape[0]


def gradient_only(gradient, grid):
    """The score abs_mean, written by hand."""
    return gradient.abs().unflatten(0, (-1, grid.block_rows)).unflatten(2, (-1, grid.block_cols)).mean(dim=(1, 3))


def transposed(grid):
    """The commonest mistake."""
    return torch.zeros(grid.shape[1], grid.shape[0] + 1)


def not_a_number(grid):
    """A division by zero, say."""
    table = torch.zeros(grid.shape)
    table[-1, 0] = torch.nan
    return table


def no_tensor(grid):  # noqa: ARG001
    """What a forgotten return gives."""
    return


def wants_more(grid, hessian):  # noqa: ARG001
    """An argument that doesn't exist."""
    return torch.zeros(grid.shape)
