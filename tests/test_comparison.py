"""The comparison's parts: disjoint sets, matched sizes, intervals."""

from __future__ import annotations

import json
import math

import pytest
from comparing import ask, write_folder
from comparison.methods import parse_method, size_of
from comparison.statistics import NO_INTERVAL, mean_and_spread, paired_difference, t_quantile
from comparison.tasks import SPLITS, Counts, prepare, question, refuse_overlap
from programs import write_json
from torch import nn

from smt_dist import SMTError
from smt_dist.config import SMTConfig

TARGETS = ("attention", "o_proj", "mlp")
CONFIG = SMTConfig.model_validate({"block_size": 8, "groups": [{"target_modules": list(TARGETS)}]})


# -- tasks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["chain_sum", "products", "gcd"])
def test_drawn_sets_share_no_question(task, tmp_path):
    """A failure means that an accuracy may be memory."""
    pytest.importorskip("reasoning_gym")
    data = prepare(task, None, Counts(200, 40, 60), 0, tmp_path)
    sets = {split: json.loads(data.files[split].read_text()) for split in SPLITS}
    assert {split: len(rows) for split, rows in sets.items()} == data.rows
    assert data.rows == {"train": 200, "validation": 40, "test": 60, "held_out": 40}
    asked = [question(row) for split in ("train", "validation", "test") for row in sets[split]]
    assert len(asked) == len(set(asked)) == 300
    assert prepare(task, None, Counts(200, 40, 60), 0, tmp_path).digests == data.digests
    assert prepare(task, None, Counts(200, 40, 60), 1, tmp_path).digests != data.digests


def test_a_folder_is_split_by_its_questions(tmp_path):
    """Train, validation and held-out rows come from the train file; one that stands twice there is in one set, once."""
    source = write_folder(tmp_path / "in", range(40), range(100, 110))
    rows = json.loads((source / "train.json").read_text())
    write_json(source / "train.json", [*rows, *rows[:20]])
    data = prepare("math", source, Counts(None, 8, 5), 0, tmp_path)
    assert data.rows == {"train": 24, "validation": 8, "held_out": 8, "test": 5}
    sets = {split: {question(row) for row in json.loads(data.files[split].read_text())} for split in SPLITS}
    known = [sets[split] for split in ("train", "validation", "held_out")]
    assert set.union(*known) == {question(ask(n)) for n in range(40)}
    assert sum(map(len, known)) == 40
    assert all(row["task"] == "sums" for row in json.loads(data.files["test"].read_text()))


@pytest.mark.parametrize(
    "pair", [("train", "test"), ("validation", "test"), ("train", "validation"), ("held_out", "train")]
)
def test_a_question_in_two_sets_is_refused(pair):
    """However it is spaced and capitalised."""
    sets = {split: [ask(10 * index)] for index, split in enumerate(SPLITS)}
    refuse_overlap(sets)
    sets[pair[0]] = [*sets[pair[0]], {**sets[pair[1]][0], "instruction": sets[pair[1]][0]["instruction"].upper() + " "}]
    with pytest.raises(SMTError, match=r"a question of the .* set is in the .* set too"):
        refuse_overlap(sets)


