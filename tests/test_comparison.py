"""The comparison's parts: disjoint sets, matched sizes, chosen learning rates, intervals, and what the table says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from programs import write_json
from torch import nn

from smt_dist import SMTError
from smt_dist.comparison.build import build_plan
from smt_dist.comparison.cells import CellStore
from smt_dist.comparison.methods import parse_method, size_of
from smt_dist.comparison.plan import WHOLE, Plan, Slot, check_batches
from smt_dist.comparison.plots import lines_of, write_plots
from smt_dist.comparison.report import build_report
from smt_dist.comparison.runner import Limits, list_cells, run_missing
from smt_dist.comparison.settings import Settings, parse_methods, parse_rates
from smt_dist.comparison.statistics import NO_INTERVAL, mean_and_spread, paired_difference, t_quantile
from smt_dist.comparison.table import markdown
from smt_dist.comparison.tasks import SPLITS, Counts, prepare, question, refuse_overlap
from smt_dist.config import SMTConfig

GRIDS = tuple(f"{name}=1e-3" for name in ("full", "smt", "lora", "dora", "shira"))
TARGETS = ("attention", "o_proj", "mlp")
CONFIG = SMTConfig.model_validate({"block_size": 8, "groups": [{"target_modules": list(TARGETS)}]})
FIGURES = {
    "trainable": 704, "validation_loss": 1.0, "step_seconds": 0.5, "peak_bytes": 2**20, "artefact_bytes": 2**12,
    "batches": "same", "seconds": 60.0, "selection_seconds": 0.0, "start_bytes": 2**19,
}  # fmt: skip
TESTED = {"test_loss": 1.5, "accuracy": 0.25, "items": 8, "by_task": {}, "seconds": 30.0}


def ask(number: int, **changes: str) -> dict[str, str]:
    return {
        "instruction": f"add one to {number}",
        "input": "",
        "output": str(number + 1),
        "answer": str(number + 1),
    } | (changes)


def write_folder(folder: Path, train: range, test: range) -> Path:
    (folder / "test").mkdir(parents=True)
    write_json(folder / "train.json", [ask(n) for n in train])
    write_json(folder / "test" / "sums.json", [ask(n) for n in test])
    return folder


@pytest.fixture
def make_plan(folder, tmp_path):
    """A plan on the tiny model, of ``Settings`` apart from what is given."""

    def make(*methods: str, rates: tuple[str, ...] = (), **changes) -> Plan:
        given = {"budgets": (0.05, 0.1, 0.2), "seeds": (0, 1), "block_size": 8, "test_items": 8, **changes}
        settings = Settings(parse_methods(methods), rates=parse_rates(rates), **given)
        source = folder / "sums"
        if not source.exists():
            write_folder(source, range(60), range(100, 108))
        return build_plan(settings, str(folder / "model"), "math", source, Counts(24, 8, 8), tmp_path / "out")[0]

    return make


def finish(plan: Plan, losses: Callable[[Slot, float], float | None] = lambda *_: 1.0) -> None:
    """Write figures for every cell, as if they had run."""
    plan.store.cells.mkdir(parents=True, exist_ok=True)
    for method in plan.settings.methods:
        for rate, cell in plan.tuning(method).items():
            loss = losses(plan.tuning_slot(method), rate)
            plan.store.write(cell, {**FIGURES, "validation_loss": loss})
    for slot in plan.slots():
        rate = plan.choice(slot.method).rate
        trained = plan.training(slot, rate)
        plan.store.write(trained, {**FIGURES, "validation_loss": losses(slot, rate)})
        plan.store.write(plan.testing(slot, trained), TESTED)


# -- tasks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["chain_sum", "products", "gcd"])
def test_drawn_sets_share_no_question(task, tmp_path):
    """A failure means that an accuracy may be memory."""
    pytest.importorskip("reasoning_gym")
    data = prepare(task, None, Counts(200, 40, 60), 0, tmp_path)
    sets = {split: json.loads(data.files[split].read_text()) for split in SPLITS}
    assert {split: len(rows) for split, rows in sets.items()} == data.rows
    assert data.rows == {"train": 200, "validation": 40, "test": 60, "held_out": 60}
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
    monkeypatch.setattr("smt_dist.comparison.tasks.DRAWS", 1)
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


# -- learning rates ----------------------------------------------------------------------------------------------


def test_the_lowest_validation_loss_chooses_the_rate(make_plan):
    """At the middle budget with the first seed, and nothing else is looked at."""
    plan = make_plan("smt", "lora", rates=("smt=1e-3,1e-2,1e-1", "lora=1e-4,1e-3"))
    smt, lora = plan.settings.methods
    losses = {1e-4: 0.5, 1e-3: 0.9, 1e-2: 0.4, 1e-1: None}
    assert plan.choice(smt) is None
    finish(plan, lambda _, rate: losses[rate])
    assert plan.tuning_slot(smt) == Slot(smt, 0.1, 0)
    assert (plan.choice(smt).rate, plan.choice(smt).edge) == (1e-2, None)
    assert plan.choice(smt).losses == {1e-3: 0.9, 1e-2: 0.4, 1e-1: None}
    assert (plan.choice(lora).rate, plan.choice(lora).edge) == (1e-4, "lowest")
    report = build_report(plan)
    assert report["warnings"] == [
        "lora: the best learning rate, 0.0001, is the lowest of its grid: extend it (--learning_rates lora=...; "
        "finished cells are kept)"
    ]
    assert "0.0001 (lowest of the grid!)" in markdown(report)


def test_no_training_cell_knows_of_the_test_set(make_plan):
    """Neither its content, on which the cell's name would depend, nor its place."""
    plan = make_plan("smt", "lora")
    for method in plan.settings.methods:
        for cell in plan.tuning(method).values():
            assert set(cell.paths) == {"model", "train", "validation", "artefact"}
            assert set(cell.request["data"]) == {"train", "validation"}
            for split in ("test", "held_out"):
                assert plan.data.digests[split] not in json.dumps(cell.request)


