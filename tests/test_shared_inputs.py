"""Layers that read one tensor keep it once for the backward, by copies of columns or by reference, whatever is less."""

from __future__ import annotations

import pytest
import torch
from test_sparse_linear import SavedBytes, assert_close
from torch import nn

import smt_dist
from smt_dist.config import SMTConfig
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.sparse.surgery import sparse_layers

WIDTH, SIDE, TOKENS = 32, 4, 10


class Attention(nn.Module):
    """Three projections of one input, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))


def make(form: str, columns: dict[str, list[int]]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": Attention()})
    blocks = {f"attention.{name}": [(0, column) for column in found] for name, found in columns.items()}
    selection = BlockSelection(block_size=(SIDE, SIDE), blocks=blocks)
    config = SMTConfig(block_size=SIDE, form=form)
    smt_dist.apply_selection(model, selection, config)
    for layer in sparse_layers(model).values():
        layer.write_delta(torch.randn(layer.delta.shape, generator=torch.Generator().manual_seed(1)))
    return model


def saved(model: nn.Module, x: torch.Tensor) -> int:
    own = list(model.parameters())
    with SavedBytes() as kept:
        model["attention"](x)
    return kept.without(*own)


@pytest.mark.parametrize("form", ["in_place", "additive"])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"q_proj": [0, 1], "v_proj": [1]}, 3 * SIDE),  # copies, one for each layer
        ({"q_proj": [0, 1, 2], "k_proj": [0, 1, 2], "v_proj": [3, 4]}, WIDTH),  # as many: the input itself, once
        ({"q_proj": list(range(8)), "k_proj": list(range(8)), "v_proj": [0]}, WIDTH),
        ({"o_proj": [0]}, SIDE),  # reads another tensor than the other three
        ({"q_proj": list(range(8)), "o_proj": [1]}, WIDTH + SIDE),
    ],
)
def test_what_is_kept_is_the_smaller_of_copies_and_the_input(form, columns, expected):
    x = torch.randn(TOKENS, WIDTH)
    assert saved(make(form, columns), x) == expected * TOKENS * x.element_size()


@pytest.mark.parametrize("form", ["in_place", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_either_way(form, dtype):
    found = []
    for whole in (False, True):
        model = make(form, {"q_proj": [0, 3], "v_proj": [1]})
        layers = sparse_layers(model)
        for layer in layers.values():
            layer.keep_whole_input(whole)
        x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model["attention"](x).float().square().sum().backward()
        found.append([x.grad, *(layer.delta.grad for layer in layers.values())])
    for copied, referenced in zip(*found, strict=True):
        assert_close(copied, referenced, 1e-6)
