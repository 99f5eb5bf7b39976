"""Overlap and rank correlation on constructed cases with known answers, and the program that measures them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from programs import ROWS, write_json

from smt_dist import BlockScores, BlockSelection, SMTConfig
from smt_dist.cli import stability_runs
from smt_dist.cli.stability_runs import parse_axes, plan_cells, table
from smt_dist.errors import SMTError
from smt_dist.selection.stability import chance_jaccard, chosen_share, jaccard, rank_correlation


def select(size: int, **blocks: list) -> BlockSelection:
    return BlockSelection(block_size=(size, size), blocks=blocks)


def score(size: int, **tables: list) -> BlockScores:
    tensors = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in tables.items()}
    shapes = {name: (t.shape[0] * size, t.shape[1] * size) for name, t in tensors.items()}
    return BlockScores((size, size), tensors, shapes, {"g": list(tables)}, 1000, "l1", 1)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (select(4, a=[(0, 0), (1, 2)]), select(4, a=[(0, 0), (1, 2)]), 1.0),
        (select(4, a=[(0, 0), (1, 2)]), select(4, a=[(0, 1)]), 0.0),
        (select(4, a=[(0, 0)]), select(4, b=[(0, 0)]), 0.0),
        (select(4, a=[(0, 0), (0, 1)]), select(4, a=[(0, 0)], b=[(3, 3)]), 1 / 3),
        # A block of 4 against the four of 2 inside it, against one of them, and against one inside and one beside it.
        (select(4, a=[(1, 0)]), select(2, a=[(2, 0), (2, 1), (3, 0), (3, 1)]), 1.0),
        (select(4, a=[(1, 0)]), select(2, a=[(3, 1)]), 1 / 4),
        (select(4, a=[(1, 0)]), select(2, a=[(3, 1), (0, 0)]), 1 / 5),
        # 6 x 6 and 4 x 4 at the corner share 4 x 4 of 6 x 6 elements.
        (select(6, a=[(0, 0)]), select(4, a=[(0, 0)]), 16 / 36),
        (select(6, a=[(0, 0)]), select(4, a=[(1, 1)]), 4 / (36 + 16 - 4)),
    ],
    ids=["equal", "disjoint", "other weights", "a third", "the same area", "a part", "beside", "6 and 4", "corner"],
)
def test_jaccard_counts_elements(first, second, expected):
    """Blocks of different sizes overlap by area; counting blocks would say that they never do."""
    assert jaccard(first, second) == pytest.approx(expected)
    assert jaccard(second, first) == pytest.approx(expected)


def test_jaccard_refuses_weights_of_different_shapes():
    """Two models' selections have nothing to compare."""
    first, second = select(4, a=[(0, 0)]), select(4, a=[(0, 0)])
    first.shapes["a"], second.shapes["a"] = (8, 8), (8, 4)
    with pytest.raises(SMTError, match=r"a is \(8, 4\) and \(8, 8\)"):
        jaccard(first, second)


@pytest.mark.parametrize(("p", "q"), [(0.1, 0.1), (0.3, 0.05), (1.0, 0.2)])
def test_chance_is_what_random_choices_have_in_common(p, q):
    """Without it, an overlap of 0.05 at a budget of 10 % looks like something."""
    generator = np.random.default_rng(0)
    first, second = (generator.random((2, 200_000)) < np.array([[p], [q]])) if p < 1 else (
        np.ones(200_000, bool), generator.random(200_000) < q
    )  # fmt: skip
    found = (first & second).sum() / (first | second).sum()
    assert chance_jaccard(p, q) == pytest.approx(found, abs=0.005)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (score(4, a=[[1, 2, 3]], b=[[9]]), score(4, a=[[10, 20, 25]], b=[[1000]]), 1.0),
        (score(4, a=[[1, 2, 3, 4]]), score(4, a=[[4, 3, 2, 1]]), -1.0),
        # Ranks 1, 2, 3, 4 against 2, 1, 4, 3: 1 - 6 * 4 / (4 * 15).
        (score(4, a=[[1, 2, 3, 4]]), score(4, a=[[2, 1, 4, 3]]), 0.6),
        # Ties share their mean rank: 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
        (score(4, a=[[1, 5, 5, 7]]), score(4, a=[[1, 2, 3, 4]]), 4.5 / (4.5 * 5) ** 0.5),
        (score(4, a=[[1, 1, 1]]), score(4, a=[[1, 2, 3]]), None),
        # What may not be chosen in one of them is left out.
        (score(4, a=[[1, 2, 3, float("-inf")]]), score(4, a=[[1, 2, 3, -5]]), 1.0),
        # Other block sizes: a block of 4 has the same score on all four of its parts.
        (score(4, a=[[1, 2]]), score(2, a=[[3, 3, 5, 5], [3, 3, 5, 5]]), 1.0),
        (score(4, a=[[1, 2]]), score(2, a=[[5, 5, 3, 3], [5, 5, 3, 3]]), -1.0),
    ],
    ids=["equal", "reversed", "swapped", "ties", "constant", "not for choice", "finer", "finer, reversed"],
)
def test_rank_correlation_is_spearmans(first, second, expected):
    """By hand; scale and monotone changes don't matter."""
    for found in (rank_correlation(first, second), rank_correlation(second, first)):
        assert found == (expected if expected is None else pytest.approx(expected))