def test_a_family_shares_the_rate_of_its_first_score(make_plan):
    """``--tune family``: one grid for all of SMT's scores, unless a score has a grid of its own."""
    plan = make_plan("smt", "smt:random", "smt:magnitude", rates=("smt:magnitude=1e-5,1e-4",), tune="family")
    first, other, own = plan.settings.methods
    assert [len(plan.tuning(method)) for method in (first, other, own)] == [3, 0, 2]
    finish(plan, lambda _, rate: abs(math.log(rate / 1e-3)))
    assert plan.choice(other).rate == plan.choice(first).rate == 1e-3
    assert plan.choice(own).rate == 1e-4


def test_the_cell_that_tuned_is_not_trained_again(make_plan):
    """Its settings are those of the table's cell. One grid of 3 and 3 budgets of 2 seeds: 8 trainings, 6 tests."""
    plan = make_plan("smt")
    assert plan.count() == {"train": 8, "test": 6}
    finish(plan)
    assert len(plan.finished()) == 14
    assert next(plan.missing(), None) is None
    assert "14 cells (8 train, 6 test), 14 done" in list_cells(plan)


def test_methods_that_saw_other_batches_are_not_compared(make_plan):
    """The order of the data is the seed's alone. The check must see one cell of another order."""
    plan = make_plan("smt", "lora", rates=("smt=1e-3", "lora=1e-3"))
    finish(plan)
    check_batches(plan)
    cell = plan.training(plan.slots()[-1], 1e-3)
    plan.store.write(cell, {**FIGURES, "batches": "other"})
    with pytest.raises(RuntimeError, match="saw other batches than"):
        check_batches(replace(plan, store=CellStore(plan.store.cells.parent)))


# -- table and plots ---------------------------------------------------------------------------------------------


def test_the_table_says_who_is_better(make_plan):
    """Words from intervals, against SMT's default score at the same budget; unreachable and missing lines as such."""
    plan = make_plan("full", "smt", "smt:diagonal", "lora", "dora", budgets=(0.05, 0.4), rates=GRIDS, seeds=(0, 1, 2))
    offsets = {"full": -0.5, "smt:abs_mean": 0.0, "smt:diagonal": 0.5, "lora": 0.0, "dora": 0.0}
    noise = {"lora": (0.1, -0.1, 0.05)}
    finish(
        plan,
        lambda slot, _: 2 + slot.seed + offsets[slot.method.name] + noise.get(slot.method.name, (0,) * 3)[slot.seed],
    )
    dora = plan.settings.methods[-1]
    for seed in plan.settings.seeds:
        plan.store.path(plan.training(Slot(dora, 0.05, seed), 1e-3)).unlink()
    plan = replace(plan, store=CellStore(plan.store.cells.parent))
    table = markdown(build_report(plan)).splitlines()

    def line(start: str) -> str:
        (found,) = [line for line in table if line.startswith(f"| {start}")]
        return found

    assert "**better**: -0.5000 (-0.5000 .. -0.5000)" in line("full ")
    assert "3.0000 ± 1.0000" in line("smt:abs_mean, 5 %")
    assert line("smt:abs_mean, 5 %").endswith("| the reference |")
    assert "**worse**: +0.5000" in line("smt:diagonal, 5 %")
    assert "**not worse**: +0.0167" in line("lora, 5 %")
    assert "missing: seed 0 untrained; seed 1 untrained; seed 2 untrained" in line("dora, 5 %")
    assert "not reachable: the targets' diagonals have" in line("smt:diagonal, 40 %")
    assert "25.0%" in line("full ")


def test_one_seed_has_no_interval(make_plan):
    """Neither an interval nor a spread is made up."""
    plan = make_plan("smt", "lora", rates=GRIDS, seeds=(3,))
    finish(plan)
    table = markdown(build_report(plan))
    assert NO_INTERVAL in table
    assert "One seed: there is no spread and no interval." in table
    assert "±" not in table


