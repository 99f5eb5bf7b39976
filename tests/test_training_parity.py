"""Training the blocks is masked dense training, and engine, world size and recomputation change only rounding."""

from __future__ import annotations

import pytest
import torch
from harness import launch
from tiny_models import label_tokens, sum_of_token_losses
from transformers import AutoModelForCausalLM
from workers.runs import GLOBAL_BATCH
from workers.training import (
    BLOCK,
    BLOCKS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MULTIPLIERS,
    STEPS,
    WEIGHT_DECAY,
    fixed_data,
    group_of,
)

TOLERANCE = 1e-5

ZERO_1_2 = "DeepSpeedEngine, DeepSpeedZeroOptimizer"
ENGINE_TYPES = {
    ("ddp", 1): "LlamaForCausalLM, AdamW",
    ("ddp", 2): "DistributedDataParallel, AdamW",
    ("ddp", 4): "DistributedDataParallel, AdamW",
    ("zero1", 2): ZERO_1_2,
    ("zero2", 2): ZERO_1_2,
    ("zero3", 2): "DeepSpeedEngine, DeepSpeedZeroOptimizer_Stage3",
    ("zero3", 4): "DeepSpeedEngine, DeepSpeedZeroOptimizer_Stage3",
}
# (accumulation, gradient checkpointing) of each launch's runs, one after the other in the same processes.
PLANS = {
    1: {"ddp": [(1, False), (2, False), (2, True)]},
    2: {
        "ddp": [(1, False), (2, True)],
        "zero1": [(2, False)],
        "zero2": [(1, False), (2, True)],
        "zero3": [(1, False), (2, False), (2, True)],
    },
    4: {"ddp": [(2, False)], "zero3": [(2, True)]},
}
RUNS = [
    (world_size, engine, *plan)
    for world_size, engines in PLANS.items()
    for engine, plans in engines.items()
    for plan in plans
]
each_run = pytest.mark.parametrize("run", RUNS, ids=lambda r: f"{r[1]}-{r[0]}ranks-acc{r[2]}-ckpt{int(r[3])}")


@pytest.fixture(scope="module")
def found(tmp_path_factory, model_folder):
    """(world size, engine, accumulation, checkpointing) -> each rank's findings."""
    results = {}
    for world_size in PLANS:
        runs = [run for run in RUNS if run[0] == world_size]
        ranks = launch(
            "workers.training:train",
            world_size,
            tmp_path_factory.mktemp(f"ranks{world_size}"),
            model=str(model_folder),
            runs=[{"engine": e, "accumulation": a, "checkpointing": c} for _, e, a, c in runs],
        )
        results |= {run: [rank[index] for rank in ranks] for index, run in enumerate(runs)}
    return results