def test_rank_correlation_refuses_other_weights():
    with pytest.raises(SMTError, match="different weights"):
        rank_correlation(score(4, a=[[1, 2]]), score(4, b=[[1, 2]]))


def test_the_chosen_share_is_of_the_targets_elements():
    assert chosen_share(select(4, a=[(0, 0)]), score(4, a=[[1, 2]], b=[[1, 1]])) == 1 / 4


# -- axes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (["seed=0,1"], "'seed' is not one of seeds, steps, halves, files, block_sizes"),
        (["seeds=0"], "'seeds=0': give two different values"),
        (["seeds=0,0"], "give two different values"),
        (["halves=1,2"], "halves takes no values"),
        (["files"], "files needs values"),
        (["steps", "steps=1,2"], "steps is given twice"),
        (["seeds=0,x"], "seeds: 'x' is not a whole number of at least 0"),
        (["steps=0,1"], "steps: '0' is not a whole number of at least 1"),
        (["block_sizes=8,99999999"], "--stability: block_sizes: block_size"),
    ],
)
def test_a_wrong_axis_is_named(texts, named):
    """Found before the first of many runs."""
    with pytest.raises(SMTError) as caught:
        plan_cells(parse_axes(texts), SMTConfig(), 0, "rows.json")
    assert named in str(caught.value)


def test_each_axis_varies_one_thing():
    """Two changes at once couldn't be told apart."""
    config = SMTConfig.model_validate({"block_size": 16, "groups": [{"blocks": 40}], "warmup": {"steps": 8}})
    axes = parse_axes(["seeds", "steps", "halves", "files=a,b", "block_sizes=8,32"])
    cells = plan_cells(axes, config, 5, "rows.json")
    assert [cell.label for cell in cells] == [
        *("5", "6", "7"), *("2", "4", "8"), *("first", "second"), *("a", "b"), *("8", "32")
    ]  # fmt: skip
    for cell in cells:
        assert (cell.seed, cell.config.selection.seed) == ((int(cell.label),) * 2 if cell.axis == "seeds" else (5, 0))
        assert cell.config.warmup.steps == (int(cell.label) if cell.axis == "steps" else 8)
        assert cell.half == (cell.label if cell.axis == "halves" else None)
        assert cell.train_file == (cell.label if cell.axis == "files" else "rows.json")
        if cell.axis == "block_sizes":  # as many parameters
            assert cell.config.groups[0].blocks * int(cell.label) ** 2 == 40 * 16**2
        else:
            assert (cell.config.block_size, cell.config.groups) == (16, config.groups)


# -- the program -----------------------------------------------------------------------------------------------


def test_stability_is_measured_kept_and_gone_on_with(train, tmp_path, monkeypatch):
    """From flags to figures; an interrupted comparison makes the missing selections only."""
    ran = []
    collect = stability_runs.collect

    def counted(model, data, config, args, engine):
        ran.append((len(data.train), config.warmup.steps, config.block_size, args.data_seed))
        if len(ran) == 5:
            raise SMTError("interrupted")
        return collect(model, data, config, args, engine)

    monkeypatch.setattr(stability_runs, "collect", counted)
    other = write_json(tmp_path / "other.json", ROWS[:10])
    axes = ["seeds=0,1,2", "steps=1,2", "halves", f"files={other},{write_json(tmp_path / 'b.json', ROWS)}"]
    output = tmp_path / "out" / "stability.json"
    flags = {"program": "select_blocks.py", "output": output, "output_dir": tmp_path / "unused"}
    call = ["--stability", *axes, "block_sizes=4,8"]
    assert "interrupted" in train(*call, **flags).error
    assert len(list(output.with_name("stability_cells").iterdir())) == 4
    assert not output.exists()

    again = train(*call, **flags)
    assert again.code == 0, again.err
    # 3 + 2 + 2 + 2 + 2 settings; 2 steps, the same rows in another file, and blocks of 8 are one selection.
    assert len(ran) - 1 == 9
    result = json.loads(output.read_text())
    assert {axis: len(found["pairs"]) for axis, found in result.items()} == {
        "seeds": 3, "steps": 1, "halves": 1, "files": 1, "block_sizes": 1
    }  # fmt: skip
    for found in result.values():
        for pair in found["pairs"]:
            assert 0 <= pair["jaccard"] <= 1
            assert -1 <= pair["rank_correlation"] <= 1
            assert 0 < pair["jaccard_by_chance"] < 1
    assert table(result) in again.out
    train(*call, **flags)
    assert len(ran) == 10, "everything is there already"


def test_selections_of_equal_settings_are_equal(train, tmp_path):
    """The scale's upper end, through the whole program: the same rows under two names."""
    files = [write_json(tmp_path / name, ROWS) for name in ("a.json", "b.json")]
    output = tmp_path / "stability.json"
    done = train(
        "--stability", f"files={files[0]},{files[1]}", program="select_blocks.py", output=output, train_file=None
    )
    assert done.code == 0, done.err
    (pair,) = json.loads(output.read_text())["files"]["pairs"]
    assert (pair["jaccard"], pair["rank_correlation"]) == (1.0, pytest.approx(1.0))
