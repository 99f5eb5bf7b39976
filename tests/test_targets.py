"""The weights to tune are found by what modules are and how they are called, on every architecture alike."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, LLAMA_LIKE, VOCAB, build, logits_of, make_batches, make_model

import smt_dist
from smt_dist.errors import SMTError
from smt_dist.sparse.blocks import read_blocks
from smt_dist.sparse.targets import count_parameters_2d, find_targets


def make_config(target_modules="attention", blocks: int = 6, **changes) -> smt_dist.SMTConfig:
    group = {"name": "g", "target_modules": target_modules, "blocks": blocks}
    return smt_dist.SMTConfig.model_validate({"block_size": 8, "groups": [group], "warmup": {"steps": 2}, **changes})


def targets_of(model, target_modules, **changes) -> list[str]:
    return find_targets(model, make_config(target_modules, **changes))["g"]


def dense_gradients(model, batch) -> dict[str, torch.Tensor]:
    model.requires_grad_(True)
    model(**batch).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("alias", ["attention", "mlp"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_alias_means_the_same_parts_of_every_architecture(architecture, alias):
    """A missed projection is never trained, and a wrong one (the output projection, say) is another method."""
    _, attention, mlp = ARCHITECTURES[architecture]
    expected = attention if alias == "attention" else mlp
    names = targets_of(make_model(architecture), alias)
    leaves = [name.rpartition(".")[2] for name in names]
    assert sorted(leaves) == sorted(expected * 2)  # two layers
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("alias", ["attention", "mlp"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_goes_from_scores_to_a_training_step(architecture, alias):
    """One failure here is a family of models on which SMT is wrong or doesn't run."""
    model, batches = make_model(architecture), make_batches(2)
    config = make_config(alias)
    reference = make_model(architecture)
    gradients = dense_gradients(reference, batches[0])
    expected_logits, before = logits_of(model), model(**batches[0]).loss.item()

    scores = smt_dist.collect_scores(model, batches, config)
    assert torch.equal(logits_of(model), expected_logits), "scoring left a trace"
    assert all(table.gt(0).any() for table in scores.tables.values()), "a target got no gradient"
    selection = smt_dist.select_blocks(scores, config)
    assert len(selection) == 6
    smt_dist.apply_selection(model, selection, config)
    layers = smt_dist.sparse_layers(model)
    assert list(layers) == list(selection.blocks)
    assert torch.equal(logits_of(model), expected_logits), "zero deltas changed the model"

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trainable} == {id(layer.delta) for layer in layers.values()}
    model(**batches[0]).loss.backward()
    for name, layer in layers.items():
        dense = read_blocks(gradients[f"{name}.weight"], layer.grid, layer.blocks)
        assert dense.abs().max() > 0
        torch.testing.assert_close(layer.delta.grad, dense, rtol=1e-4, atol=1e-5 * dense.abs().max().item())
    torch.optim.AdamW(trainable, lr=1e-2).step()
    assert model(**batches[0]).loss.item() < before


@pytest.mark.parametrize("architecture", ["qwen2", "gpt_neox", "opt", "bloom"])
def test_biases_stay_and_stay_frozen(architecture):
    """A lost bias changes the base; a trained one isn't in the adapter."""
    model = make_model(architecture)
    name = targets_of(model, "attention")[0]
    bias = model.get_submodule(name).bias
    assert bias.abs().max() > 0
    smt_dist.apply_selection(model, smt_dist.BlockSelection(block_size=(8, 8), blocks={name: [(0, 0)]}))
    layer = model.get_submodule(name)
    assert layer.bias is bias
    assert not bias.requires_grad


def test_fractions_count_the_2d_parameters_with_tied_ones_once():
    """The budget's base: another count gives another number of blocks than the authors'."""
    hidden, inner, kv = 32, 64, 16
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    untied = make_model("llama", tie_word_embeddings=False)
    tied = make_model("llama", tie_word_embeddings=True)
    assert count_parameters_2d(untied) == 2 * layer + 2 * VOCAB * hidden
    assert count_parameters_2d(tied) == 2 * layer + VOCAB * hidden
    smt_dist.apply_selection(
        tied, smt_dist.BlockSelection(block_size=(8, 8), blocks={"model.layers.0.mlp.up_proj": [(0, 0)]})
    )
    assert count_parameters_2d(tied) == 2 * layer + VOCAB * hidden, "blocks count as parameters of the base"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("o_proj", ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]),
        ("self_attn.q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        (["o_proj", "lm_head"], ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "lm_head"]),
        (r".*layers\.1\..*(q|v)_proj", ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]),
        (r"(model\.)?layers\.0\.mlp\.up_proj|lm_head", ["model.layers.0.mlp.up_proj", "lm_head"]),
    ],
    ids=str,
)
def test_names_lists_and_patterns_match_whole_parts_in_the_models_order(target, expected):
    """ "o_proj" may not match "foo_proj", and the order breaks ties between equal scores."""
    assert targets_of(make_model("llama"), target) == expected


