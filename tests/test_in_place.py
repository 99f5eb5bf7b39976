"""Blocks inside the weight: what the merged model computes, bit for bit, with dense gradients at the blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_sparse_linear import GEOMETRIES, SOME_BLOCKS, SQUARE, SavedBytes, assert_close, evaluate, make_input
from torch import nn
from torch.utils.checkpoint import checkpoint

import smt_dist
from smt_dist.config import SMTConfig
from smt_dist.errors import SMTError
from smt_dist.sparse.blocks import Block, BlockGrid, BlockSelection, merged_blocks, read_blocks, write_blocks
from smt_dist.sparse.in_place import InPlaceEmbedding, InPlaceLayer, InPlaceLinear
from smt_dist.sparse.surgery import sparse_layers

KINDS = [pytest.param("linear", id="linear"), pytest.param("embedding", id="embedding")]


def make_layer(
    kind: str = "linear",
    grid: BlockGrid = SQUARE,
    blocks: list[Block] = SOME_BLOCKS,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> InPlaceLayer:
    """A seeded layer whose blocks are not zero, and are written."""
    torch.manual_seed(0)
    if kind == "linear":
        base = nn.Linear(grid.cols, grid.rows, bias=bias, dtype=dtype).requires_grad_(False)
        layer: InPlaceLayer = InPlaceLinear(base, grid, blocks)
    else:
        layer = InPlaceEmbedding(nn.Embedding(grid.rows, grid.cols, dtype=dtype).requires_grad_(False), grid, blocks)
    nn.init.normal_(layer.delta, std=0.1)
    layer.write_values()
    return layer


def make_inputs(kind: str, *lead: int, grid: BlockGrid = SQUARE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Seeded inputs of a layer."""
    if kind == "linear":
        return make_input(*lead, features=grid.cols, dtype=dtype)
    return torch.randint(grid.rows, lead, generator=torch.Generator().manual_seed(1))


def original_weight(layer: InPlaceLayer) -> torch.Tensor:
    """W0, as it was before the first write."""
    weight = layer.base.weight.detach().clone()
    write_blocks(weight, layer.grid, layer.blocks, layer.original)
    return weight


def merged_weight(layer: InPlaceLayer) -> torch.Tensor:
    """What the merge of W0 and delta gives."""
    weight = original_weight(layer)
    own = read_blocks(weight, layer.grid, layer.blocks)
    write_blocks(weight, layer.grid, layer.blocks, merged_blocks(own, layer.delta.detach()))
    return weight


