"""The comparison's plan: chosen learning rates, cells, what the table and the plots say, and bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from comparing import FIGURES, finish, write_folder
from comparison.build import build_plan
from comparison.cells import CellStore
from comparison.plan import WHOLE, Plan, Slot, check_batches
from comparison.plots import Line, _png, is_beyond, lines_of, write_plots
from comparison.report import build_report
from comparison.runner import Limits, list_cells, run_missing
from comparison.settings import Settings, parse_methods, parse_rates
from comparison.statistics import NO_INTERVAL
from comparison.table import markdown
from comparison.tasks import Counts

from smt_dist import SMTError

GRIDS = tuple(f"{name}=1e-3" for name in ("full", "smt", "lora", "dora", "shira"))


@pytest.fixture
def make_plan(folder, tmp_path):
    """A plan on the tiny model, of ``Settings`` apart from what is given."""

    def make(*methods: str, rates: tuple[str, ...] = (), lines: tuple[str, ...] = (), **changes) -> Plan:
        given = {"budgets": (0.05, 0.1, 0.2), "seeds": (0, 1), "block_size": 8, "test_items": 8, **changes}
        settings = Settings(parse_methods(methods), rates=parse_rates(rates), **given)
        source = folder / "sums"
        if not source.exists():
            write_folder(source, range(60), range(100, 108))
        counts = Counts(24, 8, 8)
        plan, said = build_plan(settings, str(folder / "model"), "math", source, counts, tmp_path / "out")
        assert set(lines) <= set(said)
        return plan

    return make


# -- learning rates ----------------------------------------------------------------------------------------------


def test_the_lowest_validation_loss_chooses_the_rate(make_plan):
    """At the middle budget with the first seed, and nothing else is looked at."""
    plan = make_plan("smt", "lora", rates=("smt=1e-3,1e-2,1e-1", "lora=1e-4,1e-3"))
    smt, lora = plan.settings.methods
    losses = {1e-4: 0.5, 1e-3: 0.9, 1e-2: 0.4, 1e-1: None}
    assert plan.choice(smt, 0.2) is None
    finish(plan, lambda _, rate: losses[rate])
    assert [tuning.slot for tuning in plan.tunings()] == [Slot(smt, 0.1, 0), Slot(lora, 0.1, 0)]
    assert {plan.choice(smt, budget).rate for budget in plan.settings.budgets} == {1e-2}
    assert plan.choice(smt, 0.1).edge is None
    assert plan.choice(smt, 0.1).losses == {1e-3: 0.9, 1e-2: 0.4, 1e-1: None}
    assert (plan.choice(lora, 0.1).rate, plan.choice(lora, 0.1).edge) == (1e-4, "lowest")
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
        for cell in plan.tries(plan.tuning(method, 0.1)).values():
            assert set(cell.paths) == {"model", "train", "validation", "artefact"}
            assert set(cell.request["data"]) == {"train", "validation"}
            for split in ("test", "held_out"):
                assert plan.data.digests[split] not in json.dumps(cell.request)


def test_a_family_shares_the_rate_of_its_first_score(make_plan):
    """``--tune family``: one grid for all of SMT's scores, unless a score has a grid of its own."""
    plan = make_plan("smt", "smt:random", "smt:magnitude", rates=("smt:magnitude=1e-5,1e-4",), tune="family")
    first, other, own = plan.settings.methods
    assert [(tuning.slot.method, len(tuning.grid)) for tuning in plan.tunings()] == [(first, 3), (own, 2)]
    finish(plan, lambda _, rate: abs(math.log(rate / 1e-3)))
    assert plan.choice(other, 0.1).rate == plan.choice(first, 0.1).rate == 1e-3
    assert plan.choice(own, 0.1).rate == 1e-4


def test_a_budget_with_a_grid_of_its_own_is_tuned_by_itself(make_plan):
    """The best rate falls as the budget grows: one rate for all would be unfair. Other budgets take the middle's."""
    rates = ("smt=1e-3,1e-2", "smt@0.2=1e-4,1e-3", "lora=1e-3", "lora@0.050=1e-2")
    plan = make_plan("smt", "smt:random", "lora", rates=rates, tune="family")
    smt, other, lora = plan.settings.methods
    assert [tuning.slot for tuning in plan.tunings()] == [Slot(smt, 0.1, 0), Slot(smt, 0.2, 0)]
    # 2 tries a tuning, of which one is the table's cell each; 3 budgets of 2 seeds of 3 methods.
    assert plan.count() == {"train": 4 + 18 - 2, "test": 18}
    finish(plan, lambda slot, rate: abs(math.log(rate * slot.budget)))
    assert next(plan.missing(), None) is None
    assert [plan.choice(smt, budget).rate for budget in (0.05, 0.1, 0.2)] == [1e-2, 1e-2, 1e-3]
    assert [plan.choice(other, budget).rate for budget in (0.05, 0.1, 0.2)] == [1e-2, 1e-2, 1e-3]
    assert [plan.choice(lora, budget).rate for budget in (0.05, 0.1, 0.2)] == [1e-2, 1e-3, 1e-3]
    report = build_report(plan)
    assert [row["rate"] for row in report["rows"] if row["method"] == "smt:random"] == [1e-2, 1e-2, 1e-3]
    assert "(--learning_rates smt@0.2=...;" in report["warnings"][1]
    assert "chosen by validation loss at 10 % (seed 0), 20 % (seed 0)." in markdown(report)


