"""The comparison's cells, run for real on a tiny model: in this process where imports would cost more than the cell."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from comparing import ask, write_folder
from comparison import cell_run, runner, training
from comparison.build import build_plan
from comparison.cell_run import restore, token_loss
from comparison.plan import Plan, Slot
from comparison.settings import Settings, parse_methods, parse_rates
from comparison.tasks import Counts
from programs import Outcome, write_json
from tiers import slow

from smt_dist import SMTError
from smt_dist.data.dataset import CausalLMCollator
from smt_dist.models.folder import load_causal_lm

FAMILIES = ("full", "smt", "lora", "dora", "shira")
RATES = tuple(f"{name}=1e-2" for name in FAMILIES)
SMALL = {
    "budgets": (0.1,), "seeds": (0,), "steps": 4, "batch_size": 4, "block_size": 8, "selection_steps": 2,
    "max_seq_length": 96, "test_items": 8, "max_new_tokens": 3, "prompt_style": "chat",
}  # fmt: skip


def run_here(command: list[str], log) -> int:
    """A cell in this process, in place of the subprocess's ``python -m``."""
    before, sys.argv = sys.argv, command[2:]
    try:
        cell_run.main()
    except SMTError as error:
        log.write(f"cell_run: error: {error}\n")
        return 2
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def here(monkeypatch) -> list[str]:
    """Runs cells in this process, and lists the kinds of those that ran."""
    ran: list[str] = []

    def counted(command: list[str], log) -> int:
        ran.append(json.loads(Path(command[-2]).read_text())["kind"])
        return run_here(command, log)

    monkeypatch.setattr(runner, "_run", counted)
    return ran


@pytest.fixture
def without_plots(monkeypatch) -> None:
    """Plotting takes longer than the cells."""
    monkeypatch.setattr("comparison.build.write_plots", lambda *_: True)


@pytest.fixture(scope="module")
def rows(folder) -> Path:
    return write_folder(folder / "sums", range(60), range(100, 108))


@pytest.fixture(scope="module")
def make_plan(folder, rows):
    def make(output: Path, *methods: str, rates: tuple[str, ...] = RATES, **changes) -> Plan:
        settings = Settings(parse_methods(methods), rates=parse_rates(rates), **{**SMALL, **changes})
        return build_plan(settings, str(folder / "model"), "math", rows, Counts(24, 8, 8), output)[0]

    return make


@pytest.fixture(scope="module")
def trained(make_plan, tmp_path_factory):
    """Method -> its training cell and figures, all of one seed; and one of another seed, named ``other``."""
    plan = make_plan(tmp_path_factory.mktemp("trained"), *FAMILIES)
    cells = {slot.method.family: plan.training(slot, 1e-2) for slot in plan.slots()}
    cells["other"] = plan.training(Slot(plan.settings.methods[2], 0.1, 1), 1e-2)
    return plan, {name: (cell, cell_run.train(cell.request, cell.paths)) for name, cell in cells.items()}


def test_all_methods_see_the_same_batches(trained):
    """In the same order, although each has drawn other random numbers before; another seed has another order."""
    _, cells = trained
    digests = {name: figures["batches"] for name, (_, figures) in cells.items()}
    assert len({digests[name] for name in FAMILIES}) == 1, digests
    assert digests["other"] != digests["lora"]


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_of_what_was_planned_and_saved(trained, family):
    """The planned size is trained, and what is on disk, merged, has the loss that was reported: nothing is missing."""
    plan, cells = trained
    cell, figures = cells[family]
    slot = next(slot for slot in plan.slots() if slot.method.family == family)
    assert figures["trainable"] == plan.sizes[slot.method.name, slot.budget].trainable > 0
    artefact = Path(cell.paths["artefact"])
    assert figures["artefact_bytes"] >= 4 * figures["trainable"]
    tokenizer, model = restore(slot.method, cell.paths["model"], artefact, torch.float32)
    validation = cell_run._dataset(cell.paths["validation"], tokenizer, cell.request)
    base = load_causal_lm(cell.paths["model"], torch.float32)
    # In batches of another size: every token counts the same.
    assert token_loss(model, validation, tokenizer, 3) == pytest.approx(figures["validation_loss"], rel=1e-5)
    assert token_loss(base, validation, tokenizer, 3) > figures["validation_loss"] + 0.01


@pytest.mark.parametrize("family", ["lora", "dora", "shira"])
def test_adapters_of_a_bf16_base_are_fp32(trained, family):
    """As SMT's masters are; rounded ones would lose to them by their rounding."""
    _, cells = trained
    request = cells[family][0].request
    method = parse_methods([family])[0]
    model = training.attach_adapter(method, request, load_causal_lm(cells[family][0].paths["model"], torch.bfloat16))
    kinds = {parameter.requires_grad: set() for parameter in model.parameters()}
    for parameter in model.parameters():
        kinds[parameter.requires_grad].add(parameter.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}


