"""``SparseLinear`` computes what a dense layer computes, keeps little for the backward, and writes nobody's tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from smt_dist.sparse.blocks import Block, BlockGrid, write_blocks
from smt_dist.sparse.linear import SparseLinear

SOME_BLOCKS = [(0, 1), (1, 1), (1, 2)]  # two share a column, two share a row
GEOMETRIES = [
    pytest.param(BlockGrid(12, 16, 4, 4), SOME_BLOCKS, id="square"),
    pytest.param(BlockGrid(12, 16, 6, 4), [(0, 0), (1, 3)], id="tall"),
    pytest.param(BlockGrid(4, 16, 2, 4), SOME_BLOCKS, id="narrow-output"),
    pytest.param(BlockGrid(16, 4, 4, 2), [(0, 1), (3, 0)], id="wide-output"),
    pytest.param(BlockGrid(8, 8, 8, 8), [(0, 0)], id="whole-weight"),
    pytest.param(BlockGrid(3, 5, 1, 1), [(0, 4), (2, 0)], id="single-elements"),
]
SQUARE = GEOMETRIES[0].values[0]


def make_layer(
    grid: BlockGrid = SQUARE,
    blocks: list[Block] = SOME_BLOCKS,
    *,
    bias: bool = False,
    base_dtype: torch.dtype = torch.float32,
    delta_dtype: torch.dtype = torch.float32,
) -> SparseLinear:
    """A seeded layer whose blocks are not zero."""
    torch.manual_seed(0)
    base = nn.Linear(grid.cols, grid.rows, bias=bias, dtype=base_dtype).requires_grad_(False)
    layer = SparseLinear(base, grid, blocks, delta_dtype)
    nn.init.normal_(layer.delta, std=0.1)
    return layer


def make_input(*lead: int, features: int = SQUARE.cols, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Seeded ``[*lead, features]`` that wants a gradient."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*lead, features, generator=generator).to(dtype).requires_grad_()


def dense_reference(layer: SparseLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, input gradient and block gradients of ``sum(y^2)`` by fp64 autograd through the summed weight."""
    change = torch.zeros(layer.grid.rows, layer.grid.cols, dtype=torch.float64)
    write_blocks(change, layer.grid, layer.blocks, layer.delta.detach().double())
    weight = (layer.base.weight.double() + change).requires_grad_()
    x = x.detach().double().requires_grad_()
    y = F.linear(x, weight, None if layer.bias is None else layer.bias.double())
    y.square().sum().backward()
    blocks = [weight.grad[layer.grid.row_slice(row), layer.grid.col_slice(col)] for row, col in layer.blocks]
    return y.detach(), x.grad, torch.cat(blocks)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """The relative error of the whole tensor, in the Frobenius norm."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_equals_dense(layer: SparseLinear, x: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Output and both gradients against the reference; ``x`` is a leaf or keeps its gradient."""
    y = layer(x)
    y.float().square().sum().backward()
    for actual, expected in zip((y, x.grad, layer.delta.grad), dense_reference(layer, x), strict=True):
        assert_close(actual, expected, tolerance)


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward inside the context, each storage in full and once."""

    def __enter__(self) -> SavedBytes:
        self.storages: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def without(self, *known: torch.Tensor) -> int:
        """The bytes of all kept storages but those of ``known``."""
        skip = {tensor.untyped_storage().data_ptr() for tensor in known}
        return sum(size for pointer, size in self.storages.items() if pointer not in skip)


@pytest.mark.parametrize("lead", [(7,), (2, 3), (2, 3, 2)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("grid", "blocks"), GEOMETRIES)
def test_gradients_equal_dense_autograd(
    grid: BlockGrid, blocks: list[Block], bias: bool, lead: tuple[int, ...]
) -> None:
    """A failure means that training follows another gradient than the method's."""
    assert_equals_dense(make_layer(grid, blocks, bias=bias), make_input(*lead, features=grid.cols))


def test_all_blocks_together_are_a_dense_layer() -> None:
    """A failure means that blocks overlap, or that some element belongs to none."""
    every_block = [(row, col) for row in range(3) for col in range(4)]
    assert_equals_dense(make_layer(blocks=every_block), make_input(7))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_non_contiguous_inputs_give_the_same(layout: str) -> None:
    """A failure means that the layer reads memory where it should read elements."""
    x = {
        "transposed": lambda: make_input(2, 5).transpose(0, 1),
        "strided": lambda: make_input(4, 6)[:, ::2],
        "expanded": lambda: make_input(1, 6).expand(3, 6, SQUARE.cols),
    }[layout]()
    assert not x.is_contiguous()
    x.retain_grad()
    assert_equals_dense(make_layer(), x)


def test_non_contiguous_output_gradients_give_the_same() -> None:
    """A failure means that a transpose after the layer (attention heads) breaks its gradients."""
    layer, x = make_layer(), make_input(2, 5)
    layer(x).transpose(1, 2).contiguous().square().sum().backward()
    _, grad_x, grad_delta = dense_reference(layer, x)
    assert_close(x.grad, grad_x)
    assert_close(layer.delta.grad, grad_delta)


def test_no_tokens_are_no_gradient() -> None:
    """A failure means that a rank with an empty batch crashes."""
    layer, x = make_layer(), make_input(0)
    layer(x).sum().backward()
    assert x.grad.shape == (0, SQUARE.cols)
    assert not layer.delta.grad.any()