def test_plots_show_every_method_and_need_no_network(make_plan, tmp_path, caplog):
    """A line a method, shares ascending; names from outside can't become markup."""
    plan = make_plan("base", "full", "smt", "lora", rates=GRIDS)
    finish(plan)
    report = build_report(plan)
    lines = {line.method: line for line in lines_of(report, "accuracy", 100.0)}
    assert list(lines) == ["base", "full", "smt:abs_mean", "lora"]
    assert lines["base"].flat
    assert len(lines["smt:abs_mean"].shares) == 3
    assert lines["smt:abs_mean"].shares == sorted(lines["smt:abs_mean"].shares)
    assert lines["full"].shares == [100.0]
    assert lines["lora"].means == [25.0] * 3
    report["task"] = "<img src=x>"
    assert write_plots(report, tmp_path / "comparison.html"), caplog.text
    page = (tmp_path / "comparison.html").read_text()
    assert "<img src=x>" not in page
    assert "<script src" not in page
    assert 'id="accuracy"' in page
    assert 'id="validation_loss"' in page
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"methods": ["qlora"]}, "'qlora' is not one of base, full, lora, dora, shira, smt:SCORE"),
        ({"methods": ["smt:best"]}, "SMT has no score 'best'; it has abs_mean, mean_abs"),
        ({"methods": ["smt", "smt:abs_mean"]}, "a method is given twice"),
        ({"methods": ["smt:no_such.module"]}, "no_such.module can't be imported"),
        ({"methods": ["lora:3"]}, "'lora:3' is not one of"),
        ({"budgets": ["0"]}, "--budgets: 0 is not in (0, 1)"),
        ({"budgets": ["0.1", "1.5"]}, "--budgets: 1.5 is not in (0, 1)"),
        ({"budgets": ["nan"]}, "--budgets: nan is not in (0, 1)"),
        ({"seeds": ["1", "1"]}, "each once"),
        ({"seeds": ["-1"]}, "--seeds: must be from 0"),
        ({"test_items": 1}, "--test_items: at least 2, not 1"),
        ({"task": "sudoku"}, "--task: 'sudoku' is not one of"),
        ({"data_folder": "/nowhere"}, "/nowhere: no such folder"),
        ({"data_folder": None}, "needs --data_folder"),
        ({"model_name_or_path": "./nowhere"}, "./nowhere: no such folder"),
        ({"learning_rates": ["adalora=1e-3"]}, "'adalora' is not one of"),
        ({"learning_rates": ["lora=fast"]}, "expected such as lora=3e-4,1e-3"),
        ({"learning_rates": ["lora=-1"]}, "finite and above 0"),
        ({"dtype": "float16"}, "--dtype: 'float16' is not one of float32, bfloat16"),
        ({"targets": ["experts"]}, "'experts' matches no linear module"),
        ({"block_size": 7}, "7"),
        ({"strategy": "best"}, "selection.strategy"),
        ({"hours": -1}, "--hours: -1 is not above 0"),
        ({"steps": 0}, "must be at least 1"),
    ],
)
def test_bad_input_is_one_line(changes, named, run, folder, tmp_path):
    """Before anything is trained."""
    source = folder / "bad_input"
    if not source.exists():
        write_folder(source, range(40), range(100, 108))
    flags = {
        "model_name_or_path": folder / "model", "task": "math", "data_folder": source, "output": tmp_path / "out",
        "block_size": 8, "validation_items": 4, **changes,
    }  # fmt: skip
    many = [part for name, value in flags.items() if isinstance(value, list) for part in (f"--{name}", *value)]
    outcome = run("compare.py", *many, **{name: value for name, value in flags.items() if not isinstance(value, list)})
    assert named in outcome.error
    assert not (tmp_path / "out" / "cells").exists()


def test_without_peft_its_extra_is_named(monkeypatch, make_plan):
    """A comparison without PEFT's methods doesn't need it."""
    monkeypatch.setattr("smt_dist.extras.find_spec", lambda _: None)
    make_plan("smt", "full")
    with pytest.raises(SMTError, match=r'--methods dora: PEFT is not installed; pip install "smt_dist\[benchmark\]"'):
        make_plan("smt", "dora")


def test_two_launches_in_one_folder_are_refused(make_plan):
    """They would overwrite what the other trains."""
    plan = make_plan("smt")
    with plan.store.locked(), pytest.raises(SMTError, match="another comparison runs here"):
        run_missing(plan, Limits(), print)


def test_the_base_is_one_cell(make_plan):
    """It knows no seed, no budget and no learning rate."""
    plan = make_plan("base", "smt", rates=GRIDS)
    base = plan.settings.methods[0]
    assert [slot for slot in plan.slots() if slot.method == base] == [Slot(base, WHOLE, 0)]
    assert build_report(plan)["rows"][0]["rate"] is None
