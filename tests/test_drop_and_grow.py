"""Which blocks drop and grow: the weakest for the best of the rest, within budgets and bounds; and who is refused."""

from __future__ import annotations

import json

import pytest
import torch
from test_selection import make_scores
from workers.training import BLOCK

import smt_dist
from smt_dist import BlockSelection, SMTConfig
from smt_dist.selection.drop_and_grow import drop_and_grow
from smt_dist.sparse.blocks import BlockGrid
from smt_dist.training.rounds import first_steps_factor


def reselect_config(*groups: dict, **selection) -> SMTConfig:
    named = [{"name": "g", **group} for group in groups]
    return SMTConfig.model_validate({"block_size": 4, "groups": named, "selection": {"score": "l1", **selection}})


def test_the_weakest_go_and_the_best_of_the_rest_grow():
    """By hand: of 4 trained blocks the 2 weakest; a dropped block can't come back at once, however good its score."""
    scores = make_scores({"a": [[9, 1, 8, 2]], "b": [[7, 3, 6, 99]]})
    active = BlockSelection(block_size=(4, 4), blocks={"a": [(0, 0), (0, 1)], "b": [(0, 0), (0, 3)]})
    magnitudes = {"a": {(0, 0): 0.4, (0, 1): 0.3}, "b": {(0, 0): 0.2, (0, 3): 0.1}}
    config = reselect_config({"blocks": 4}, strategy="no_restriction")
    changed = drop_and_grow(scores, active, magnitudes, config, 0.5)
    assert changed.blocks == {"a": [(0, 0), (0, 1), (0, 2)], "b": [(0, 2)]}


def test_of_equally_weak_blocks_the_last_goes():
    """Blocks that never got a gradient are all at zero: any other rule would differ between ranks."""
    scores = make_scores({"a": [[0, 0, 5, 5]]})
    active = BlockSelection(block_size=(4, 4), blocks={"a": [(0, 0), (0, 1)]})
    magnitudes = {"a": {(0, 0): 0.0, (0, 1): 0.0}}
    assert drop_and_grow(scores, active, magnitudes, reselect_config({"blocks": 2}), 0.5).blocks == {
        "a": [(0, 0), (0, 2)]
    }


def test_no_more_are_dropped_than_can_grow():
    """At a budget near all blocks, dropping more would train less than the budget."""
    scores = make_scores({"a": [[1, 2, 3, 4]]})
    active = BlockSelection(block_size=(4, 4), blocks={"a": [(0, 0), (0, 1), (0, 2)]})
    magnitudes = {"a": {(0, 0): 3.0, (0, 1): 1.0, (0, 2): 2.0}}
    assert drop_and_grow(scores, active, magnitudes, reselect_config({"blocks": 3}), 1.0).blocks == {
        "a": [(0, 0), (0, 2), (0, 3)]
    }


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"strategy": "no_restriction"}, {"layers.0.q": 2}),
        ({"strategy": "even"}, {"layers.0.q": 1, "layers.1.q": 1}),
        ({"floor": 1}, {"layers.0.q": 1, "layers.1.q": 1}),
        ({"strategy": "norm_dist"}, {"layers.0.q": 1, "layers.1.q": 1}),
    ],
    ids=str,
)
def test_bounds_and_strategy_hold_after_drop_and_grow(selection, expected):
    """A floor that holds until step 100 only is none."""
    scores = make_scores({"layers.0.q": [[9, 8, 7]], "layers.1.q": [[3, 2, 1]]})
    active = BlockSelection(block_size=(4, 4), blocks={"layers.0.q": [(0, 0)], "layers.1.q": [(0, 0)]})
    magnitudes = {"layers.0.q": {(0, 0): 2.0}, "layers.1.q": {(0, 0): 1.0}}
    changed = drop_and_grow(scores, active, magnitudes, reselect_config({"blocks": 2}, **selection), 0.5)
    assert {module: len(blocks) for module, blocks in changed.blocks.items()} == expected


@pytest.mark.parametrize(
    ("selection", "gone"),
    [
        ({"floor": 2}, ("layers.1.q", (0, 0))),
        ({"strategy": "norm_dist"}, ("layers.1.q", (0, 0))),
        ({"ceiling": 2}, ("layers.1.q", (0, 0))),
        ({"strategy": "even"}, ("layers.1.q", (0, 0))),
        ({"strategy": "no_restriction"}, ("layers.0.q", (0, 1))),
    ],
    ids=str,
)
def test_a_block_that_bounds_need_is_not_dropped(selection, gone):
    """Layer 0 has two blocks, and two are asked of each layer: without one, the run would end in the middle."""
    scores = make_scores({"layers.0.q": [[9, 8]], "layers.1.q": [[3, 2, 1]]})
    active = BlockSelection(block_size=(4, 4), blocks={"layers.0.q": [(0, 0), (0, 1)], "layers.1.q": [(0, 0), (0, 1)]})
    magnitudes = {"layers.0.q": {(0, 0): 9.0, (0, 1): 1.0}, "layers.1.q": {(0, 0): 2.0, (0, 1): 3.0}}
    changed = drop_and_grow(scores, active, magnitudes, reselect_config({"blocks": 4}, **selection), 0.25)
    left = {(module, block) for module, blocks in changed.blocks.items() for block in blocks}
    assert left == {
        *(("layers.0.q", (0, col)) for col in (0, 1)), *(("layers.1.q", (0, col)) for col in (0, 1, 2))
    } - {gone}  # fmt: skip