@pytest.mark.parametrize(
    ("task", "train", "test", "named"),
    [
        ("sudoku", None, None, "--task: 'sudoku' is not one of chain_sum, products, gcd, math"),
        ("math", None, None, "--task math: needs --data_folder"),
        ("chain_sum", range(9), range(20, 30), "takes no --data_folder"),
        ("math", range(9), range(20, 30), "too few for 2 x 8"),
        ("math", range(40), range(0), "the list has no rows"),
        ("math", range(40), range(30, 50), "a question of the test set is in the"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(task, train, test, named, tmp_path):
    """Before the first cell."""
    source = write_folder(tmp_path / "in", train, test) if train is not None else None
    with pytest.raises(SMTError) as caught:
        prepare(task, source, Counts(None, 8, 20), 0, tmp_path)
    assert named in str(caught.value)


def test_too_many_questions_are_refused(tmp_path, monkeypatch):
    """Small numbers have few products; repeating them would leak."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr("comparison.tasks.DRAWS", 1)
    with pytest.raises(SMTError, match=r"different questions, .* are wanted"):
        prepare("products", None, Counts(3000, 1, 1), 0, tmp_path)


# -- sizes -------------------------------------------------------------------------------------------------------


class Shapes(nn.Module):
    """Weights of the targets' names and shapes, and an embedding that counts as a parameter but is no target."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(300, 64)
        for name, rows in (("q_proj", 64), ("k_proj", 16), ("v_proj", 16), ("o_proj", 64), ("gate_proj", 176)):
            setattr(self, name, nn.Linear(64, rows, bias=False))


@pytest.mark.parametrize("budget", [0.04, 0.1, 0.3])
@pytest.mark.parametrize("name", ["smt:abs_mean", "smt:random", "lora", "dora", "shira"])
def test_every_method_gets_the_budget_to_half_a_unit(name, budget):
    """A unit is a block, or a rank over all targets; a failure means that methods of other sizes are compared."""
    model, sides = Shapes(), 5 * 64 + 64 + 16 + 16 + 64 + 176
    total = sum(parameter.numel() for parameter in model.parameters())
    size = size_of(parse_method(name), budget, model, CONFIG)
    if size.problem is not None:  # SHiRA can't have more than there is
        assert budget == 0.3
        return
    assert abs(size.trainable - budget * total) <= (32 if name.startswith("smt") else sides / 2)


@pytest.mark.parametrize(
    ("name", "budget", "problem"),
    [
        ("smt:diagonal", 0.3, "the targets' diagonals have"),
        ("smt:abs_mean", 0.9, "the targets have 336 blocks"),
        ("lora", 0.6, "more than a target's short side; at most 16"),
        ("shira", 0.5, "more elements than a target has; at most 12"),
    ],
)
def test_a_budget_out_of_reach_is_said(name, budget, problem):
    """A line of the table, not an error."""
    size = size_of(parse_method(name), budget, Shapes(), CONFIG)
    assert size.trainable == 0
    assert problem in size.problem


# -- statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.706), (4, 2.776), (30, 2.042), (31, 2.0395), (120, 1.9799)])
def test_students_t_is_that_of_the_tables(degrees, value):
    """On both sides of the end of our own table."""
    assert t_quantile(degrees) == pytest.approx(value, abs=5e-4)


def test_the_interval_is_that_of_paired_differences():
    """Differences 1, 2, 3: mean 2, deviation 1, half width 4.3027 / sqrt(3). A seed that one lacks is left out."""
    found = paired_difference({0: 5.0, 1: 7.0, 2: 9.0, 7: 99.0}, {2: 6.0, 1: 5.0, 0: 4.0})
    assert (found.mean, found.seeds) == (2.0, 3)
    assert (found.low, found.high) == (pytest.approx(2 - 2.48416, abs=1e-4), pytest.approx(2 + 2.48416, abs=1e-4))
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert mean_and_spread([1.0, 3.0]) == (2.0, math.sqrt(2))
    assert mean_and_spread([1.0]) == (1.0, None)


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([-0.11, -0.10, -0.09], "better"),
        ([0.11, 0.10, 0.09], "worse"),
        ([0.1, -0.1, 0.2], "not worse"),
        ([0.0, 0.0], "not worse"),
        ([-0.1, -0.3], "not worse"),  # two seeds, 12.7 deviations
        ([-5.0], NO_INTERVAL),
    ],
)
def test_the_interval_decides_the_word(differences, word):
    """One seed decides nothing."""
    assert paired_difference(dict(enumerate(differences)), dict.fromkeys(range(9), 0.0)).word == word
