"""Questions, folders of rows and made-up figures for the tests of the comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from comparison.plan import Plan, Slot
from programs import write_json

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


def finish(plan: Plan, losses: Callable[[Slot, float], float | None] = lambda *_: 1.0) -> None:
    """Write figures for every cell, as if they had run."""
    plan.store.cells.mkdir(parents=True, exist_ok=True)
    for tuning in plan.tunings():
        for rate, cell in plan.tries(tuning).items():
            plan.store.write(cell, {**FIGURES, "validation_loss": losses(tuning.slot, rate)})
    for slot in plan.slots():
        rate = plan.choice(slot.method, slot.budget).rate
        trained = plan.training(slot, rate)
        plan.store.write(trained, {**FIGURES, "validation_loss": losses(slot, rate)})
        plan.store.write(plan.testing(slot, trained), TESTED)
