"""Blocks go into a model and come out of it without a trace on the base."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import logits_of, make_batches, make_model

import smt_dist
from smt_dist import BlockSelection, SMTConfig
from smt_dist.errors import SMTError
from smt_dist.sparse.fingerprint import base_fingerprint
from smt_dist.sparse.surgery import describe_blocks

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SELECTION = BlockSelection(block_size=(8, 8), blocks={Q: [(0, 1), (3, 0)], V: [(1, 2)]})


def with_blocks(selection: BlockSelection = SELECTION, std: float = 0.5, **options):
    """A tiny Llama whose blocks differ from zero."""
    model = make_model("llama", **options)
    smt_dist.apply_selection(model, selection)
    fill(model, std)
    return model


def fill(model, std: float = 0.5, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in smt_dist.sparse_layers(model).values():
        layer.delta.data.normal_(std=std, generator=generator)


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_only_the_blocks_are_trainable_and_the_base_is_untouched():
    """A base weight that trains along isn't in the adapter, and costs full fine-tuning's memory."""
    model, base = with_blocks(), make_model("llama").state_dict()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [f"{Q}.delta", f"{V}.delta"]
    for name, value in model.state_dict().items():
        if not name.endswith(".delta"):
            assert torch.equal(value, base[name.replace(".base.", ".")])
    assert not torch.equal(logits_of(model), logits_of(make_model("llama")))


def test_blocks_act_as_their_sum_with_the_weight_would():
    """Rows are outputs and columns inputs: a transposed or misplaced block fails here."""
    model, dense = with_blocks(), make_model("llama")
    for name, layer in smt_dist.sparse_layers(model).items():
        weight = dense.get_submodule(name).weight
        for index, (row, col) in enumerate(SELECTION.blocks[name]):
            weight.data[row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] += layer.delta.data[index * 8 : index * 8 + 8]
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-5, atol=1e-6)


def test_blocks_take_the_mode_of_the_module_that_they_wrap():
    """`model.eval()` before the blocks came must hold after."""
    model = make_model("llama").train()
    smt_dist.apply_selection(model, SELECTION)
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ({"model.layers.7.self_attn.q_proj": [(0, 0)]}, r"LlamaForCausalLM\) has no module model.layers.7"),
        ({"model.layers.0.input_layernorm": [(0, 0)]}, "input_layernorm is a LlamaRMSNorm"),
        ({"model.layers.0": [(0, 0)]}, "model.layers.0 is a LlamaDecoderLayer"),
        ({Q: [(0, 0)], V: [(2, 0)]}, r"v_proj: block \(2, 0\) lies outside its 2 x 4 grid"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused_and_leaves_the_model_alone(blocks, problem):
    """Half a selection in the model would train half of what was chosen."""
    model = make_model("llama")
    before = state_of(model)
    with pytest.raises(SMTError, match=problem):
        smt_dist.apply_selection(model, BlockSelection(block_size=(8, 8), blocks=blocks))
    assert_same_state(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_block_size_that_does_not_divide_is_refused_by_module():
    """A selection for another model, most likely."""
    with pytest.raises(SMTError, match=r"q_proj.*32 x 32 can't be cut into 5 x 8"):
        smt_dist.apply_selection(make_model("llama"), BlockSelection(block_size=(5, 8), blocks={Q: [(0, 0)]}))


def test_a_second_selection_needs_the_first_removed():
    """Blocks on blocks would count twice and be saved once."""
    model = with_blocks()
    with pytest.raises(SMTError, match="remove_blocks"):
        smt_dist.apply_selection(model, SELECTION)
    smt_dist.remove_blocks(model)
    smt_dist.apply_selection(model, SELECTION)
    assert torch.equal(logits_of(model), logits_of(make_model("llama")))


def test_removed_blocks_leave_the_base_bit_for_bit():
    """The base is never written: taking the blocks out must give exactly the model that was loaded."""
    model, base = with_blocks(), make_model("llama")
    smt_dist.remove_blocks(model)
    assert_same_state(model, state_of(base))
    assert torch.equal(logits_of(model), logits_of(base))
    assert not smt_dist.sparse_layers(model)
    assert not hasattr(model, "smt")


def test_disabled_blocks_give_the_base_exactly_and_come_back():
    """The base is needed beside the tuned model (as a reference, say): nearly the base isn't enough."""
    model, base = with_blocks(), make_model("llama")
    tuned = logits_of(model)
    with smt_dist.blocks_disabled(model):
        assert torch.equal(logits_of(model), logits_of(base))
    assert torch.equal(logits_of(model), tuned)


def test_disabled_blocks_come_back_after_an_exception():
    """Otherwise a caught error leaves the base where the tuned model is expected, without a word."""
    model = with_blocks()
    tuned = logits_of(model)
    with pytest.raises(KeyError), smt_dist.blocks_disabled(model):
        raise KeyError
    assert torch.equal(logits_of(model), tuned)


def test_disabling_inside_disabling_gives_back_what_was_there():
    """The inner context may not switch on what the outer one switched off; nor a layer that was off before."""
    model, base = with_blocks(), make_model("llama")
    with smt_dist.blocks_disabled(model):
        with smt_dist.blocks_disabled(model):
            pass
        assert torch.equal(logits_of(model), logits_of(base))
    model.get_submodule(Q).enabled = False
    with smt_dist.blocks_disabled(model):
        pass
    assert [layer.enabled for layer in smt_dist.sparse_layers(model).values()] == [False, True]


