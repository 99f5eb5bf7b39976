"""The best blocks within each budget, the same ones whoever asks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smt_dist import BlockScores, SMTConfig, select_blocks
from smt_dist.errors import SMTError

SIDE = 4


def make_scores(tables: dict[str, list], groups: dict[str, list[str]] | None = None, extra: int = 0) -> BlockScores:
    """Scores given as nested lists; ``extra`` parameters besides the targets'."""
    tensors = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in tables.items()}
    return BlockScores(
        block_size=(SIDE, SIDE),
        tables=tensors,
        shapes={name: (table.shape[0] * SIDE, table.shape[1] * SIDE) for name, table in tensors.items()},
        groups=groups or {"g": list(tables)},
        parameters_2d=sum(table.numel() for table in tensors.values()) * SIDE * SIDE + extra,
        score="l1",
        steps=1,
    )


def make_config(*groups: dict, strategy: str = "no_restriction") -> SMTConfig:
    named = [{"name": "g", **group} for group in groups]
    return SMTConfig(block_size=SIDE, groups=named, selection={"strategy": strategy, "score": "l1"})


def test_the_highest_scores_are_taken_over_all_weights():
    """The method itself."""
    scores = make_scores({"a": [[1, 9], [3, 4]], "b": [[8, 2]]})
    selection = select_blocks(scores, make_config({"blocks": 3}))
    assert selection.blocks == {"a": [(0, 1), (1, 1)], "b": [(0, 0)]}
    assert selection.shapes == {"a": (8, 8), "b": (4, 8)}
    assert selection.groups == {"a": "g", "b": "g"}


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (1, {"z": [(0, 0)]}),
        (3, {"z": [(0, 0), (0, 1), (1, 0)]}),
        (5, {"z": [(0, 0), (0, 1), (1, 0), (1, 1)], "a": [(0, 0)]}),
    ],
)
def test_ties_break_by_module_order_then_row_then_column(blocks, expected):
    """Anything else (a set, a hash, an unstable sort) gives each rank its own choice. The model's order, not the
    alphabet's."""
    scores = make_scores({"z": [[1, 1], [1, 1]], "a": [[1, 1]]})
    assert select_blocks(scores, make_config({"blocks": blocks})).blocks == expected


def test_the_file_lists_modules_in_the_models_order_whatever_their_scores():
    """Equal choices are equal files."""
    scores = make_scores({"z": [[1, 2]], "a": [[9, 8]], "m": [[5, 0]]})
    assert list(select_blocks(scores, make_config({"blocks": 5})).blocks) == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (2, {"a": [(0, 1)], "b": [(0, 0)]}),
        (3, {"a": [(0, 1), (1, 1)], "b": [(0, 0)]}),
        (4, {"a": [(0, 1), (1, 1)], "b": [(0, 0), (0, 1)]}),
        (1, {"a": [(0, 1)]}),
    ],
)
def test_norm_dist_takes_as_many_from_every_weight(blocks, expected):
    """It exists to keep one weight from taking the whole budget; a rest goes to the first weights."""
    scores = make_scores({"a": [[1, 3], [1, 2]], "b": [[90, 80]]})
    assert select_blocks(scores, make_config({"blocks": blocks}, strategy="norm_dist")).blocks == expected


def test_norm_dist_refuses_a_share_that_a_weight_does_not_have():
    """Giving its share to others would be another strategy under the same name."""
    scores = make_scores({"a": [[1, 3], [1, 2]], "b": [[90]]})
    with pytest.raises(SMTError, match=r"groups\[g\].*norm_dist wants 2 blocks of b, which has 1"):
        select_blocks(scores, make_config({"blocks": 4}, strategy="norm_dist"))


def test_groups_spend_budgets_of_their_own():
    """A group with large gradients may not eat another's budget."""
    scores = make_scores({"a": [[1, 2]], "b": [[90, 80]], "c": [[70, 3]]}, {"small": ["a"], "large": ["b", "c"]})
    config = make_config({"name": "large", "blocks": 2}, {"name": "small", "blocks": 1})
    selection = select_blocks(scores, config)
    assert selection.blocks == {"a": [(0, 1)], "b": [(0, 0), (0, 1)]}
    assert selection.groups == {"a": "small", "b": "large"}
    assert list(selection.blocks) == ["a", "b"]


def test_a_fraction_refers_to_all_2d_parameters_of_the_model():
    """As the authors count: not to the targets alone."""
    scores = make_scores({"a": [[4, 3, 2, 1]]}, extra=12 * SIDE * SIDE)
    assert len(select_blocks(scores, make_config({"fraction": 0.2}))) == 3  # of 16 blocks' worth, 3.2


@pytest.mark.parametrize(("budget", "shown"), [({"blocks": 6}, "blocks: 6"), ({"fraction": 0.6}, "fraction: 0.6")])
def test_a_budget_larger_than_its_targets_is_refused_by_group_and_field(budget, shown):
    """Taking all there is would train fewer parameters than the config claims."""
    scores = make_scores({"a": [[1, 2]], "b": [[1, 2, 3]]}, extra=5 * SIDE * SIDE)
    message = rf"groups\[g\]\.{shown} asks for 6 blocks, but its 2 targets have 5 \(fraction 0.5"
    with pytest.raises(SMTError, match=message) as caught:
        select_blocks(scores, make_config(budget))
    assert len(str(caught.value).splitlines()) == 1


def test_a_budget_below_one_block_is_refused_by_group():
    """Zero blocks is a run that trains nothing."""
    scores = make_scores({"a": [[1, 2]]}, extra=1000 * SIDE * SIDE)
    with pytest.raises(SMTError, match=r"groups\[g\].fraction: 0.0001 .* less than one block"):
        select_blocks(scores, make_config({"fraction": 0.0001}))


def test_all_blocks_may_be_taken():
    """The budget's upper end: SMT becomes full fine-tuning of the targets."""
    scores = make_scores({"a": [[1, 2]], "b": [[0], [0]]})
    assert len(select_blocks(scores, make_config({"blocks": 4}))) == 4


table = st.integers(1, 4).flatmap(
    lambda columns: st.lists(st.lists(st.integers(0, 3), min_size=columns, max_size=columns), min_size=1, max_size=4)
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(table, min_size=1, max_size=4), st.data())
def test_the_selection_is_the_brute_force_one(tables, data):
    """Few distinct scores make many ties, where orderings go wrong."""
    scores = make_scores({f"m{index}": rows for index, rows in enumerate(tables)})
    every = [
        (-value, index, row, col)
        for index, rows in enumerate(tables)
        for row, values in enumerate(rows)
        for col, value in enumerate(values)
    ]
    budget = data.draw(st.integers(1, len(every)))
    chosen = {(f"m{index}", (row, col)) for _, index, row, col in sorted(every)[:budget]}
    selection = select_blocks(scores, make_config({"blocks": budget}))
    assert {(module, block) for module, blocks in selection.blocks.items() for block in blocks} == chosen