def test_a_cell_tells_orders_apart():
    """The digest is of the batches' tokens in their order, and of the asked number of batches only."""
    rows = [{"input_ids": [n, n + 1], "labels": [-100, n + 1], "attention_mask": [1, 1]} for n in range(3)]
    digests = []
    for order in ((0, 1, 2), (0, 1, 1), (1, 0, 2)):
        collator = training.RecordingCollator(CausalLMCollator(0), 2)
        for index in order:
            collator([rows[index]])
        digests.append(collator.digest)
    assert digests[0] == digests[1] != digests[2]


# -- the program -------------------------------------------------------------------------------------------------


@pytest.fixture
def compare(run, folder, rows, tmp_path):
    """``compare.py`` on the tiny model; lists are flags with many values."""

    def compare_it(*extra: str, **changes: object) -> Outcome:
        flags = {
            "model_name_or_path": folder / "model", "task": "math", "data_folder": rows, "output": tmp_path / "out",
            "validation_items": 8, "train_items": 24, **SMALL, "methods": ["smt", "lora"], "seeds": [0, 1],
            "learning_rates": list(RATES), **changes,
        }  # fmt: skip
        many = {name: list(map(str, value)) for name, value in flags.items() if isinstance(value, (list, tuple))}
        parts = [part for name, values in many.items() for part in (f"--{name}", *values)]
        return run("benchmarks/compare.py", *parts, *extra, **{k: v for k, v in flags.items() if k not in many})

    return compare_it


def test_a_comparison_from_flags_to_figures_goes_on_where_it_was(compare, here, tmp_path, caplog):
    """Ended early, gone on with, run again: each cell once. Then a damaged cell, which alone is run again."""
    methods = {"methods": ["smt", "lora", "smt:diagonal"], "budgets": [0.4]}
    begun = compare("--max_cells", "3", **methods)
    assert begun.code == 0, begun.err
    assert "smt:diagonal, 40 %: not reachable" in begun.err
    assert "ended early by --max_cells 3" in begun.out
    assert "[3/8, about" in begun.out
    done = compare(**methods)
    assert done.code == 0, done.err
    assert here == ["train", "test"] * 4
    assert not list((tmp_path / "out" / "artefacts").iterdir()), "what was tested is kept"
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert report["cells"] == {"finished": 8, "of": 8}
    smt, lora, diagonal = report["rows"]
    assert (smt["state"], lora["state"], diagonal["state"]) == ("done", "done", "not reachable")
    assert set(smt["seeds"]) == set(lora["seeds"]) == {"0", "1"}
    assert lora["against"]["word"] in ("better", "not worse", "worse")
    assert lora["against"]["low"] < lora["against"]["mean"] < lora["against"]["high"]
    for row in (smt, lora):
        assert row["seeds"]["0"]["items"] == 8
        assert 0 <= row["accuracy"]["mean"] <= 1
        assert row["peak_bytes"] > 2**26
        assert row["step_seconds"] > 0
    for suffix in ("md", "png", "html"):
        assert (tmp_path / "out" / f"comparison.{suffix}").stat().st_size > 0
    assert (tmp_path / "out" / "comparison.md").read_text() in done.out

    damaged = next(path for path in (tmp_path / "out" / "cells").glob("*.json") if '"accuracy"' in path.read_text())
    damaged.write_text(damaged.read_text()[:-40])
    repaired = compare(**methods)
    assert repaired.code == 0
    assert caplog.text.count("the cell is run again") == 1
    assert here[8:] == ["train", "test"], "its artefact was gone, so it was trained anew"
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["cells"]["finished"] == 8


