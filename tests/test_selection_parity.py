"""The blocks are those that dense gradients choose, and neither world size nor engine changes a byte of the file."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch
from harness import launch_engines
from tiers import Check, all_differences, chosen, engines_of, slow_rows_unless
from tiny_models import label_tokens, save_tiny_llama, sum_of_token_losses
from transformers import AutoModelForCausalLM
from workers.runs import GLOBAL_BATCH, shard_group, standard_data
from workers.selection import CUSTOM, PASSES, SCORES, STEPS, STRATEGIES, make_config

from smt_dist.selection.warmup import collect_scores
from smt_dist.sparse.targets import count_parameters_2d, find_targets

LAUNCHES = {1: ["ddp"], 2: ["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"], 4: ["ddp", "hsdp"]}
RUNS = [(world_size, engine) for world_size, engines in LAUNCHES.items() for engine in engines]
ALONE = (1, "ddp")
QUICK = [ALONE, (2, "ddp"), (2, "fsdp2"), (2, "zero3")]
each_run = pytest.mark.parametrize(("world_size", "engine"), slow_rows_unless(RUNS, lambda *run: run in QUICK))
BLOCK_ROWS, BLOCK_COLS = 16, 8
# By a formula; the others are tested in test_weight_scores.py.
COMPUTED = [score for score in SCORES if score not in ("random", "diagonal")]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A vocabulary that blocks of 16 rows divide, so that embedding and head are targets too."""
    return save_tiny_llama(tmp_path_factory.mktemp("model"), vocab_size=112)


@pytest.fixture(scope="module")
def found(request, tmp_path_factory, model_folder):
    """(world size, engine) -> each rank's findings."""
    folder, asked = tmp_path_factory.mktemp("launches"), {ALONE, *chosen(request, "world_size", "engine")}
    launches = engines_of(run for run in RUNS if run in asked)
    return launch_engines("workers.selection:select_with", launches, folder, model=str(model_folder))


class Dense(NamedTuple):
    """What plain PyTorch finds in one process, module by module.

    Attributes:
        gradients: one for each global step.
        weights: the weights.
        input_rms: root mean square of each input column over the tokens that the mask shows; not of the embedding.
        groups: of the config.
        parameters_2d: of the model.
    """

    gradients: dict[str, list[torch.Tensor]]
    weights: dict[str, torch.Tensor]
    input_rms: dict[str, torch.Tensor]
    groups: dict[str, list[str]]
    parameters_2d: int


@pytest.fixture(scope="module")
def dense(model_folder):
    """Gradients by plain autograd, inputs by plain hooks."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    groups = find_targets(model, make_config("l1"))
    data = standard_data()
    inputs = {name: [] for names in groups.values() for name in names if "embed" not in name}
    for name, seen in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
    masks = []
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(data.train), generator=generator) for _ in range(2)]).tolist()
    gradients = {name: [] for names in groups.values() for name in names}
    for step in range(STEPS):
        batch = data.collator([data.train[i] for i in order[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]])
        model.zero_grad()
        masks.append(batch["attention_mask"].bool())
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        (sum_of_token_losses(logits, batch["labels"]) / label_tokens(batch["labels"])).backward()
        for name, steps in gradients.items():
            steps.append(model.get_submodule(name).weight.grad.clone())
    order_in_model = [name for name, _ in model.named_modules() if name in gradients]
    real = {name: torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)]) for name, seen in inputs.items()}
    return Dense(
        gradients={name: gradients[name] for name in order_in_model},
        weights={name: model.get_submodule(name).weight.detach() for name in order_in_model},
        input_rms={name: tokens.double().square().mean(0).sqrt() for name, tokens in real.items()},
        groups=groups,
        parameters_2d=count_parameters_2d(model),
    )


def blocks_of(matrix: torch.Tensor) -> torch.Tensor:
    """``[block rows, block columns, elements]`` in fp64."""
    rows, cols = matrix.shape
    blocks = matrix.double().reshape(rows // BLOCK_ROWS, BLOCK_ROWS, cols // BLOCK_COLS, BLOCK_COLS)
    return blocks.transpose(1, 2).flatten(2)


def score_of(gradient: torch.Tensor, score: str) -> torch.Tensor:
    """Each block's score, by the formulas of the paper's appendix, from the dense gradient."""
    blocks = blocks_of(gradient)
    return {
        "mean_abs": blocks.mean(-1).abs(),
        "abs_mean": blocks.abs().mean(-1),
        "l1": blocks.abs().sum(-1),
        "l2": blocks.square().sum(-1).sqrt(),
    }[score]


def dense_tables(dense: Dense, score: str) -> dict[str, torch.Tensor]:
    """Scores of the summed gradient, the mean of the steps' scores, or what else a score is made of."""
    name = score.removesuffix("_per_step")
    if name != score:
        return {m: torch.stack([score_of(g, name) for g in steps]).mean(0) for m, steps in dense.gradients.items()}
    return {module: dense_table(dense, score, module) for module in dense.gradients if scored(module, score)}