@pytest.mark.parametrize("target", ["proj", "q_pro", "Q_proj", "layers", ".*q_pro", "nothing.here", ["q", "k"]])
def test_a_target_that_matches_nothing_is_refused_with_what_there_is(target):
    """A spelling mistake must not become a run that trains nothing; the message helps to mend it."""
    with pytest.raises(SMTError, match=r"groups\[g\].target_modules.*no linear module of LlamaForCausalLM") as caught:
        targets_of(make_model("llama"), target)
    assert all(name in str(caught.value) for name in ("q_proj", "down_proj", "lm_head"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("target", ["(q_proj", "[", "*_proj", "q_proj|("])
def test_a_broken_pattern_is_refused_by_name(target):
    """`re.error` alone doesn't say which field holds the pattern."""
    with pytest.raises(SMTError, match=r"target_modules.*not a regular expression"):
        targets_of(make_model("llama"), target)


@pytest.mark.parametrize("target", ["input_layernorm", r".*norm.*"])
def test_a_module_without_a_matrix_is_never_a_target(target):
    """Blocks of a norm have no meaning."""
    with pytest.raises(SMTError, match="matches no linear module"):
        targets_of(make_model("llama"), target)


def test_an_embedding_that_is_not_tied_is_a_target():
    """Its rows are looked up: blocks of them are added to what is found."""
    model = make_model("llama", tie_word_embeddings=False)
    assert targets_of(model, ["embed_tokens", "lm_head"]) == ["model.embed_tokens", "lm_head"]
    with pytest.raises(SMTError, match=r"model\.embed_tokens is tied to lm_head\.weight"):
        targets_of(make_model("llama", tie_word_embeddings=True), "embed_tokens")


def test_an_embedding_with_a_forward_of_its_own_is_refused_with_the_reason():
    """A scaled or shifted lookup isn't the lookup that the blocks would be added to."""
    with pytest.raises(SMTError, match=r"embed_positions is a \w+, which changes the rows that it looks up"):
        targets_of(make_model("opt"), "embed_positions")


def test_a_module_in_two_groups_is_refused_by_name():
    """It would get two budgets and two learning rates."""
    groups = [{"name": "a", "target_modules": "attention", "blocks": 1}, {"name": "b", "target_modules": ["v_proj"]}]
    config = smt_dist.SMTConfig(block_size=8, groups=groups)
    with pytest.raises(SMTError, match=r"layers\.0\.self_attn\.v_proj belongs to both 'a' and 'b'"):
        find_targets(make_model("llama"), config)


def test_gpt2_is_refused_by_name_because_its_weights_lie_the_other_way_round():
    """Conv1D holds (in, out): its blocks would be transposed without a word."""
    model = build(tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(SMTError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        targets_of(model, "attention")
    with pytest.raises(SMTError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        smt_dist.apply_selection(
            model, smt_dist.BlockSelection(block_size=(8, 8), blocks={"transformer.h.0.attn.c_attn": [(0, 0)]})
        )


def test_mixtral_trains_its_attention_and_refuses_fused_experts_by_name():
    """Three-dimensional experts can't be cut into blocks; leaving them out silently would train something else."""
    model = build(tf.MixtralConfig(**LLAMA_LIKE, num_local_experts=2, num_experts_per_tok=1, sliding_window=None))
    with pytest.raises(SMTError, match=r"model\.layers\.0\.mlp\.experts\.\w+ has 3 dimensions \(2, .*fused experts"):
        targets_of(model, "mlp")
    batches, config = make_batches(2), make_config("attention")
    selection = smt_dist.select_blocks(smt_dist.collect_scores(model, batches, config), config)
    smt_dist.apply_selection(model, selection, config)
    before = model(**batches[0]).loss
    before.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    assert model(**batches[0]).loss < before


def test_a_tied_head_is_refused_unless_untie_is_on():
    """Blocks of a tied head would train the embedding too at the merge, unasked."""
    model = make_model("llama", tie_word_embeddings=True)
    with pytest.raises(SMTError, match=r'lm_head is tied to model\.embed_tokens\.weight; set "untie": true'):
        targets_of(model, ["lm_head"])
    assert targets_of(model, ["lm_head"], untie=True) == ["lm_head"]
    selection = smt_dist.BlockSelection(block_size=(8, 8), blocks={"lm_head": [(0, 0)]})
    with pytest.raises(SMTError, match=r"lm_head is tied to model\.embed_tokens\.weight; pass untie=True"):
        smt_dist.apply_selection(model, selection)
    assert not smt_dist.sparse_layers(model)
    smt_dist.apply_selection(model, selection, make_config(["lm_head"], untie=True))
    assert list(smt_dist.sparse_layers(model)) == ["lm_head"]


def test_a_head_that_is_not_tied_is_an_ordinary_target():
    """The refusal is for ties only."""
    assert targets_of(make_model("llama", tie_word_embeddings=False), ["lm_head"]) == ["lm_head"]


def test_targets_keep_their_names_when_the_model_has_blocks():
    """A second selection, or a check of the adapter, must see the base model's names."""
    model = make_model("llama")
    before = targets_of(model, "attention")
    smt_dist.apply_selection(model, smt_dist.BlockSelection(block_size=(8, 8), blocks={before[1]: [(0, 0)]}))
    assert targets_of(model, "attention") == before
    assert targets_of(model, r".*_proj") == targets_of(make_model("llama"), r".*_proj")


def test_gpt_j_style_names_are_known_to_mlp():
    """fc_in and fc_out are no one else's names, so only this shows that they are in the alias."""
    model = build(tf.GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64))
    assert [name.rpartition(".")[2] for name in targets_of(model, "mlp")] == ["fc_in", "fc_out"]


def test_every_entry_of_a_list_must_match():
    """A misspelt name in a list would leave its weights untrained without a word."""
    with pytest.raises(SMTError, match="'typo_proj' matches no linear module"):
        find_targets(make_model("llama"), make_config(["q_proj", "typo_proj"]))


def test_a_list_may_hold_aliases_and_expressions():
    """``["attention", "mlp"]`` reads as both; taken as names, it would match nothing."""
    model = make_model("llama")
    (names,) = find_targets(model, make_config(["attention", r".*\.1\.mlp\.up_proj"])).values()
    assert names == [f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("q_proj", "k_proj", "v_proj")] + [
        "model.layers.1.mlp.up_proj"
    ]
