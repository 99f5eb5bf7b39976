"""A merged model is an ordinary one: base plus blocks, rounded once, and nothing else changed."""

from __future__ import annotations

import pytest
import torch
from architectures import logits_of, make_model
from transformers import AutoModelForCausalLM

import smt_dist
from smt_dist import BlockSelection
from smt_dist.errors import SMTError
from smt_dist.sparse.blocks import merged_blocks

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SELECTION = BlockSelection(block_size=(8, 8), blocks={Q: [(0, 1), (3, 0)], V: [(1, 2)]})
HEAD = BlockSelection(block_size=(8, 8), blocks={"lm_head": [(0, 0), (7, 3)], Q: [(0, 0)]})
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_blocks(selection: BlockSelection = SELECTION, std: float = 0.02, seed: int = 1, **options):
    model = make_model("llama", **options)
    smt_dist.apply_selection(model, selection, untie=True)
    generator = torch.Generator().manual_seed(seed)
    for layer in smt_dist.sparse_layers(model).values():
        layer.delta.data.normal_(std=std, generator=generator)
    return model


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selected_elements_are_rounded_sums_and_all_others_keep_their_bits(dtype):
    """The definition of a merge; a sum in bf16, or a rounding of the whole weight, fails here."""
    base = state_of(make_model("llama", dtype=dtype))
    model = with_blocks(dtype=dtype)
    deltas = {name: layer.delta.detach().clone() for name, layer in smt_dist.sparse_layers(model).items()}
    smt_dist.merge_blocks(model)
    merged = model.state_dict()
    assert list(merged) == list(base)
    rounded_sums_differ_from_sums_of_rounded = False
    for name, before in base.items():
        expected = before.clone()
        module = name.removesuffix(".weight")
        for index, (row, col) in enumerate(SELECTION.blocks.get(module, [])):
            place = (slice(row * 8, row * 8 + 8), slice(col * 8, col * 8 + 8))
            delta = deltas[module][index * 8 : index * 8 + 8]
            expected[place] = (before[place].to(torch.float32) + delta).to(dtype)
            assert not torch.equal(expected[place], before[place])
            rounded_sums_differ_from_sums_of_rounded |= not torch.equal(
                expected[place], before[place] + delta.to(dtype)
            )
        assert merged[name].dtype == dtype
        assert torch.equal(bits(merged[name]), bits(expected)), name
    # Otherwise this test couldn't tell the two apart.
    assert rounded_sums_differ_from_sums_of_rounded == (dtype != torch.float32)


def test_negative_zero_and_denormals_keep_their_bits():
    """ "Unselected is bit-identical" also where equal values have different bits."""
    model = with_blocks()
    weight = model.get_submodule(Q).base.weight
    weight.data[0, 0], weight.data[1, 0] = -0.0, 1e-42
    before = bits(weight).clone()
    smt_dist.merge_blocks(model)
    assert torch.equal(bits(model.get_submodule(Q).weight)[:8, :8], before[:8, :8])


