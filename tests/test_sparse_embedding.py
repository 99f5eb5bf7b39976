"""An embedding with blocks computes what the merged embedding would, and its blocks get the weight's gradients."""

from __future__ import annotations

import pytest
import torch
from architectures import logits_of, make_batches, make_model
from torch import nn

import smt_dist
from smt_dist.checkpoint.merge_files import merge_adapter_files
from smt_dist.sparse.blocks import BlockGrid, read_blocks, write_blocks
from smt_dist.sparse.embedding import SparseEmbedding

GRID = BlockGrid(24, 12, 4, 3)
BLOCKS = [(0, 0), (0, 2), (3, 1), (5, 3)]


def make_layer(padding_idx: int | None = None, dtype: torch.dtype = torch.float32) -> SparseEmbedding:
    torch.manual_seed(0)
    base = nn.Embedding(GRID.rows, GRID.cols, padding_idx).to(dtype).requires_grad_(False)
    layer = SparseEmbedding(base, GRID, BLOCKS, dtype)
    with torch.no_grad():
        layer.delta.normal_()
    return layer


def merged(layer: SparseEmbedding) -> nn.Embedding:
    weight = layer.base.weight.detach().clone()
    write_blocks(weight, GRID, BLOCKS, read_blocks(weight, GRID, BLOCKS) + layer.delta.detach())
    return nn.Embedding(*weight.shape, layer.padding_idx, _weight=weight)


@pytest.mark.parametrize("shape", [(24,), (2, 9), (2, 3, 4), (1, 0)])
def test_the_lookup_is_that_of_the_merged_weight(shape):
    """Every id, in any shape of batch; ids outside all blocks must come out untouched."""
    layer = make_layer()
    ids = torch.arange(24) if shape == (24,) else torch.randint(24, shape)
    torch.testing.assert_close(layer(ids), merged(layer)(ids), rtol=0, atol=1e-7)
    layer.enabled = False
    assert torch.equal(layer(ids), layer.base(ids))


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_gradients_are_those_of_the_weights_blocks(padding_idx):
    """Ids that come often add up, and the padding index gets none, as in PyTorch."""
    layer = make_layer(padding_idx)
    dense = merged(layer)
    ids = torch.tensor([[0, 1, 1, 3, 12, 13, 13, 13], [20, 21, 22, 23, 9, 9, 0, 1]])
    real = ids != -1 if padding_idx is None else ids != padding_idx
    weights = torch.randn(*ids.shape, GRID.cols)
    (layer(ids) * weights * real[..., None]).sum().backward()
    (dense(ids) * weights * real[..., None]).sum().backward()
    expected = read_blocks(dense.weight.grad, GRID, BLOCKS)
    assert expected.abs().max() > 0
    torch.testing.assert_close(layer.delta.grad, expected)
    assert layer.base.weight.grad is None


def test_the_padding_index_gets_no_block():
    """Its row never gets a gradient, and pads must stay what the base makes of them."""
    layer = make_layer(padding_idx=2)
    ids = torch.tensor([2, 3])
    assert torch.equal(layer(ids)[0], layer.base(ids)[0])
    assert not torch.equal(layer(ids)[1], layer.base(ids)[1])


def test_frequent_tokens_add_up_in_fp32():
    """In bf16, 1 + 1 + ... stops at 256: frequent tokens' gradients would be cut off."""
    layer = make_layer(dtype=torch.bfloat16)
    layer(torch.zeros(3000, dtype=torch.int64)).sum().backward()
    assert layer.delta.grad[0, 0] == 3008  # 3000 rounded to bf16


def selected(name: str = "model.embed_tokens") -> smt_dist.BlockSelection:
    return smt_dist.BlockSelection(block_size=(8, 8), blocks={name: [(0, 0), (3, 2), (5, 1)]})


def test_a_model_trains_saves_loads_and_merges_its_embedding(tmp_path):
    """From blocks to an ordinary checkpoint, on disk and in memory."""
    model, (batch, *_) = make_model("llama", tie_word_embeddings=False), make_batches(1)
    model.save_pretrained(tmp_path / "base")
    before = logits_of(model)
    smt_dist.apply_selection(model, selected())
    assert torch.equal(logits_of(model), before), "zero blocks changed the model"
    layer = smt_dist.sparse_layers(model)["model.embed_tokens"]
    assert isinstance(layer, SparseEmbedding)
    optimizer = torch.optim.AdamW([layer.delta], lr=1e-1)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned = logits_of(model)
    smt_dist.save_adapter(model, tmp_path / "adapter")

    fresh = make_model("llama", tie_word_embeddings=False)
    smt_dist.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits_of(fresh), tuned)
    smt_dist.merge_blocks(fresh)
    torch.testing.assert_close(logits_of(fresh), tuned, rtol=1e-4, atol=1e-5)
    merge_adapter_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(again), tuned, rtol=1e-4, atol=1e-5)
    smt_dist.unmerge_blocks(fresh)
    assert torch.equal(logits_of(fresh), tuned)


def test_a_tied_embedding_needs_untie_and_leaves_the_head_alone():
    """The tie is cut at the merge: the head goes on with the base's rows."""
    model = make_model("llama", tie_word_embeddings=True)
    smt_dist.apply_selection(model, selected(), untie=True)
    with torch.no_grad():
        smt_dist.sparse_layers(model)["model.embed_tokens"].delta.normal_(std=0.1)
    head, tuned = model.lm_head.weight.clone(), logits_of(model)
    smt_dist.merge_blocks(model)
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.model.embed_tokens.weight, head)
    torch.testing.assert_close(logits_of(model), tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["abs_mean", "mean_abs", "l2_per_step"])
def test_an_embeddings_scores_are_those_of_its_dense_gradient(score):
    """Rows are looked up, not multiplied: the gradient of a row is the sum over its tokens."""
    model, batches = make_model("llama", tie_word_embeddings=False), make_batches(1)
    group = {"target_modules": ["embed_tokens"], "blocks": 2}
    config = smt_dist.SMTConfig.model_validate(
        {"block_size": 8, "groups": [group], "selection": {"score": score}, "warmup": {"steps": 1}}
    )
    table = smt_dist.collect_scores(model, batches, config).tables["model.embed_tokens"]
    model.requires_grad_(True)
    model(**batches[0]).loss.backward()
    blocks = model.model.embed_tokens.weight.grad.double().unflatten(0, (-1, 8)).unflatten(2, (-1, 8))
    expected = {
        "abs_mean": blocks.abs().mean(dim=(1, 3)),
        "mean_abs": blocks.mean(dim=(1, 3)).abs(),
        "l2_per_step": blocks.square().sum(dim=(1, 3)).sqrt(),
    }[score]
    torch.testing.assert_close(table, expected, rtol=1e-4, atol=1e-9)
