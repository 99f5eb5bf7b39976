"""The blocks are those that dense gradients choose, and neither world size nor engine changes a byte of the file."""

from __future__ import annotations

import json

import pytest
import torch
from harness import launch_engines
from tiny_models import label_tokens, save_tiny_llama, sum_of_token_losses
from transformers import AutoModelForCausalLM
from workers.runs import GLOBAL_BATCH, shard_group, standard_data
from workers.selection import PASSES, SCORES, STEPS, STRATEGIES, make_config

from smt_dist.targets import count_parameters_2d, find_targets
from smt_dist.warmup import collect_scores

LAUNCHES = {1: ["ddp"], 2: ["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"], 4: ["ddp", "hsdp"]}
RUNS = [(world_size, engine) for world_size, engines in LAUNCHES.items() for engine in engines]
BLOCK_ROWS, BLOCK_COLS = 16, 8


@pytest.fixture(scope="module")
def found(tmp_path_factory, model_folder):
    """(world size, engine) -> each rank's findings."""
    folder = tmp_path_factory.mktemp("launches")
    return launch_engines("workers.selection:select_with", LAUNCHES, folder, model=str(model_folder))


@pytest.fixture(scope="module")
def step_gradients(model_folder):
    """Module -> one dense gradient for each global step, by plain autograd in one process; and the model."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    groups = find_targets(model, make_config("l1"))
    data = standard_data()
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(data.train), generator=generator) for _ in range(2)]).tolist()
    gradients = {name: [] for names in groups.values() for name in names}
    for step in range(STEPS):
        batch = data.collator([data.train[i] for i in order[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]])
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        (sum_of_token_losses(logits, batch["labels"]) / label_tokens(batch["labels"])).backward()
        for name, steps in gradients.items():
            steps.append(model.get_submodule(name).weight.grad.clone())
    order_in_model = [name for name, _ in model.named_modules() if name in gradients]
    return {name: gradients[name] for name in order_in_model}, groups, count_parameters_2d(model)


def score_of(gradient: torch.Tensor, score: str) -> torch.Tensor:
    """Each block's score, by the formulas of the paper's appendix, from the dense gradient."""
    rows, cols = gradient.shape
    blocks = gradient.double().reshape(rows // BLOCK_ROWS, BLOCK_ROWS, cols // BLOCK_COLS, BLOCK_COLS)
    blocks = blocks.transpose(1, 2).flatten(2)
    return {
        "mean_abs": blocks.mean(-1).abs(),
        "abs_mean": blocks.abs().mean(-1),
        "l1": blocks.abs().sum(-1),
        "l2": blocks.square().sum(-1).sqrt(),
    }[score]


def dense_tables(gradients: dict[str, list[torch.Tensor]], score: str) -> dict[str, torch.Tensor]:
    """Scores of the summed gradient, or the mean of the steps' scores."""
    name = score.removesuffix("_per_step")
    if name != score:
        return {m: torch.stack([score_of(g, name) for g in steps]).mean(0) for m, steps in gradients.items()}
    return {module: score_of(torch.stack(steps).sum(0), name) for module, steps in gradients.items()}


def brute_force(tables: dict[str, torch.Tensor], modules: list[str], budget: int) -> tuple[set, float]:
    """The best blocks, and the relative gap between the last one in and the first one out."""
    ranked = sorted(
        ((-float(tables[module][row, col]), order, row, col, module))
        for order, module in enumerate(modules)
        for row in range(tables[module].shape[0])
        for col in range(tables[module].shape[1])
    )
    gap = 1 - ranked[budget][0] / ranked[budget - 1][0] if 0 < budget < len(ranked) else 1.0
    return {(module, row, col) for _, _, row, col, module in ranked[:budget]}, gap