def scored(module: str, score: str) -> bool:
    """Whether a config of this score has the module among its targets."""
    return "layers" in module or score not in ("activation", CUSTOM)


def dense_table(dense: Dense, score: str, module: str) -> torch.Tensor:
    gradient, weight = torch.stack(dense.gradients[module]).sum(0), dense.weights[module]
    if score == "grad_x_weight":
        return blocks_of(gradient * weight).abs().mean(-1)
    if score == "magnitude":
        return blocks_of(weight).abs().mean(-1)
    if score == "activation":
        return blocks_of(dense.input_rms[module].expand(weight.shape)).square().mean(-1).sqrt()
    if score == CUSTOM:
        return blocks_of(gradient.double() * weight.double() * dense.input_rms[module]).var(-1)
    return score_of(gradient, score)


def brute_force(tables: dict[str, torch.Tensor], modules: list[str], budget: int) -> tuple[set, float]:
    """The best blocks, and the relative gap between the last one in and the first one out."""
    ranked = sorted(
        ((-float(tables[module][row, col]), order, row, col, module))
        for order, module in enumerate(modules)
        for row in range(tables[module].shape[0])
        for col in range(tables[module].shape[1])
    )
    gap = 1 - ranked[budget][0] / ranked[budget - 1][0] if 0 < budget < len(ranked) else 1.0
    if 0 < budget < len(ranked) and ranked[budget][0] == ranked[budget - 1][0]:
        gap = 1.0  # equal on purpose, as blocks below one another are by their input: their order decides
    return {(module, row, col) for _, _, row, col, module in ranked[:budget]}, gap


def evenly(tables: dict[str, torch.Tensor], modules: list[str], budget: int) -> tuple[set, float]:
    """A block from every weight in turn, round by round; the last round's go to the best. And the smallest gap."""
    counts = dict.fromkeys(modules, 0)
    gaps = []
    while budget:
        open_to = [module for module in modules if counts[module] < tables[module].numel()]
        if len(open_to) > budget:
            following = {m: tables[m].flatten().sort(descending=True).values[counts[m]] for m in open_to}
            order = sorted(open_to, key=lambda module: -following[module])
            last, first_out = following[order[budget - 1]], following[order[budget]]
            gaps.append(float(1 - first_out / last) if first_out != last else 1.0)
            open_to = order[:budget]
        for module in open_to:
            counts[module] += 1
        budget -= len(open_to)
    cuts = [brute_force(tables, [module], count) for module, count in counts.items()]
    return set().union(*(blocks for blocks, _ in cuts)), min([*gaps, *(gap for _, gap in cuts)])


def expected_blocks(tables: dict, groups: dict, parameters_2d: int, strategy: str) -> tuple[set, float]:
    """The selection by hand, and the smallest gap of its cuts."""
    budgets = {"attention": 13, "mlp": int(0.05 * parameters_2d / (BLOCK_ROWS * BLOCK_COLS)), "ends": 9}
    chosen, gaps = set(), []
    for group, members in groups.items():
        modules = [module for module in members if module in tables]
        if not modules:
            continue
        if strategy == "no_restriction":
            cuts = [(modules, budgets[group])]
        elif strategy == "even":
            even, gap = evenly(tables, modules, budgets[group])
            chosen |= even
            gaps.append(gap)
            continue
        else:
            share, rest = divmod(budgets[group], len(modules))
            cuts = [([module], share + (index < rest)) for index, module in enumerate(modules)]
        for cut_modules, budget in cuts:
            blocks, gap = brute_force(tables, cut_modules, budget)
            chosen |= blocks
            gaps.append(gap)
    return chosen, min(gaps)


