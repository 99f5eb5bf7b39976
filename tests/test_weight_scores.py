"""Scores that need no data: what they are, and that nothing is run or read for them."""

from __future__ import annotations

import math

import pytest
import torch
from programs import write_config
from tiny_models import RoutedModel
from transformers import LlamaConfig

from smt_dist import SMTConfig, collect_scores, select_blocks
from smt_dist.config import DATA_FREE_SCORES
from smt_dist.errors import SMTError
from smt_dist.memory.plan.request import Request
from smt_dist.selection.weight_scores import NEVER, diagonal, diagonal_scores, random_scores
from smt_dist.sparse.blocks import BlockGrid

SIDE = 4


def make_config(score: str, blocks: int = 4, seed: int = 0, **selection) -> SMTConfig:
    group = {"name": "g", "target_modules": ["shared", "head"], "blocks": blocks}
    return SMTConfig.model_validate(
        {"block_size": SIDE, "groups": [group], "selection": {"score": score, "seed": seed, **selection}}
    )


@pytest.mark.parametrize("score", DATA_FREE_SCORES)
def test_no_forward_runs_and_no_batch_is_read(score):
    """A warm-up for nothing would cost minutes on a large model, and data that nobody needs to have."""

    def batches():
        raise AssertionError("a batch was read")
        yield

    model = RoutedModel()
    model.forward = lambda *_, **__: pytest.fail("a forward ran")
    scores = collect_scores(model, batches(), make_config(score))
    assert scores.steps == 0
    assert len(select_blocks(scores, make_config(score))) == 4


def test_random_depends_on_seed_and_module_alone():
    """A random choice that nobody can repeat is no baseline, and one choice for all modules isn't random."""
    grid = BlockGrid(40, 60, SIDE, SIDE)
    first = random_scores("layers.0.q", grid, 0)
    assert torch.equal(first, random_scores("layers.0.q", grid, 0))
    assert not torch.equal(first, random_scores("layers.0.q", grid, 1))
    assert not torch.equal(first, random_scores("layers.0.k", grid, 0))
    state = torch.get_rng_state()
    random_scores("layers.0.q", grid, 0)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers moved"


def test_random_prefers_no_place():
    """Uniform over all cells: each is chosen about as often as any other, over many seeds."""
    grid, draws, share = BlockGrid(8, 12, SIDE, SIDE), 3000, 3
    counts = torch.zeros(grid.shape)
    for seed in range(draws):
        table = random_scores("m", grid, seed)
        counts += table >= table.flatten().topk(share).values[-1]
    expected = draws * share / len(grid)
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 3), [(0, 0), (1, 1), (2, 2)]),
        ((4, 2), [(0, 0), (1, 0), (2, 1), (3, 1)]),
        ((2, 4), [(0, 0), (0, 1), (1, 2), (1, 3)]),
        ((3, 5), [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4)]),
        ((1, 3), [(0, 0), (0, 1), (0, 2)]),
        ((1, 1), [(0, 0)]),
    ],
)
def test_the_diagonal_of_a_rectangle_goes_from_corner_to_corner(shape, expected):
    """Every block row and every block column has one, as many as the longer side has blocks."""
    cells = diagonal(BlockGrid(shape[0] * SIDE, shape[1] * SIDE, SIDE, SIDE))
    assert cells == expected
    assert ({row for row, _ in cells}, {col for _, col in cells}) == (set(range(shape[0])), set(range(shape[1])))


@pytest.mark.parametrize(("shape", "parts"), [((8, 4), 4), ((4, 8), 4), ((6, 6), 6), ((2, 10), 2)])
def test_the_diagonal_is_diablos_where_the_short_side_divides_the_long_one(shape, parts):
    """DiaBlo cuts both sides into as many parts; its N rectangles hold the same elements."""
    covered = torch.zeros(shape)
    for row, col in diagonal(BlockGrid(*shape, 1, 1)):
        covered[row, col] = 1
    rectangles = torch.block_diag(*[torch.ones(shape[0] // parts, shape[1] // parts) for _ in range(parts)])
    assert torch.equal(covered, rectangles)


def test_a_part_of_the_diagonal_lies_evenly_along_it():
    """The first blocks of each weight alone would train one corner of it."""
    grid = BlockGrid(16 * SIDE, 16 * SIDE, SIDE, SIDE)
    table = diagonal_scores(grid)
    ranked = sorted(range(16), key=lambda index: -table[index, index])
    assert sorted(ranked[:4]) == [0, 4, 8, 12]
    assert sorted(ranked[:8]) == list(range(0, 16, 2))
    assert int((table > NEVER).sum()) == 16


def test_every_weight_gets_its_share_of_a_part_of_the_diagonals():
    """Shared 16 x 16 (4 blocks of diagonal each, three of them), head 100 x 16 (25): 37 in all."""
    config = make_config("diagonal", blocks=18, strategy="no_restriction")
    selection = select_blocks(collect_scores(RoutedModel(), (), config), config)
    counts = {module: len(blocks) for module, blocks in selection.blocks.items()}
    assert counts["head"] in (12, 13)
    assert all(counts[f"layers.{index}.shared"] in (1, 2) for index in range(3))


def test_more_than_the_diagonal_is_refused_with_what_it_has():
    """Blocks beside the diagonal would be another method, fewer blocks another budget than the config says."""
    config = make_config("diagonal", blocks=38)
    with pytest.raises(SMTError, match=r"groups\[g\]\.blocks: 38 asks for 38 blocks, .* diagonals have 37"):
        select_blocks(collect_scores(RoutedModel(), (), config), config)
    whole = make_config("diagonal", blocks=37)
    assert len(select_blocks(collect_scores(RoutedModel(), (), whole), whole)) == 37


def test_the_program_needs_no_data_where_the_score_needs_none(train, tmp_path):
    """A baseline of random blocks shouldn't ask for a training file that it doesn't read."""
    selection = {"score": "random", "seed": 3}
    output = tmp_path / "selection.json"
    flags = {"program": "select_blocks.py", "train_file": None, "selection_report": "false", "output": output}
    done = train(smt_config=write_config(tmp_path, selection=selection), **flags)
    assert done.code == 0, done.err
    assert "score random" in done.out
    assert "--train_file is missing" in train(smt_config=write_config(tmp_path), **flags).error


@pytest.mark.parametrize(
    ("score", "planned"),
    [("l2", "l2"), ("grad_x_weight", "abs_mean"), ("a.function", "abs_mean"), ("activation", "mean_abs")]
    + [(score, "mean_abs") for score in DATA_FREE_SCORES],
)
def test_memory_is_planned_for_a_warm_up_that_needs_as_much(score, planned):
    """The planner knows the gradient scores; for the others it may promise too much, never too little."""
    assert Request(LlamaConfig(), make_config(score)).score == planned


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused_by_its_module(value):
    """A NaN compares with nothing, so its block would never be chosen, and an infinite one always."""
    model = RoutedModel()
    with torch.no_grad():
        model.head.weight[0, 0] = value
    with pytest.raises(SMTError, match="the score of head is not finite"):
        collect_scores(model, [], make_config("magnitude"))