def expected_blocks(tables: dict, groups: dict, parameters_2d: int, strategy: str) -> tuple[set, float]:
    """The selection by hand, and the smallest gap of its cuts."""
    budgets = {"attention": 13, "mlp": int(0.05 * parameters_2d / (BLOCK_ROWS * BLOCK_COLS))}
    chosen, gaps = set(), []
    for group, modules in groups.items():
        if strategy == "no_restriction":
            cuts = [(modules, budgets[group])]
        else:
            share, rest = divmod(budgets[group], len(modules))
            cuts = [([module], share + (index < rest)) for index, module in enumerate(modules)]
        for cut_modules, budget in cuts:
            blocks, gap = brute_force(tables, cut_modules, budget)
            chosen |= blocks
            gaps.append(gap)
    return chosen, min(gaps)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("score", SCORES)
def test_selection_is_the_one_that_dense_gradients_make(found, step_gradients, score, strategy):
    """Otherwise SMT trains other blocks than it says, and nothing else would show it."""
    gradients, groups, parameters_2d = step_gradients
    expected, gap = expected_blocks(dense_tables(gradients, score), groups, parameters_2d, strategy)
    assert gap > 1e-5, "the seed makes a tie that rounding decides: the comparison would mean nothing"
    selection = json.loads(found[1, "ddp"][0]["selections"][f"{score}, {strategy}, 1"])
    assert {(m, row, col) for m, blocks in selection["blocks"].items() for row, col in blocks} == expected


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("world_size", "engine"), RUNS)
def test_scores_equal_those_of_dense_gradients(found, step_gradients, world_size, engine, score):
    """A wrong normalisation over ranks or micro-batches would shift scores without always changing the choice."""
    expected = dense_tables(step_gradients[0], score)
    for rank in found[world_size, engine]:
        for passes in PASSES[score]:
            tables = rank["tables"][f"{score}, {passes}"]
            assert list(tables) == list(expected)
            for module, table in tables.items():
                # Relative to the module's scale: the mean of a block may cancel to nearly nothing.
                assert (table - expected[module]).abs().max() <= 1e-5 * expected[module].max(), module


@pytest.mark.parametrize(("world_size", "engine"), RUNS)
def test_selection_file_has_the_same_bytes_on_any_world_size_and_engine(found, world_size, engine):
    """Otherwise a selection couldn't be made on a small machine and used on a large one, or be reproduced."""
    reference = found[1, "ddp"][0]["selections"]
    assert len(reference) == len(STRATEGIES) * sum(map(len, PASSES.values()))
    for rank in found[world_size, engine]:
        assert rank["world_size"] == world_size
        assert rank["selections"] == reference


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("score", [score for score in SCORES if len(PASSES[score]) > 1])
def test_passes_change_nothing_but_memory(found, score, strategy):
    """Probing moves no weight, so a pass for each half of the layers must give the same answer."""
    for ranks in found.values():
        selections = ranks[0]["selections"]
        assert selections[f"{score}, {strategy}, 1"] == selections[f"{score}, {strategy}, 2"]


def test_every_pass_sees_the_same_dropout(tmp_path):
    """Were masks drawn anew in the second pass, its layers' scores would come from another model than the first's."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path, attention_dropout=0.5))
    data = standard_data()
    batches = [data.collator([data.train[index] for index in range(start, start + 8)]) for start in (8, 16, 24)]
    state = torch.get_rng_state()
    once, twice = (collect_scores(model, batches, make_config("l1", passes=passes)).tables for passes in (1, 2))
    assert all(torch.equal(once[module], twice[module]) for module in once)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers mustn't depend on the warm-up"


def test_the_comparison_covers_what_it_should(found):
    """Guards the tests above: partitioned bases, and ranks whose micro-batch has no label at all."""
    whole = found[1, "ddp"][0]["base_elements_held"]
    for (world_size, engine), ranks in found.items():
        for rank in ranks:
            assert rank["base_elements_held"] == whole // shard_group(engine, world_size)
            assert rank["gradients"] == 0
        if world_size > 1:
            without = [rank["micro_batches_without_labels"] for rank in ranks]
            assert min(without) < max(without), "a rank has a micro-batch without labels where another has some"