def test_disabled_blocks_get_no_gradient():
    """A step taken inside the context may not move blocks that took no part."""
    model = with_blocks()
    model.model.embed_tokens.weight.requires_grad_(True)
    with smt_dist.blocks_disabled(model):
        model(**make_batches(1)[0]).loss.backward()
    assert all(layer.delta.grad is None for layer in smt_dist.sparse_layers(model).values())


def test_the_fingerprint_tells_bases_apart_but_not_dtypes():
    """An adapter belongs to one base; loading that base in bf16 or putting blocks in it makes no other base."""
    fingerprint = base_fingerprint(make_model("llama"), SELECTION)
    assert base_fingerprint(make_model("llama"), SELECTION) == fingerprint
    assert base_fingerprint(make_model("llama", dtype=torch.float32).bfloat16(), SELECTION) == fingerprint
    assert base_fingerprint(with_blocks(), SELECTION) == fingerprint
    assert base_fingerprint(make_model("llama", seed=1), SELECTION) != fingerprint
    nudged = make_model("llama")
    nudged.get_submodule(V).weight.data[8, 16] += 0.1
    assert base_fingerprint(nudged, SELECTION) != fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_fp32_masters_by_default_and_compute_in_the_bases_dtype(dtype):
    """A bf16 master loses most small steps; an fp32 output would change the model's dtype."""
    model = with_blocks(dtype=dtype)
    assert all(layer.delta.dtype == torch.float32 for layer in smt_dist.sparse_layers(model).values())
    assert logits_of(model).dtype == dtype


def test_a_copied_model_has_blocks_of_its_own():
    """`copy.deepcopy` is how a reference model is kept; shared blocks would train both."""
    model = with_blocks()
    twin = copy.deepcopy(model)
    expected = logits_of(model)
    fill(twin, seed=2)
    assert torch.equal(logits_of(model), expected)
    assert not torch.equal(logits_of(twin), expected)


def test_greedy_generation_uses_the_blocks_and_the_cache():
    """Evaluation generates token by token: blocks must act on inputs of one token too."""
    model = with_blocks(std=2.0)
    ids = make_batches(1)[0]["input_ids"][:1, :4]
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)
    whole = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(cached, whole)
    with smt_dist.blocks_disabled(model):
        base = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert not torch.equal(cached, base)


def test_the_description_counts_blocks_and_their_share_of_the_base():
    """The line that tells a user what is trained: 3 blocks of 64 elements here."""
    model = with_blocks()
    base = sum(parameter.numel() for parameter in make_model("llama").parameters())
    assert describe_blocks(model) == (
        f"3 blocks in 2 modules, 192 trainable parameters = {192 / base:.2%} of the model's {base:,}"
    )


def test_scoring_leaves_the_model_as_it_was():
    """Hooks, frozen parameters, training mode or a switched-off cache that stay behind would change the run."""
    model = make_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    before, flags = state_of(model), [p.requires_grad for p in model.parameters()]
    config = SMTConfig(block_size=8, groups=[{"blocks": 2}], warmup={"steps": 2})
    random_state = torch.get_rng_state()
    smt_dist.collect_scores(model, make_batches(2), config)
    assert_same_state(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert not model.training
    assert model.config.use_cache
    assert torch.equal(torch.get_rng_state(), random_state)


def test_scoring_names_the_module_whose_gradient_is_not_finite():
    """NaN scores would sort anywhere: the choice would be arbitrary."""
    model = make_model("llama")
    model.get_submodule(V).weight.data[0, 0] = float("nan")
    config = SMTConfig(block_size=8, groups=[{"blocks": 2}], warmup={"steps": 1})
    with pytest.raises(SMTError, match=r"warm-up step 1: the gradient of model\.layers.*_proj is not finite"):
        smt_dist.collect_scores(model, make_batches(1), config)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_size": 8, "groups": [{"name": "attn", "lr_multiplier": 10.0}]}, "group 'attention' is not in"),
        ({"block_size": 16}, r"blocks are \(8, 8\), the smt config's block_size is 16"),
    ],
)
def test_selection_of_another_config_is_refused(config, message):
    """Taken, its blocks would train without their learning-rate multiplier, and be saved beside a false config."""
    selection = BlockSelection(
        block_size=(8, 8),
        blocks={"model.layers.0.self_attn.q_proj": [(0, 0)]},
        groups={"model.layers.0.self_attn.q_proj": "attention"},
    )
    with pytest.raises(SMTError, match=message):
        smt_dist.apply_selection(make_model("llama"), selection, SMTConfig.model_validate(config))


def test_adapter_that_is_refused_leaves_the_blocks_that_are_there(tmp_path):
    """Failure: a wrong path or base costs the user the blocks in memory."""
    selection = BlockSelection(block_size=(8, 8), blocks={"model.layers.0.self_attn.q_proj": [(0, 0)]})
    other, model = make_model("llama", seed=1), make_model("llama")
    smt_dist.apply_selection(other, selection)
    smt_dist.save_adapter(other, tmp_path)
    smt_dist.apply_selection(model, selection)
    with pytest.raises(SMTError, match="another base model"):
        smt_dist.load_adapter(model, tmp_path)
    assert list(smt_dist.sparse_layers(model)) == ["model.layers.0.self_attn.q_proj"]
