"""The best blocks within each budget, the same ones whoever asks."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

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


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (1, {"b": [(0, 0)]}),
        (3, {"a": [(0, 1)], "b": [(0, 0)], "c": [(0, 0)]}),
        (4, {"a": [(0, 1), (1, 1)], "b": [(0, 0)], "c": [(0, 0)]}),
        (5, {"a": [(0, 1), (1, 1)], "b": [(0, 0)], "c": [(0, 0), (0, 1)]}),
        (6, {"a": [(0, 1), (1, 0), (1, 1)], "b": [(0, 0)], "c": [(0, 0), (0, 1)]}),
    ],
)
def test_even_gives_the_rest_to_the_best_and_what_a_weight_lacks_to_the_others(blocks, expected):
    """A budget below one block a weight must not end in the first layers, and a small weight must not end the run."""
    scores = make_scores({"a": [[1, 4], [2, 3]], "b": [[9]], "c": [[8, 2.5]]})
    assert select_blocks(scores, make_config({"blocks": blocks}, strategy="even")).blocks == expected


def test_norm_dist_refuses_a_share_that_a_weight_does_not_have():
    """Giving its share to others would be another strategy under the same name."""
    scores = make_scores({"a": [[1, 3], [1, 2]], "b": [[90]]})
    with pytest.raises(SMTError, match=r"groups\[g\].*norm_dist needs 2 blocks of b, which has 1"):
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


# -- joint budgets, floors and ceilings ------------------------------------------------------------------------


def bounded(*groups: dict, **selection) -> SMTConfig:
    named = [{"name": "g", **group} for group in groups]
    return SMTConfig.model_validate({"block_size": SIDE, "groups": named, "selection": {"score": "l1", **selection}})


def test_a_joint_budget_is_spent_on_the_best_of_all_groups():
    """Separate budgets keep a group's share; a joint one lets the better group have it. Multipliers stay apart."""
    scores = make_scores({"a": [[1, 2]], "b": [[90, 80]], "c": [[70, 3]]}, {"small": ["a"], "large": ["b", "c"]})
    groups = ({"name": "large", "blocks": 1}, {"name": "small", "blocks": 2})
    assert select_blocks(scores, bounded(*groups)).blocks == {"a": [(0, 0), (0, 1)], "b": [(0, 0)]}
    joint = select_blocks(scores, bounded(*groups, budget="joint", strategy="no_restriction"))
    assert joint.blocks == {"b": [(0, 0), (0, 1)], "c": [(0, 0)]}
    assert joint.groups == {"b": "large", "c": "large"}


def test_a_joint_budget_that_is_too_large_names_all_groups():
    """Otherwise the user changes the wrong one."""
    scores = make_scores({"a": [[1, 2]], "b": [[3]]}, {"x": ["a"], "y": ["b"]})
    config = bounded({"name": "x", "blocks": 3}, {"name": "y", "blocks": 1}, budget="joint")
    with pytest.raises(SMTError, match=r"groups\[x \+ y\]\.blocks: 3, blocks: 1 asks for 4 .* targets have 3"):
        select_blocks(scores, config)


LAYERED = {"layers.0.q": [[9, 8]], "layers.0.k": [[7, 6]], "layers.1.q": [[5, 4]], "layers.1.k": [[3, 2]]}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"floor": 1}, {"layers.0.q": 2, "layers.1.q": 1}),
        ({"ceiling": 2}, {"layers.0.q": 2, "layers.1.q": 1}),
        ({"ceiling": 1, "bounds_per": "weight"}, {"layers.0.q": 1, "layers.0.k": 1, "layers.1.q": 1}),
        ({"strategy": "no_restriction"}, {"layers.0.q": 2, "layers.0.k": 1}),
        ({}, {"layers.0.q": 1, "layers.0.k": 1, "layers.1.q": 1}),
    ],
    ids=str,
)
def test_a_layer_is_a_decoder_layer_unless_weights_are_meant(selection, expected):
    """q and k of one decoder layer share its bounds; with ``bounds_per`` weight each has its own."""
    chosen = select_blocks(make_scores(LAYERED), bounded({"blocks": 3}, **selection))
    assert {module: len(blocks) for module, blocks in chosen.blocks.items()} == expected


@pytest.mark.parametrize(
    ("selection", "blocks", "message"),
    [
        ({"floor": 2}, 3, r"floor 2 of 2 layers needs 4 blocks, the budget is 3; lower the floor"),
        (
            {"floor": 1, "bounds_per": "weight"},
            3,
            r"floor 1 of 4 weights needs 4 blocks, the budget is 3",
        ),
        ({"floor": 3, "bounds_per": "weight"}, 8, r"floor 3 of 4 weights needs 12 blocks, the budget is 8"),
        ({"ceiling": 1}, 3, r"ceiling 1 of 2 layers leaves room for 2 blocks, the budget is 3"),
    ],
    ids=str,
)
def test_bounds_that_do_not_fit_the_budget_are_refused_with_what_fits(selection, blocks, message):
    """Keeping one of two promises silently would break the other."""
    with pytest.raises(SMTError, match=rf"selection, groups\[g\]: {message}") as caught:
        select_blocks(make_scores(LAYERED), bounded({"blocks": blocks}, **selection))
    assert len(str(caught.value).splitlines()) == 1