def test_in_fp32_the_merged_model_says_what_the_adapted_one_said():
    """What was evaluated is what is shipped."""
    model = with_blocks(std=0.2)
    adapted, base = logits_of(model), logits_of(make_model("llama"))
    smt_dist.merge_blocks(model)
    merged = logits_of(model)
    assert (merged - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    assert (adapted - base).abs().max() > 1e-2 * base.abs().max()


def test_in_bf16_the_merged_model_is_near_the_adapted_one(record_property):
    """The merge rounds once more than the blocks do; the difference must be of bf16's size."""
    model = with_blocks(std=0.2, dtype=torch.bfloat16)
    adapted = logits_of(model).float()
    smt_dist.merge_blocks(model)
    difference = ((logits_of(model).float() - adapted).norm() / adapted.norm()).item()
    record_property("relative_difference", difference)
    assert difference < 0.02


def test_a_merged_model_is_an_ordinary_checkpoint(tmp_path):
    """Anyone can load it, without this package: same files, same names, same logits."""
    make_model("llama").save_pretrained(tmp_path / "base")
    model = with_blocks(std=0.2)
    smt_dist.merge_blocks(model)
    assert all(type(module).__module__.split(".")[0] != "smt_dist" for module in model.modules())
    model.save_pretrained(tmp_path / "merged")
    files = lambda name: sorted(path.name for path in (tmp_path / name).iterdir())  # noqa: E731
    assert files("merged") == files("base")
    assert (tmp_path / "merged/config.json").read_text() == (tmp_path / "base/config.json").read_text()
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert list(again.state_dict()) == list(make_model("llama").state_dict())
    assert torch.equal(logits_of(again.eval()), logits_of(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerge_gives_every_bit_back(dtype):
    """Subtracting would not: rounding loses bits, and the base would change with each merge."""
    model = with_blocks(dtype=dtype, std=3.0)
    before, adapted = state_of(model), logits_of(model)
    for _ in range(2):
        smt_dist.merge_blocks(model)
        smt_dist.unmerge_blocks(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(bits(after[name]), bits(value)) for name, value in before.items())
    assert torch.equal(logits_of(model), adapted)


def test_unmerged_blocks_are_the_same_parameters():
    """An optimizer that holds them goes on training them."""
    model = with_blocks()
    parameters = [layer.delta for layer in smt_dist.sparse_layers(model).values()]
    smt_dist.merge_blocks(model)
    smt_dist.unmerge_blocks(model)
    now = [layer.delta for layer in smt_dist.sparse_layers(model).values()]
    assert all(a is b for a, b in zip(parameters, now, strict=True))
    assert all(delta.requires_grad for delta in now)
    assert model.smt.selection == SELECTION


def test_a_tied_head_is_cut_loose_by_the_merge_and_tied_again_by_the_unmerge():
    """The blocks are the head's: the embedding may not change with them; and the unmerged model is the old one."""
    model = with_blocks(HEAD, std=0.5, tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    before, adapted = state_of(model), logits_of(model)
    smt_dist.merge_blocks(model)
    assert model.lm_head.weight is not embedding
    assert torch.equal(embedding, before["model.embed_tokens.weight"])
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(logits_of(model), adapted, rtol=1e-5, atol=1e-5)
    smt_dist.unmerge_blocks(model)
    assert model.get_submodule("lm_head").base.weight is model.model.embed_tokens.weight is embedding
    assert model.config.tie_word_embeddings
    assert torch.equal(logits_of(model), adapted)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_merged_tied_head_survives_saving_and_loading(tmp_path):
    """If the file leaves the head out, loading ties it again and the training is lost without a word."""
    model = with_blocks(HEAD, std=0.5, tie_word_embeddings=True)
    smt_dist.merge_blocks(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(logits_of(again), logits_of(model))


def test_merging_needs_blocks_and_unmerging_a_merge():
    """Silence would let a wrong order of calls pass for a success."""
    model = make_model("llama")
    with pytest.raises(SMTError, match="no blocks to merge"):
        smt_dist.merge_blocks(model)
    with pytest.raises(SMTError, match="no merged blocks"):
        smt_dist.unmerge_blocks(model)
    smt_dist.apply_selection(model, SELECTION)
    smt_dist.merge_blocks(model)
    with pytest.raises(SMTError, match="no blocks to merge"):
        smt_dist.merge_blocks(model)


def test_a_quantised_weight_is_refused_before_anything_is_written():
    """Adding fp32 blocks to packed integers makes noise."""
    model = with_blocks()
    model.get_submodule(V).base.weight = torch.nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)
    before = state_of(model)
    with pytest.raises(SMTError, match=r"layers\.1\.self_attn\.v_proj: its weight is quantised"):
        smt_dist.merge_blocks(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_the_sum_is_taken_in_fp32_and_rounded_once():
    """1 + 2^-8 + 2^-9 rounds up to the next bf16 in one step, and is lost in two."""
    base = torch.tensor([[1.0]], dtype=torch.bfloat16)
    delta = torch.tensor([[2.0**-8 + 2.0**-9]])
    assert merged_blocks(base, delta).item() == 1.0 + 2.0**-7
    assert merged_blocks(base, delta).dtype == torch.bfloat16


def test_a_second_merge_makes_the_first_part_of_the_base():
    """Two adapters in a row: undoing the second may not undo half of the first."""
    model = with_blocks(std=0.2)
    smt_dist.merge_blocks(model)
    merged_once = state_of(model)
    smt_dist.apply_selection(model, BlockSelection(block_size=(8, 8), blocks={Q: [(0, 1)]}))
    with pytest.raises(SMTError, match="blocks that aren't merged"):
        smt_dist.unmerge_blocks(model)
    smt_dist.sparse_layers(model)[Q].delta.data.fill_(0.5)
    smt_dist.merge_blocks(model)
    smt_dist.unmerge_blocks(model)
    assert list(smt_dist.sparse_layers(model)) == [Q]
    smt_dist.remove_blocks(model)
    assert all(torch.equal(bits(model.state_dict()[name]), bits(value)) for name, value in merged_once.items())