@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
def test_bf16_bases_train_blocks_of_either_dtype(delta_dtype: torch.dtype) -> None:
    """A failure means that mixed precision loses the gradient or its dtype; 2 % is bf16's own rounding."""
    layer = make_layer(bias=True, base_dtype=torch.bfloat16, delta_dtype=delta_dtype)
    x = make_input(4, 8, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert_equals_dense(layer, x, tolerance=0.02)
    assert layer.delta.grad.dtype == delta_dtype


def test_autocast_computes_in_its_dtype() -> None:
    """A failure means that Trainer's --bf16 over an fp32 base crashes or returns the wrong dtypes."""
    layer, x = make_layer(bias=True), make_input(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.delta.grad.dtype == torch.float32
    for actual, expected in zip((y, x.grad, layer.delta.grad), dense_reference(layer, x), strict=True):
        assert_close(actual, expected, tolerance=0.02)


def test_gradient_checkpointing_changes_nothing() -> None:
    """A failure means that the recomputed forward differs from the first."""
    results = []
    for forward in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=False)):
        layer, x = make_layer(bias=True), make_input(2, 5)
        y = forward(layer, x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.delta.grad))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_two_forwards_before_a_backward_add_up() -> None:
    """A failure means that one forward overwrites what the other kept."""
    layer, x = make_layer(), make_input(7)
    (layer(x).square().sum() + layer(x).square().sum()).backward()
    assert_close(layer.delta.grad, 2 * dense_reference(layer, x)[2])


def evaluate(layer: SparseLinear, x: torch.Tensor, mode: Any) -> torch.Tensor:
    """The output without gradients, for which nothing may be kept."""
    with mode(), SavedBytes() as saved:
        y = layer(x)
    assert not y.requires_grad
    assert saved.without() == 0
    return y


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_equals_training_and_keeps_nothing(mode: Any) -> None:
    """A failure means that evaluation sees another model, or pays for a backward that never comes."""
    layer, x = make_layer(bias=True), make_input(7)
    expected = layer.train()(x)
    layer.eval()
    assert torch.equal(evaluate(layer, x, mode), expected)


def test_only_the_needed_columns_are_saved() -> None:
    """A failure means that memory grows with the layer's width instead of the blocks'."""
    layer, x = make_layer(), make_input(50)
    with SavedBytes() as saved:
        layer(x)
    assert saved.without(layer.delta, layer.base.weight) == 50 * 2 * 4 * x.element_size()  # columns 1 and 2, once each
    assert x.untyped_storage().data_ptr() not in saved.storages


def test_frozen_blocks_save_no_columns() -> None:
    """A failure means that layers which only pass gradients on pay for weight gradients."""
    layer, x = make_layer(), make_input(50)
    layer.delta.requires_grad_(False)
    with SavedBytes() as saved:
        y = layer(x)
    y.square().sum().backward()
    assert saved.without(layer.delta, layer.base.weight) == 0
    assert layer.delta.grad is None
    assert_close(x.grad, dense_reference(layer, x)[1])


def test_inputs_without_gradient_train_the_blocks() -> None:
    """A failure means that the first layer of a model, whose input is the frozen embeddings' output, learns nothing."""
    layer, x = make_layer(), make_input(7).detach()
    layer(x).square().sum().backward()
    assert_close(layer.delta.grad, dense_reference(layer, x)[2])


def test_switched_off_it_is_the_base() -> None:
    """A failure means that ``blocks_disabled`` doesn't give the base model's own outputs."""
    layer, x = make_layer(bias=True), make_input(7)
    layer.enabled = False
    y = layer(x)
    assert torch.equal(y, layer.base(x))
    y.sum().backward()
    assert layer.delta.grad is None
    assert x.grad is not None


def test_zero_blocks_are_the_base() -> None:
    """A failure means that attaching fresh blocks moves the model."""
    layer, x = make_layer(bias=True), make_input(7)
    nn.init.zeros_(layer.delta)
    assert torch.equal(layer(x), layer.base(x))


def test_the_output_that_the_base_gave_others_is_not_written() -> None:
    """A failure means that a hook on the base, which kept its output, finds the blocks' share in it."""
    layer, x, seen = make_layer(), make_input(7), []
    layer.base.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    layer(x)
    assert torch.equal(seen[0], F.linear(x, layer.weight))


class PassThrough(torch.autograd.Function):
    """Returns a view of its input, as the hooks that DeepSpeed ZeRO-3 puts around each module do."""

    @staticmethod
    def forward(_ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(_ctx: Any, grad_y: torch.Tensor) -> torch.Tensor:
        return grad_y


def test_a_base_output_that_a_custom_function_made_a_view_is_no_obstacle() -> None:
    """A failure means that ZeRO-3 crashes (autograd forbids writing such views) or gets other gradients."""
    layer, x = make_layer(bias=True), make_input(2, 5)
    layer.base.register_forward_hook(lambda _module, _inputs, output: PassThrough.apply(output))
    layer.base.register_forward_pre_hook(lambda _module, inputs: PassThrough.apply(inputs[0]))
    assert_equals_dense(layer, x)


def test_inputs_may_be_overwritten_after_the_forward() -> None:
    """A failure means that the layer keeps a view of its input: gradients go wrong when a model reuses memory."""
    layer, x = make_layer(), make_input(7)
    _, _, grad_delta = dense_reference(layer, x)
    buffer = x.detach().clone()
    y = layer(buffer)
    buffer.zero_()
    y.square().sum().backward()
    assert_close(layer.delta.grad, grad_delta)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_it_shows_the_attributes_of_a_linear_layer(bias: bool) -> None:
    """A failure means that model code which reads a projection's weight, bias or widths breaks."""
    layer = make_layer(bias=bias)
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias
    assert (layer.in_features, layer.out_features) == (SQUARE.cols, SQUARE.rows)