def test_a_floor_above_what_a_layer_has_is_refused_by_the_layers_name():
    scores = make_scores({"layers.0.q": [[9, 8, 7, 6]], "layers.1.q": [[5]]})
    with pytest.raises(SMTError, match=r"floor 2: layers\.1 has 1 blocks; use at most 1"):
        select_blocks(scores, bounded({"blocks": 4}, floor=2))


@pytest.mark.parametrize(
    "selection", [{"floor": 3, "ceiling": 2}, {"floor": 1, "strategy": "norm_dist"}, {"floor": 0}, {"ceiling": 1.5}]
)
def test_bounds_that_contradict_one_another_are_refused_with_the_config(selection):
    """Before the warm-up, not after it."""
    with pytest.raises(ValueError, match=r"floor|ceiling"):
        bounded({"blocks": 3}, **selection)


small_table = st.integers(1, 2).flatmap(
    lambda columns: st.lists(st.lists(st.integers(0, 3), min_size=columns, max_size=columns), min_size=1, max_size=2)
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(small_table, min_size=2, max_size=3), st.data())
def test_under_bounds_no_other_choice_has_a_larger_sum(tables, data):
    """Brute force over every subset, with two weights in the first layer: the best sum, floors and ceilings kept."""
    names = ["layers.0.q", "layers.0.k", "layers.1.q"][: len(tables)]
    scores = make_scores(dict(zip(names, tables, strict=True)))
    per = data.draw(st.sampled_from(["layer", "weight"]))
    cells = [
        (name.rpartition(".")[0] if per == "layer" else name, name, (row, col), value)
        for name, rows in zip(names, tables, strict=True)
        for row, values in enumerate(rows)
        for col, value in enumerate(values)
    ]
    layers = {cell[0] for cell in cells}
    budget = data.draw(st.integers(1, len(cells)))
    floor = data.draw(st.none() | st.integers(1, 2))
    ceiling = data.draw(st.none() | st.integers(floor or 1, 4))

    def is_allowed(subset) -> bool:
        counts = Counter(cell[0] for cell in subset)
        return all((floor or 0) <= counts[layer] <= (ceiling or len(cells)) for layer in layers)

    allowed = [subset for subset in combinations(cells, budget) if is_allowed(subset)]
    config = bounded({"blocks": budget}, floor=floor, ceiling=ceiling, bounds_per=per)
    if not allowed:
        with pytest.raises(SMTError):
            select_blocks(scores, config)
        return
    selection = select_blocks(scores, config)
    chosen = [cell for cell in cells if cell[2] in selection.blocks.get(cell[1], [])]
    assert is_allowed(chosen)
    assert len(chosen) == budget
    assert sum(cell[3] for cell in chosen) == max(sum(cell[3] for cell in subset) for subset in allowed)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(small_table, min_size=2, max_size=3), st.data())
def test_even_is_the_best_of_all_choices_that_are(tables, data):
    """Brute force over every subset in which a weight has two blocks less than another only if it has no more."""
    cells = [
        (name, (row, col), value)
        for name, rows in zip("qkv", tables, strict=False)
        for row, values in enumerate(rows)
        for col, value in enumerate(values)
    ]
    available = Counter(cell[0] for cell in cells)
    budget = data.draw(st.integers(1, len(cells)))

    def is_even(subset) -> bool:
        counts = Counter(cell[0] for cell in subset)
        most = max(counts.values())
        return all(counts[name] >= most - 1 or counts[name] == available[name] for name in available)

    scores = make_scores(dict(zip("qkv", tables, strict=False)))
    selection = select_blocks(scores, make_config({"blocks": budget}, strategy="even"))
    chosen = [cell for cell in cells if cell[1] in selection.blocks.get(cell[0], [])]
    assert len(chosen) == budget
    assert is_even(chosen)
    best = max(sum(cell[2] for cell in subset) for subset in combinations(cells, budget) if is_even(subset))
    assert sum(cell[2] for cell in chosen) == best


@pytest.mark.parametrize(
    ("tables", "bounds", "gap"),
    [
        ({"a": [[3]], "b": [[1]], "c": [[1 - 1e-9]]}, {"ceiling": 1}, 1e-9),
        ({"a": [[3, 1, 1 - 1e-9]], "b": [[0.5]]}, {"ceiling": 2}, 1e-9),
        ({"a": [[3, 1]], "b": [[1, 0.5]]}, {"floor": 1}, 0.5),
        ({"a": [[3]], "b": [[1]]}, {"floor": 1}, float("inf")),
        ({"a": [[3, 1]], "b": [[2, 1.5]]}, {"strategy": "even"}, 0.25),
    ],
)
def test_the_gap_that_is_logged_is_that_of_the_nearest_other_choice(caplog, tables, bounds, gap):
    """Who reads a wide gap relies on equal choices; a layer that has none yet, or all it may have, competes too."""
    config = SMTConfig(
        block_size=SIDE,
        groups=[{"name": "g", "blocks": 2}],
        selection={"score": "l1", "bounds_per": "weight", **bounds},
    )
    with caplog.at_level("INFO"):
        select_blocks(make_scores(tables), config)
    assert f"gap at the cut-off {gap:.2e}" in caplog.text