def dense(layer: InPlaceLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Output, input gradient and block gradients of ``sum(y^2)`` of the merged weight, trained as a whole."""
    weight = merged_weight(layer).requires_grad_()
    x = x.detach().requires_grad_(x.is_floating_point())
    y = torch.func.functional_call(layer.base, {"weight": weight}, (x,))
    y.float().square().sum().backward()
    return y.detach(), x.grad, read_blocks(weight.grad, layer.grid, layer.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(7,), (2, 3), (2, 3, 2)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("grid", "blocks"), GEOMETRIES)
def test_linear_layers_compute_and_learn_as_dense_ones(
    grid: BlockGrid, blocks: list[Block], bias: bool, lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    """A failure means that training isn't the merged model's, or follows another gradient than the method's."""
    layer, x = (
        make_layer("linear", grid, blocks, bias=bias, dtype=dtype),
        make_inputs("linear", *lead, grid=grid, dtype=dtype),
    )
    expected, grad_x, grad_blocks = dense(layer, x)
    y = layer(x)
    y.float().square().sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, grad_x)
    assert_close(layer.delta.grad, grad_blocks, 1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("lead", [(9,), (2, 5)], ids=["1-D", "2-D"])
@pytest.mark.parametrize(("grid", "blocks"), GEOMETRIES)
def test_embeddings_compute_and_learn_as_dense_ones(
    grid: BlockGrid, blocks: list[Block], lead: tuple[int, ...]
) -> None:
    layer, x = make_layer("embedding", grid, blocks), make_inputs("embedding", *lead, grid=grid)
    expected, _, grad_blocks = dense(layer, x)
    y = layer(x)
    y.square().sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(layer.delta.grad, grad_blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_it_is_the_base_bit_for_bit_and_no_weight_is_written(kind: str) -> None:
    layer, x = make_layer(kind), make_inputs(kind, 2, 5)
    before = layer.base.weight._version
    layer.enabled = False
    y = layer(x)
    assert torch.equal(y, torch.func.functional_call(layer.base, {"weight": original_weight(layer)}, (x,)))
    assert layer.base.weight._version == before
    assert not torch.equal(y, layer.base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_between_a_forward_and_its_backward(kind: str) -> None:
    """DPO's order: the policy's forward, the reference's without gradients, the backward."""
    layer, x = make_layer(kind), make_inputs(kind, 2, 5)
    _, _, grad_blocks = dense(layer, x)
    y = layer(x)
    layer.enabled = False
    with torch.no_grad():
        layer(x)
    layer.enabled = True
    y.square().sum().backward()
    assert_close(layer.delta.grad, grad_blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_between_a_forward_and_its_backward_raises(kind: str) -> None:
    layer, x = make_layer(kind), make_inputs(kind, 2, 5)
    y = layer(x)
    layer.write_values()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: lambda x: checkpoint(f, x, use_reentrant=False)])
def test_two_forwards_before_a_backward_add_up(kind: str, wrap: Callable) -> None:
    layer, x = make_layer(kind), make_inputs(kind, 7)
    forward = wrap(layer)
    (forward(x).square().sum() + forward(x).square().sum()).backward()
    assert_close(layer.delta.grad, 2 * dense(layer, x)[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_model_code_may_write_the_output_in_place(kind: str, bias: bool) -> None:
    layer, x = make_layer(kind, bias=bias), make_inputs(kind, 2, 5)
    layer(x).mul_(2).square().sum().backward()
    assert_close(layer.delta.grad, 4 * dense(layer, x)[2])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_keeps_nothing(mode: Callable) -> None:
    evaluate(make_layer(), make_input(7), mode)


def test_only_the_needed_columns_are_saved() -> None:
    layer, x = make_layer(), make_input(50)
    with SavedBytes() as saved:
        layer(x)
    assert saved.without(layer.delta, layer.base.weight) == 50 * 2 * 4 * x.element_size()  # columns 1 and 2, once each


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_a_graph_break(kind: str) -> None:
    layer, x = make_layer(kind), make_inputs(kind, 2, 5)
    expected, _, grad_blocks = dense(layer, x)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    y.square().sum().backward()
    assert torch.equal(y, expected)
    assert_close(layer.delta.grad, grad_blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loop_of_ones_own_trains_as_the_dense_weight_does(dtype: torch.dtype) -> None:
    """With an optimizer of the user's, values are written after each step by ``write_values``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12, dtype=dtype), nn.ReLU(), nn.Linear(12, 8, dtype=dtype))
    selection = BlockSelection(block_size=(4, 4), blocks={"0": [(0, 1), (2, 3)], "2": [(1, 0)]})
    truth = copy.deepcopy(model).float()
    smt_dist.apply_selection(model, selection, SMTConfig(block_size=4, form="in_place"))
    layers = sparse_layers(model)
    optimizer = torch.optim.SGD([layer.delta for layer in layers.values()], lr=0.1)
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        for one, inputs in ((model, x.to(dtype)), (truth, x)):
            one.zero_grad()
            one(inputs).float().square().sum().backward()
        optimizer.step()
        smt_dist.write_values(model)
        with torch.no_grad():
            for name, layer in layers.items():
                weight = truth.get_submodule(name).weight
                values, gradients = (read_blocks(t, layer.grid, layer.blocks) for t in (weight, weight.grad))
                write_blocks(weight, layer.grid, layer.blocks, values - 0.1 * gradients)
    for name, layer in layers.items():
        assert_close(layer.weight, truth.get_submodule(name).weight, 1e-5 if dtype == torch.float32 else 0.02)
        assert torch.equal(layer.rows.read(layer.weight), merged_blocks(layer.original, layer.delta.detach()))


def test_without_blocks_in_weights_there_is_nothing_to_write() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    smt_dist.apply_selection(model, BlockSelection(block_size=(4, 4), blocks={"0": [(0, 0)]}))
    assert not sparse_layers(model)["0"].is_in_place, "own loops get additive blocks unless they ask"
    with pytest.raises(SMTError, match="there is nothing to write"):
        smt_dist.write_values(model)


REFUSED = {"tied": "is tied to", "shared": "is tied to", "int8": "has a quantised weight"}


@pytest.mark.parametrize("case", REFUSED)
def test_a_weight_that_can_not_hold_blocks_is_refused_or_gets_them_beside_it(case: str) -> None:
    """In place another user of the weight would change too, and an integer weight can't be written."""
    model = nn.ModuleDict({"first": nn.Linear(8, 8, bias=False), "second": nn.Linear(8, 8, bias=False)})
    if case == "tied":
        model["second"].weight = model["first"].weight
    elif case == "shared":
        model["second"] = model["first"]
    else:
        weight = torch.zeros(8, 8, dtype=torch.int8)
        model["first"].weight = nn.Parameter(weight, requires_grad=False)
    selection = BlockSelection(block_size=(4, 4), blocks={"first": [(0, 0)]})
    with pytest.raises(SMTError, match=f'form in_place: first {REFUSED[case]}.*use "auto"'):
        smt_dist.apply_selection(
            model, selection, SMTConfig(block_size=4, form="in_place"), untie=True, fingerprint="x"
        )
    smt_dist.apply_selection(
        model, selection, SMTConfig(block_size=4), untie=True, fingerprint="x", auto_form="in_place"
    )
    assert not sparse_layers(model)["first"].is_in_place


@pytest.mark.parametrize("remove", [False, True])
def test_removed_or_unmerged_blocks_leave_every_bit_of_the_base(remove: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))
    before = model[0].weight.detach().clone()
    smt_dist.apply_selection(
        model, BlockSelection(block_size=(4, 4), blocks={"0": [(0, 0)]}), SMTConfig(block_size=4, form="in_place")
    )
    layer = sparse_layers(model)["0"]
    nn.init.normal_(layer.delta)
    smt_dist.merge_blocks(model)  # writes deltas that were changed by hand
    merged = model[0].weight.detach().clone()
    assert not torch.equal(merged, before)
    smt_dist.unmerge_blocks(model)
    assert torch.equal(model[0].weight, merged)
    if remove:
        smt_dist.remove_blocks(model)
        assert torch.equal(model[0].weight, before)
    else:
        x = torch.randn(3, 8, dtype=torch.bfloat16)
        with smt_dist.blocks_disabled(model):
            assert torch.equal(model(x), nn.functional.linear(x, before, model[0].bias))
