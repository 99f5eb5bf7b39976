"""The default tier holds every kind of promise: what is marked slow has a representative that isn't."""

from __future__ import annotations

import importlib
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_benchmark
import test_capacity
import test_checkpoint_matrix
import test_communication
import test_comparison_runs
import test_guards
import test_memory_measured
import test_memory_plan
import test_programs
import test_selection_parity
import test_training_parity
from tiers import all_differences, chosen, in_default_tier, quick_values, slow, slow_unless

TESTS = Path(__file__).parent
MODULES = [".".join(path.relative_to(TESTS).with_suffix("").parts) for path in sorted(TESTS.rglob("test_*.py"))]
ENGINES = {"ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"}
# What runs each program from its flags to what it writes.
RUNS_OF = {
    "smt-train": test_programs.test_training_makes_an_adapter_that_evaluation_reads,
    "smt-select": test_programs.test_a_selection_made_apart_is_the_one_that_training_would_make,
    "smt-merge": test_programs.test_a_merged_checkpoint_scores_as_base_and_adapter_do,
    "smt-evaluate": test_programs.test_training_makes_an_adapter_that_evaluation_reads,
    "smt-plan": test_memory_plan.test_the_program_prints_a_table_and_writes_whole_bytes,
    "smt-compare": test_comparison_runs.test_a_comparison_from_flags_to_figures_goes_on_where_it_was,
    "step.py": test_benchmark.test_smt_beats_full_fine_tuning_and_the_report_is_complete,
    "communication.py": test_communication.test_the_program_prints_and_writes_every_row,
    "capacity.py": test_capacity.test_two_ranks_with_the_papers_score_in_passes,
    "profile_memory.py validate": test_memory_measured.test_validation_runs_its_cells_and_goes_on_where_it_stopped,
}


def test_every_file_has_something_in_the_default_tier():
    """A room of which no test runs by default can break for a day before anybody sees it."""
    with all_differences() as check:
        for name in MODULES:
            tests = [test for key, test in vars(importlib.import_module(name)).items() if key.startswith("test_")]
            with check(name):
                assert any(in_default_tier(test) for test in tests if callable(test))


def test_every_engine_has_a_parity_run_on_two_ranks():
    """The promise that all others rest on; in bf16 where engines differ most."""
    parity = test_training_parity
    in_fp32 = quick_values(parity.test_run_trains_as_one_process_does, "run")
    in_bf16 = quick_values(parity.test_bf16_is_as_near_to_the_truth_as_dense_training_is, "run")
    assert {run.engine for run in in_fp32 if run.world_size == 2} == ENGINES
    assert {run.engine for run in in_bf16 if run.world_size == 2} >= {"ddp", "fsdp2", "zero3"}
    assert any(run.world_size == 1 for run in in_fp32)
    assert in_default_tier(parity.test_one_process_equals_masked_dense_training)


def test_selections_are_made_by_each_way_to_hold_a_base_on_two_ranks():
    """Replicated, sharded by PyTorch, partitioned by DeepSpeed."""
    parity = test_selection_parity.test_selections_and_scores_are_those_of_one_process
    runs = quick_values(parity, ("world_size", "engine"))
    assert set(runs) >= {(2, "ddp"), (2, "fsdp2"), (2, "zero3")}


def test_checkpoint_pairs_have_every_engine_on_both_sides():
    """A format that one engine writes or reads otherwise shows in a pair with it only."""
    matrix = test_checkpoint_matrix
    pairs = quick_values(matrix.test_training_goes_on_as_if_nothing_had_happened, "pair")
    assert pairs == quick_values(matrix.test_at_load_the_state_is_the_files_bit_by_bit, "pair")
    for side in zip(*pairs, strict=True):
        assert {run.engine for run in side} == ENGINES


def test_guards_run_where_we_step_and_where_deepspeed_does():
    """The two optimizers that may step on non-finite gradients."""
    for test in (
        test_guards.test_skipped_step_leaves_nothing_and_training_goes_on,
        test_guards.test_one_wrong_element_is_never_saved,
    ):
        assert set(quick_values(test, "engine")) >= {"ddp", "zero3"}


def test_every_program_has_a_run():
    """From its flags to what it writes."""
    scripts = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(RUNS_OF) >= set(scripts)
    assert all(in_default_tier(test) for test in RUNS_OF.values())


# -- what tiers.py does ----------------------------------------------------------------------------------------------


def test_all_differences_are_listed():
    """The first alone would hide whether one engine is wrong or all."""

    def compare(found: dict[str, int]) -> None:
        with all_differences() as check:
            for name, value in found.items():
                with check(name):
                    assert value == 2

    with pytest.raises(AssertionError, match="differences: 2") as caught:
        compare({"loss": 1, "norm": 2, "rate": 3})
    assert "loss" in str(caught.value)
    assert "assert 3 == 2" in str(caught.value)
    assert "norm" not in str(caught.value)


@pytest.mark.parametrize("one", slow_unless([1, 2, (3, 4)], lambda value: value == (3, 4)))
@pytest.mark.parametrize("other", [5, pytest.param(6, marks=slow)])
def test_a_fixture_learns_what_was_asked_for(request, one, other):
    """Or it would launch the whole matrix for one of its tests."""
    assert one in chosen(request, "one")
    assert (one, other) in chosen(request, "one", "other")
    assert chosen(request, "nothing") == []
    assert set(chosen(request, "one")) <= {1, 2, (3, 4)}


def test_marks_are_read_as_pytest_reads_them():
    """A representative that is slow by another mark of its own would be none."""
    test = test_a_fixture_learns_what_was_asked_for
    assert quick_values(test, "one") == [(3, 4)]
    assert quick_values(test, "other") == [5]
    assert in_default_tier(test)
    module = SimpleNamespace(__module__=__name__, pytestmark=[*test.pytestmark, slow.mark])
    assert not in_default_tier(module)
    assert quick_values(module, "one") == []


def test_run_sh_says_how_it_is_used():
    """What it leaves out must be easy to run."""
    said = subprocess.run([TESTS / "run.sh", "--help"], capture_output=True, text=True, check=True).stdout
    assert {"--all", "--rest"} <= set(said.split())