@pytest.fixture(scope="module")
def reference(found):
    """One process, the whole global batch at once."""
    return found[1, "ddp", 1, False][0]


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The relative norm of the difference of all blocks."""
    assert set(actual) == set(expected)
    ours, theirs = (torch.cat([blocks[name].flatten() for name in sorted(expected)]) for blocks in (actual, expected))
    return float((ours - theirs).norm() / theirs.norm())


def masked_dense_training(model_folder):
    """Losses, gradient norms and final blocks by plain PyTorch: full-weight gradients, masked; AdamW written out."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    weights = {name: model.get_submodule(name).weight for name in BLOCKS}
    base = {name: weight.detach().clone() for name, weight in weights.items()}
    masks = {name: torch.zeros_like(weight) for name, weight in base.items()}
    for name, blocks in BLOCKS.items():
        for row, col in blocks:
            masks[name][row * BLOCK[0] : (row + 1) * BLOCK[0], col * BLOCK[1] : (col + 1) * BLOCK[1]] = 1
    first = {name: torch.zeros_like(weight) for name, weight in base.items()}
    second = {name: torch.zeros_like(weight) for name, weight in base.items()}
    data, losses, norms = fixed_data(), [], []
    for step in range(STEPS):
        batch = data.collator([data.train[i] for i in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)])
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = sum_of_token_losses(logits, batch["labels"]) / label_tokens(batch["labels"])
        loss.backward()
        gradients = {name: weight.grad * masks[name] for name, weight in weights.items()}
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        losses.append(loss.item())
        norms.append(norm.item())
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = gradients[name] * min(1.0, MAX_GRAD_NORM / (norm.item() + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                rate = LEARNING_RATE * MULTIPLIERS[group_of(name)] * (1 - step / STEPS)
                delta = (weight - base[name]) * (1 - rate * WEIGHT_DECAY)  # decay pulls the model to its base
                moment = first[name] / (1 - 0.9 ** (step + 1))
                scale = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                weight.copy_(base[name] + delta - masks[name] * rate * moment / scale)
    blocks = {
        name: torch.cat(
            [
                (weights[name] - base[name])[
                    row * BLOCK[0] : (row + 1) * BLOCK[0], col * BLOCK[1] : (col + 1) * BLOCK[1]
                ]
                for row, col in cells
            ]
        ).detach()
        for name, cells in BLOCKS.items()
    }
    return losses, norms, blocks


def test_one_process_equals_masked_dense_training(reference, model_folder):
    """The definition of SMT: full fine-tuning of the model in which all but the blocks stand still."""
    losses, norms, blocks = masked_dense_training(model_folder)
    assert reference["losses"] == pytest.approx(losses, rel=TOLERANCE)
    assert reference["gradient_norms"] == pytest.approx(norms, rel=TOLERANCE)
    assert max(norms) > MAX_GRAD_NORM, "clipping has to act, or it isn't tested"
    # base + delta rounds at the base's scale, which the additive blocks don't; hence a little more room.
    assert distance(reference["blocks"], blocks) <= 5 * TOLERANCE


@each_run
def test_losses_equal_one_process(found, reference, run):
    """A wrong average over ranks, micro-batches or tokens shows here, from the second step on in the blocks too."""
    for rank in found[run]:
        assert len(rank["losses"]) == STEPS
        assert rank["losses"] == pytest.approx(reference["losses"], rel=TOLERANCE)
        assert rank["gradient_norms"] == pytest.approx(reference["gradient_norms"], rel=TOLERANCE)
        assert rank["learning_rates"] == pytest.approx(reference["learning_rates"], rel=1e-12)


@each_run
def test_final_blocks_equal_one_process(found, reference, run):
    """Equal losses over a few steps can hide a group whose learning rate was dropped; equal blocks can't."""
    for rank in found[run]:
        assert distance(rank["blocks"], reference["blocks"]) <= TOLERANCE
        for module, blocks in rank["blocks"].items():
            assert distance({module: blocks}, {module: reference["blocks"][module]}) <= 10 * TOLERANCE, module


@each_run
def test_ranks_hold_the_same_blocks(found, run):
    """Ranks that drift apart would each train a model of their own."""
    first, *others = found[run]
    for other in others:
        assert all(torch.equal(other["blocks"][module], first["blocks"][module]) for module in BLOCKS)


@each_run
def test_run_was_what_it_claims_to_be(found, reference, run):
    """Guards the tests above: the engine's type, the world size, recomputation, and that every block moved."""
    world_size, engine, _, checkpointing = run
    for rank in found[run]:
        assert rank["world_size"] == world_size
        assert rank["engine"] == ENGINE_TYPES[engine, world_size]
        assert (rank["layers_recomputed"] > 0) == checkpointing
        assert rank["trainable"] == sorted(f"{module}.delta" for module in BLOCKS)
        held = reference["base_elements_held"]
        assert rank["base_elements_held"] == (held // world_size if engine == "zero3" else held)
        for module, blocks in rank["blocks"].items():
            cells = blocks.view(len(BLOCKS[module]), -1)
            assert (cells.abs().amax(1) > LEARNING_RATE).all(), f"a block of {module} didn't move"