def test_a_score_with_a_grid_of_its_own_leaves_the_others_alone(make_plan):
    """Under ``family`` the rest tune the family's grid; nobody tunes where it can't train, and idle grids are named."""
    rates = (
        "smt=1e-3,1e-2",
        "smt@0.2=1e-4,1e-3",
        "smt:diagonal@0.2=1e-5,1e-4",
        "smt:abs_mean=1e-3,3e-3",
        "dora@0.2=1e-5",
    )
    plan = make_plan("smt:diagonal", "smt", "smt:random", rates=rates, tune="family", budgets=(0.05, 0.2), lines=(
        "--learning_rates smt:diagonal@0.2: no method here takes this grid",
        "--learning_rates dora@0.2: no method here takes this grid",
    ))  # fmt: skip
    diagonal, first, other = plan.settings.methods
    assert plan.reachable(diagonal) == [0.05]
    assert {(tuning.name, tuning.slot.method, tuning.slot.budget) for tuning in plan.tunings()} == {
        ("smt", diagonal, 0.05), ("smt:abs_mean", first, 0.2), ("smt@0.2", first, 0.2),
    }  # fmt: skip
    assert plan.tuning(other, 0.05).slot.method == diagonal
    assert plan.tuning(other, 0.2).slot.method == first


def test_cells_are_counted_once(make_plan):
    """The middle's one rate is among the general grid's tries there: 2 tries and 2 other budgets' cells, 3 tests."""
    plan = make_plan("lora", rates=("lora=1e-3,3e-3", "lora@0.1=1e-3"), seeds=(0,))
    assert plan.count() == {"train": 4, "test": 3}
    finish(plan)
    assert len(plan.finished()) == 7


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
    assert "<script" not in page
    assert 'id="accuracy"' in page
    assert 'id="validation_loss"' in page
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("level", "beyond"), [(0.5, True), (1.0, False), (1.5, False), (2.2, False), (3.0, True)])
def test_a_far_base_does_not_flatten_the_plot(level, beyond):
    """Trained figures span 1.2 to 1.8, spreads included: a level farther from them than that span is told in words."""
    trained = [Line("lora", [1.0, 2.0], [1.3, 1.5], [0.1, 0.3], flat=False)]
    base = Line("base", [0.0], [level], [0.0], flat=True)
    assert is_beyond(base, [base, *trained]) is beyond
    assert not is_beyond(base, [base])


def test_a_method_has_one_colour_in_all_panels(make_plan):
    """Also where it has a loss but no accuracy yet, which shifts the others' places in one panel."""
    plan = make_plan("full", "smt", "lora", rates=GRIDS)
    finish(plan)
    report = build_report(plan)
    report["rows"][0]["accuracy"] = None
    assert [line.method for line in lines_of(report, "accuracy", 100.0)] == ["smt:abs_mean", "lora"]
    accuracy, loss = _png(report).axes
    colours = [
        {label: handle.lines[0].get_color() for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        for axis in (accuracy, loss)
    ]
    assert colours[0] == {name: colours[1][name] for name in ("smt:abs_mean", "lora")}
    assert len(set(colours[1].values())) == 3


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
        ({"learning_rates": ["lora@0.03=1e-3"]}, "lora@0.03: not one of the budgets 0.005, 0.02, 0.08"),
        ({"learning_rates": ["lora@small=1e-3"]}, "expected such as lora=3e-4,1e-3 or lora@0.08=1e-4"),
        ({"learning_rates": ["full@0.02=1e-3"]}, "full has no budget"),
        ({"learning_rates": ["lora@0.02=1e-3", "lora@0.020=1e-2"]}, "lora@0.02 has a grid already"),
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
    outcome = run(
        "benchmarks/compare.py", *many, **{name: value for name, value in flags.items() if not isinstance(value, list)}
    )
    assert named in outcome.error
    assert not (tmp_path / "out" / "cells").exists()


def test_without_peft_its_extra_is_named(monkeypatch, make_plan):
    """A comparison without PEFT's methods doesn't need it."""
    monkeypatch.setattr("smt_dist.errors.find_spec", lambda _: None)
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