def test_an_even_spread_drops_no_more_than_the_fraction():
    """A selection that isn't even, by hand or of an older version, becomes so as its weakest blocks go, not at once."""
    scores = make_scores({"a": [[9, 8, 7, 6]], "b": [[5, 4, 3, 2]]})
    active = BlockSelection(block_size=(4, 4), blocks={"a": [(0, 0), (0, 1), (0, 2), (0, 3)]})
    magnitudes = {"a": {(0, col): 4.0 - col for col in range(4)}}
    changed = drop_and_grow(scores, active, magnitudes, reselect_config({"blocks": 4}, strategy="even"), 0.25)
    assert changed.blocks == {"a": [(0, 0), (0, 1), (0, 2)], "b": [(0, 0)]}


def test_blocks_outside_of_the_targets_stay():
    """A selection by hand may hold some; they have no score to be compared by."""
    scores = make_scores({"a": [[1, 2]]})
    active = BlockSelection(block_size=(4, 4), blocks={"other": [(0, 0)], "a": [(0, 0)]}, groups={"other": "h"})
    magnitudes = {"other": {(0, 0): 0.0}, "a": {(0, 0): 1.0}}
    changed = drop_and_grow(scores, active, magnitudes, reselect_config({"blocks": 1}), 1.0)
    assert changed.blocks == {"a": [(0, 1)], "other": [(0, 0)]}
    assert changed.groups == {"a": "g", "other": "h"}
    alone = BlockSelection(block_size=(4, 4), blocks={"other": [(0, 0)]})
    with pytest.raises(smt_dist.SMTError, match="no trained block lies in a target"):
        drop_and_grow(scores, alone, magnitudes, reselect_config({"blocks": 1}), 1.0)


def test_budgets_of_groups_stay_apart_unless_they_are_joint():
    """Each group gives as many as it gets; jointly the better one grows."""
    scores = make_scores({"a": [[1, 2, 3]], "b": [[70, 80, 90]]}, {"x": ["a"], "y": ["b"]})
    active = BlockSelection(block_size=(4, 4), blocks={"a": [(0, 0), (0, 1)], "b": [(0, 0)]})
    magnitudes = {"a": {(0, 0): 2.0, (0, 1): 1.0}, "b": {(0, 0): 3.0}}
    groups = ({"name": "x", "blocks": 2}, {"name": "y", "blocks": 1})
    apart = drop_and_grow(scores, active, magnitudes, reselect_config(*groups), 0.5)
    assert apart.blocks == {"a": [(0, 0), (0, 2)], "b": [(0, 0)]}
    joint = drop_and_grow(scores, active, magnitudes, reselect_config(*groups, budget="joint"), 0.5)
    assert joint.blocks == {"a": [(0, 0)], "b": [(0, 0), (0, 2)]}
    assert joint.groups == {"a": "x", "b": "y"}


def test_the_warning_of_long_first_steps_is_what_adam_does():
    """Adam from zero moments at step 10,000, against Adam at rest under the same constant gradient."""
    for beta2 in (0.999, 0.95):
        parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, beta2), eps=1e-30)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = optimizer.state[parameter]
        state["step"].fill_(10_000)
        state["exp_avg"].copy_(torch.tensor([0.0, 1.0]))
        state["exp_avg_sq"].copy_(torch.tensor([0.0, 1.0]))
        longest = 0.0
        for _ in range(100):
            before = parameter.detach().clone()
            optimizer.step()
            new, rest = (before - parameter.detach()).tolist()
            longest = max(longest, new / rest)
        assert longest == pytest.approx(first_steps_factor(0.9, beta2), rel=1e-3)


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        ({"every": 0, "fraction": 0.1}, "reselect.every"),
        ({"every": 5, "fraction": 0}, "reselect.fraction"),
        ({"every": 5, "fraction": 1.5}, "reselect.fraction"),
        ({"every": 5}, "reselect.fraction"),
        ({"every": 5, "fraction": 0.1, "steps": 0}, "reselect.steps"),
        ({"every": 5, "fraction": 0.1, "score": "random"}, "reselect.score: expected one of abs_mean"),
        ({"every": 5, "fraction": 0.1, "often": 1}, "reselect.often: unknown key"),
    ],
)
def test_a_wrong_plan_is_refused_by_its_field(plan, named):
    with pytest.raises(smt_dist.SMTError, match=named):
        SMTConfig.from_json(json.dumps({"reselect": plan}))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"save_only_model": "true"}, "--save_only_model"),
        ({"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss"}, "--save_strategy best"),
        (
            {"load_best_model_at_end": "true", "eval_strategy": "no", "save_strategy": "no", "save_total_limit": 1},
            "--save_total_limit 1",
        ),
    ],
    ids=str,
)
def test_flags_that_take_checkpoints_away_are_refused(train, folder, tmp_path, flags, named):
    """Found before the first step, not at the first re-selection."""
    from programs import write_config

    config = write_config(tmp_path, reselect={"every": 2, "fraction": 0.5})
    assert named in train(smt_config=config, eval_file=folder / "train.json", **flags).error


def test_a_grid_of_reselect_blocks_is_the_models():
    """Guards the block size of the tests above."""
    assert BlockGrid(64, 64, *BLOCK).shape == (4, 8)
