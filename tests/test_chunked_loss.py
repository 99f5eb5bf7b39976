"""The loss in chunks of the vocabulary is the loss, under every engine, and no head is gathered whole for it."""

from __future__ import annotations

import logging

import pytest
import torch
from harness import launch
from tiers import all_differences
from tiny_models import save_tiny_llama
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig, MixtralConfig, PhiConfig
from workers.loss import CASES

from smt_dist.models import chunked_loss
from smt_dist.models.chunked_loss import ChunkedLossHead, chunk_loss

VOCABULARY, HIDDEN = 101, 64
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WEIGHT = {"fsdp2_units": "weight", "activation_checkpointing": True}
RUNS = {
    "ddp": {"engine": "ddp", "dtype": "float32"},
    "ddp bf16": {"engine": "ddp", "dtype": "bfloat16"},
    "fsdp2": {"engine": "fsdp2", "dtype": "float32"},
    "fsdp2 bf16": {"engine": "fsdp2", "dtype": "bfloat16"},
    "fsdp2 by weight": {"engine": "fsdp2", "dtype": "float32", **WEIGHT},
    "fsdp2 by weight, no prefetch": {"engine": "fsdp2", "dtype": "float32", **WEIGHT, "fsdp2_prefetch": False},
    "zero3": {"engine": "zero3", "dtype": "float32"},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    # The tokens don't divide over two ranks, nor a rank's part over the chunks.
    return save_tiny_llama(tmp_path_factory.mktemp("model"), vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def found(tmp_path_factory, model_folder):
    """Run -> each of two ranks' findings."""
    folder = tmp_path_factory.mktemp("loss")
    ranks = launch("workers.loss:compare", 2, folder, model=str(model_folder), runs=list(RUNS.values()))
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(RUNS)}


@pytest.mark.parametrize("run", RUNS)
def test_chunks_give_the_plain_loss_and_gradient(found, run):
    """A failure means that another loss is trained than is said; in fp32 only the order of sums may differ."""
    dtype = RUNS[run]["dtype"]
    tolerance = {"float32": 2e-6, "bfloat16": 2e-2}[dtype]
    with all_differences() as check:
        for index, (rank, exact) in enumerate(zip(found[run], found["ddp"], strict=True)):
            for case in CASES:
                chunked = rank["chunked"]["cases"][case]
                reference = (exact if dtype == "float32" else rank)["plain"]["cases"][case]
                for key in ("loss", "gradient"):
                    scale = float(reference[key].abs().max())
                    with check(f"rank {index}: {key} with {case}"):
                        assert float((chunked[key] - reference[key]).abs().max()) <= tolerance * max(scale, 1e-6)
                with check(f"rank {index}: whether there is a gradient with {case}"):
                    assert (float(chunked["gradient"].abs().max()) > 0) == (case != "every label masked")


def test_bf16_chunks_are_as_near_to_the_fp32_truth_as_whole_logits(found):
    """Rounding each chunk's part of the gradient must not add up."""
    for rank, exact in zip(found["ddp bf16"], found["ddp"], strict=True):
        truth = exact["plain"]["cases"]["masked labels, count given"]["gradient"]
        errors = {
            way: float((rank[way]["cases"]["masked labels, count given"]["gradient"] - truth).norm() / truth.norm())
            for way in ("plain", "chunked")
        }
        assert errors["chunked"] <= 1.1 * errors["plain"], errors


@pytest.mark.parametrize("run", [run for run in RUNS if run.startswith("fsdp2")])
def test_fsdp2_never_gathers_the_whole_head(found, run):
    """The head is the largest weight of a model with a large vocabulary; chunks of it must come alone."""
    width = 4 if RUNS[run]["dtype"] == "float32" else 2
    for rank in found[run]:
        layer_units = 2 + 3  # layers; embedding, norm and head, or model
        assert rank["plain"]["largest_gather"] >= width * VOCABULARY * HIDDEN
        if "by weight" in run:
            assert rank["chunked"]["largest_gather"] < rank["plain"]["largest_gather"] or rank["units"] > layer_units
            assert rank["units"] == layer_units + 1 + 2 * 7
        assert rank["world_size"] == 2
        assert rank["head"] == ChunkedLossHead.__name__
        assert rank["gathered_after"] == []


def test_a_recomputation_gives_each_weight_back(tmp_path, model_folder):
    """Else a layer lies there whole in its backward, and cutting it up was for nothing."""
    for found in launch("workers.loss:recompute", 2, tmp_path, model=str(model_folder)):
        assert found["layer, prefetch False"] == 7
        # The weight that computes and the one whose backward has begun.
        assert found["weight, prefetch False"] <= 2
        assert found["weight, prefetch True"] <= 2


# -- one process ------------------------------------------------------------------------------------------------------


def loss_and_gradient(model, **extra):
    """Of one batch, some of its labels masked."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.3, -100)
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=inputs, labels=labels, num_items_in_batch=7, use_cache=False, **extra)
    output.loss.backward()
    return output.loss.detach(), inputs.grad, output.logits


@pytest.mark.parametrize(
    ("kind", "options", "chunked"),
    [
        (LlamaConfig, {}, True),
        (LlamaConfig, {"tie_word_embeddings": True}, True),
        (MixtralConfig, {"num_local_experts": 4, "output_router_logits": True}, True),
        (Gemma2Config, {"head_dim": 16}, False),  # capped logits
        (GraniteConfig, {"logits_scaling": 3.0}, False),
        (PhiConfig, {}, False),  # a bias
    ],
)
def test_architectures_keep_their_loss(kind, options, chunked, caplog):
    """Where a model does more than a head and a cross entropy, the loss must stay whole, and the log must say so."""
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**TINY, **options)).train().requires_grad_(False)
    before = loss_and_gradient(model)
    assert chunk_loss(model, 17) is chunked
    assert ("the loss isn't chunked" in caplog.text) is not chunked
    after = loss_and_gradient(model)
    torch.testing.assert_close(after[0], before[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(after[1], before[1], rtol=1e-4, atol=2e-6 * float(before[1].abs().max()))
    assert (after[2] is None) is chunked


def test_capped_logits_would_be_lost_without_the_guard(monkeypatch):
    """The fault that the guard is there for: chunked by force, a capped model has another loss."""
    torch.manual_seed(0)
    config = Gemma2Config(**TINY, head_dim=16, final_logit_softcapping=1.0)
    model = AutoModelForCausalLM.from_config(config).train().requires_grad_(False)
    before, *_ = loss_and_gradient(model)
    monkeypatch.setattr(chunked_loss, "_why_not", lambda *_: None)
    assert chunk_loss(model, 17)
    after, *_ = loss_and_gradient(model)
    assert abs(after - before) > 0.1


def test_without_labels_a_model_gives_its_logits():
    """Generation and evaluation by logits go through the same model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY)).eval()
    ids = torch.randint(3, VOCABULARY, (2, 5))
    before = model(ids).logits
    assert chunk_loss(model, 17)
    assert chunk_loss(model, 17), "a second time it is left as it is"
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        assert model(ids, labels=ids).logits is None
    assert torch.equal(model(ids, labels=ids, logits_to_keep=5).logits, before)


def test_a_trained_head_keeps_its_gradient():
    """The chunks give the head none: full fine-tuning must not lose it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY)).train()
    assert chunk_loss(model, 17)
    loss_and_gradient(model)
    assert model.get_output_embeddings().weight.grad.abs().max() > 0


@pytest.mark.parametrize(("entries", "targets"), [(0, ()), (17, ("lm_head",))])
def test_a_head_with_blocks_or_no_chunk_is_left_alone(entries, targets):
    """Blocks of the head see its input and the gradient of its logits."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    assert not chunk_loss(model, entries, targets)
    assert isinstance(model.get_output_embeddings(), torch.nn.Linear)