@pytest.mark.parametrize("score", COMPUTED)
def test_selection_is_the_one_that_dense_computation_makes(found, dense, score):
    """Otherwise SMT trains other blocks than it says, and nothing else would show it."""
    with all_differences() as check:
        for strategy in STRATEGIES:
            expected, gap = expected_blocks(dense_tables(dense, score), dense.groups, dense.parameters_2d, strategy)
            selection = json.loads(found[ALONE][0]["selections"][f"{score}, {strategy}, 1"])
            with check(f"{strategy}: the seed makes a tie that rounding decides: the comparison would mean nothing"):
                # Weights are the same bits everywhere; gradients and inputs are rounded.
                assert gap > (1e-9 if score == "magnitude" else 1e-5)
            with check(strategy):
                assert {(m, row, col) for m, blocks in selection["blocks"].items() for row, col in blocks} == expected


@each_run
def test_selections_and_scores_are_those_of_one_process(found, dense, world_size, engine):
    """Otherwise a selection couldn't be made on a small machine and used on a large one, or be reproduced.

    A wrong normalisation over ranks or micro-batches would shift scores without always changing the choice.
    """
    reference = found[ALONE][0]["selections"]
    assert len(reference) == len(STRATEGIES) * sum(map(len, PASSES.values()))
    expected = {score: dense_tables(dense, score) for score in COMPUTED}
    with all_differences() as check:
        for index, rank in enumerate(found[world_size, engine]):
            with check(f"rank {index}: world size"):
                assert rank["world_size"] == world_size
            for name, selection in reference.items():
                with check(f"rank {index}: bytes of the selection by {name}"):
                    assert rank["selections"].get(name) == selection
            with check(f"rank {index}: names of selections"):
                assert set(rank["selections"]) == set(reference)
            check_scores(check, index, rank["tables"], expected)


def check_scores(check: Check, index: int, tables: dict, expected: dict[str, dict[str, torch.Tensor]]) -> None:
    """Compare a rank's scores with the dense ones."""
    for score, truths in expected.items():
        for passes in PASSES[score]:
            found = tables[f"{score}, {passes}"]
            with check(f"rank {index}: modules scored by {score}, {passes}"):
                assert list(found) == list(truths)
            for module, table in found.items():
                with check(f"rank {index}: {score}, {passes} of {module}"):
                    # Relative to the module's scale: the mean of a block may cancel to nearly nothing.
                    assert (table - truths[module]).abs().max() <= 1e-5 * truths[module].max()


@each_run
def test_passes_change_nothing_but_memory(found, world_size, engine):
    """Scoring moves no weight, so a pass for each half of the layers must give the same answer."""
    selections = found[world_size, engine][0]["selections"]
    with all_differences() as check:
        for score in (score for score in SCORES if len(PASSES[score]) > 1):
            for strategy in STRATEGIES:
                with check(f"{score}, {strategy}"):
                    assert selections[f"{score}, {strategy}, 1"] == selections[f"{score}, {strategy}, 2"]


def test_every_pass_sees_the_same_dropout(tmp_path):
    """Were masks drawn anew in the second pass, its layers' scores would come from another model than the first's."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path, attention_dropout=0.5, vocab_size=112))
    data = standard_data()
    batches = [data.collator([data.train[index] for index in range(start, start + 8)]) for start in (8, 16, 24)]
    state = torch.get_rng_state()
    once, twice = (collect_scores(model, batches, make_config("l1", passes=passes)).tables for passes in (1, 2))
    assert all(torch.equal(once[module], twice[module]) for module in once)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers mustn't depend on the warm-up"


@each_run
def test_the_comparison_covers_what_it_should(found, world_size, engine):
    """Guards the tests above: partitioned bases, and ranks whose micro-batch has no label at all."""
    whole, ranks = found[ALONE][0]["base_elements_held"], found[world_size, engine]
    for rank in ranks:
        assert rank["base_elements_held"] == whole // shard_group(engine, world_size)
        assert rank["base_elements_after"] == rank["base_elements_held"], "weights were left gathered"
        assert rank["gradients"] == 0
    if world_size > 1:
        without = [rank["micro_batches_without_labels"] for rank in ranks]
        assert min(without) < max(without), "a rank has a micro-batch without labels where another has some"