@pytest.mark.usefixtures("without_plots")
def test_learning_rates_are_tuned_without_the_test_set(compare, here, monkeypatch, tmp_path):
    """Its files are gone while the cells that tune run; what the best of them has saved is then what is tested."""
    flags = {"methods": ["lora"], "learning_rates": ["lora=1e-5,1e-2"], "seeds": [0]}
    counted = runner._run

    def without_the_test_set(command: list[str], log) -> int:
        hidden = [next((tmp_path / "out" / "data").glob(f"math_{split}_*.json")) for split in ("test", "held_out")]
        for path in hidden:
            path.rename(path.with_suffix(".hidden"))
        code = counted(command, log)
        for path in hidden:
            path.with_suffix(".hidden").rename(path)
        return code

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_run", without_the_test_set)
        tuned = compare("--max_cells", "2", **flags)
    assert (tuned.code, here) == (0, ["train", "train"]), tuned.err
    (rates,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["learning_rates"]
    assert (rates["chosen"], rates["edge"]) == (1e-2, "highest")
    assert rates["validation_losses"]["0.01"] < rates["validation_losses"]["1e-05"]
    assert compare(**flags).code == 0
    assert here == ["train", "train", "test"]


@pytest.mark.usefixtures("without_plots")
def test_a_cell_that_fails_costs_one_cell(compare, here, monkeypatch):
    """It is named with the last line of its log, the rest goes on, the exit code is 1; the next launch tries again."""
    broken = [True]
    attach = training.attach_adapter

    def failing(method, request, model):
        if broken[0] and request["seed"] == 1:
            raise SMTError("no memory | left")
        return attach(method, request, model)

    monkeypatch.setattr(training, "attach_adapter", failing)
    failed = compare(methods=["lora"])
    assert failed.code == 1
    assert "failed: train lora 0.1 seed 1 rate 0.01: cell_run: error: no memory | left" in failed.err
    assert here == ["train", "test", "train"], "one training failed, so its test didn't run"
    assert r"(seed 1 failed: cell\_run: error: no memory \| left)" in failed.out
    shown = compare("--table", methods=["lora"])
    assert (shown.code, len(here)) == (0, 3)
    assert "failed: cell" in shown.out
    broken[0] = False
    assert compare(methods=["lora"]).code == 0
    assert here[3:] == ["train", "test"]


@pytest.mark.usefixtures("here", "without_plots")
def test_a_run_that_diverges_is_no_failure(compare, tmp_path):
    """SMT stops at NaN, the other methods' trainer goes on: both end as a line that says so, and nothing is tested."""
    done = compare(methods=["smt", "full"], learning_rates=["smt=1e30", "full=1e30"], seeds=[0])
    assert done.code == 0, done.err
    assert done.out.count(": diverged") == 2
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert [row["state"] for row in rows] == ["seed 0 diverged"] * 2


# -- processes ---------------------------------------------------------------------------------------------------


@slow
def test_a_cell_is_a_process_of_its_own(make_plan, tmp_path):
    """With its own peak memory: this process's is far above that of a cell that only looks at a tiny model."""
    plan = make_plan(tmp_path, "smt", rates=("smt=1e-2",), steps=2)
    plan.store.cells.mkdir(parents=True)
    (slot,) = plan.slots()
    cell = plan.training(slot, 1e-2)
    ballast = bytearray(2**30)  # zeroed pages aren't resident until they are touched
    ballast[:: 2**12] = b"\x01" * len(ballast[:: 2**12])
    assert runner.run_cell(plan, cell) is None
    figures = plan.store.result(cell)
    del ballast
    assert 2**26 < figures["start_bytes"] <= figures["peak_bytes"] < 2**30
    assert not plan.store.log(cell).exists()


def test_what_kills_a_cell_is_named(make_plan, tmp_path, monkeypatch):
    """A process that the kernel ends can't say why."""
    plan = make_plan(tmp_path, "lora")
    plan.store.cells.mkdir(parents=True)
    (slot,) = plan.slots()
    real = runner._run
    monkeypatch.setattr(runner, "_run", lambda _, log: real(["sh", "-c", "echo begun; kill -9 $$"], log))
    assert runner.run_cell(plan, plan.training(slot, 1e-2)) == "ended by SIGKILL"


def test_a_terminated_comparison_ends_its_cell(tmp_path):
    """Nothing goes on in the background: not even what was started last."""
    mark = tmp_path / "pid"
    with open(tmp_path / "log", "w") as log, runner._termination_as_interrupt():

        def terminate() -> None:
            while not mark.exists() or not mark.read_text().endswith("\n"):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=terminate, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            runner._run(["sh", "-c", f"echo $$ > {mark}; exec sleep 60"], log)
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_answers_are_counted_by_task(tmp_path, folder):
    """A folder with several test files has a figure for each, beside the one over all."""
    source = write_folder(tmp_path / "in", range(60), range(100, 104))
    write_json(source / "test" / "more.json", [ask(n) for n in range(200, 204)])
    settings = Settings(parse_methods(["base"]), **SMALL)
    plan, _ = build_plan(settings, str(folder / "model"), "math", source, Counts(24, 8, 8), tmp_path / "out")
    (slot,) = plan.slots()
    cell = plan.training(slot, 0.0)
    assert cell_run.train(cell.request, cell.paths)["trainable"] == 0
    tested = plan.testing(slot, cell)
    figures = cell_run.test(tested.request, tested.paths)
    assert set(figures["by_task"]) == {"sums", "more"}
    assert figures["items"] == 8
    assert figures["accuracy"] == pytest.approx(sum(figures["by_task"].values()) / 2)
