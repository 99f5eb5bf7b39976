"""The figures of all finished cells, row by row: what ``comparison.json``, the table and the plots show."""

from __future__ import annotations

import statistics
from typing import Any

from comparison.methods import REFERENCE_SCORE, Method
from comparison.plan import WHOLE, Plan, Tuning
from comparison.settings import as_json
from comparison.statistics import mean_and_spread, paired_difference

MEASURES = ("validation_loss", "test_loss", "accuracy")
Row = dict[str, Any]


def build_report(plan: Plan) -> dict[str, Any]:
    """Settings, tuned learning rates and the rows, as plain values.

    A row's ``state`` is ``done``, ``not reachable``, or says what is missing; ``against`` compares its validation
    losses with the reference's of the same budget and seeds (a method without budgets: of the largest budget).
    """
    settings = plan.settings
    rows = [_row(plan, method, budget) for method in settings.methods for budget in plan.budgets(method)]
    reference = reference_name(plan)
    by_budget = {row["budget"]: row for row in rows if row["method"] == reference}
    for row in rows:
        other = by_budget.get(row["budget"] if row["budget"] != WHOLE else settings.budgets[-1])
        row["against"] = _against(row, other)
    return {
        "task": plan.task,
        "rows_of_data": plan.data.rows,
        "settings": as_json(settings),
        "reference": reference,
        "learning_rates": [_rates(plan, tuning) for tuning in plan.tunings()],
        "rows": rows,
        "cells": {"finished": len(plan.finished()), "of": sum(plan.count().values())},
        "warnings": edge_warnings(plan),
    }


def reference_name(plan: Plan) -> str | None:
    """SMT with its default score, or else its first score; None where there is no SMT."""
    names = [method.name for method in plan.settings.methods if method.family == "smt"]
    default = f"smt:{REFERENCE_SCORE}"
    return default if default in names else next(iter(names), None)


def edge_warnings(plan: Plan) -> list[str]:
    """A line for each chosen rate at an end of its grid, where the best may lie beyond."""
    lines = []
    for tuning in plan.tunings():
        choice, method = plan.choice_of(tuning), tuning.slot.method
        if choice is not None and choice.edge is not None:
            lines.append(
                f"{method.name}: the best learning rate, {choice.rate:g}, is the {choice.edge} of its grid: extend it "
                f"(--learning_rates {tuning.name}=...; finished cells are kept)"
            )
    return lines


def _row(plan: Plan, method: Method, budget: float) -> Row:
    size = plan.sizes[method.name, budget]
    total = plan.sizes["", WHOLE].trainable
    choice = plan.choice(method, budget) if size.problem is None else None
    row: Row = {
        "method": method.name, "budget": budget, "trainable": size.trainable, "share": size.trainable / total,
        "amount": size.amount, "rate": choice.rate if choice and method.family != "base" else None,
        "edge": choice.edge if choice else None, "seeds": {}, "state": "done",
    }  # fmt: skip
    if size.problem is not None:
        return {**row, "state": "not reachable", "problem": size.problem}
    if choice is None:
        return {**row, "state": _why_no_choice(plan, plan.tuning(method, budget))}
    states: list[str] = []
    steps, peaks, sizes, selections = [], [], [], []
    for slot in (slot for slot in plan.slots() if (slot.method, slot.budget) == (method, budget)):
        trained = plan.training(slot, choice.rate)
        tested = plan.testing(slot, trained)
        figures, test = plan.store.result(trained), plan.store.result(tested)
        failure = plan.store.failure(trained) or plan.store.failure(tested)
        if failure is not None:
            states.append(f"seed {slot.seed} failed: {failure}")
        elif figures is not None and figures["validation_loss"] is None:
            states.append(f"seed {slot.seed} diverged")
        elif figures is None or test is None:
            states.append(f"seed {slot.seed} {'untrained' if figures is None else 'untested'}")
        if figures is not None and figures["validation_loss"] is not None:
            found = {"validation_loss": figures["validation_loss"]}
            if test is not None:
                found |= {name: test[name] for name in ("test_loss", "accuracy", "items", "by_task")}
            row["seeds"][slot.seed] = found
            for values, name in ((steps, "step_seconds"), (peaks, "peak_bytes"), (sizes, "artefact_bytes")):
                values.append(figures[name])
            selections.append(figures["selection_seconds"])
    row["state"] = "; ".join(states) or "done"
    for name in MEASURES:
        values = [found[name] for found in row["seeds"].values() if name in found]
        row[name] = dict(zip(("mean", "spread"), mean_and_spread(values), strict=True)) if values else None
    for name, values in (("step_seconds", steps), ("selection_seconds", selections)):
        row[name] = statistics.median(values) if values and None not in values else None
    for name, values in (("peak_bytes", peaks), ("artefact_bytes", sizes)):
        row[name] = max(values) if values and None not in values else None
    return row


def _why_no_choice(plan: Plan, tuning: Tuning) -> str:
    cells = plan.tries(tuning).values()
    if any(plan.store.result(cell) is None and plan.store.failure(cell) is None for cell in cells):
        return "learning rate not tuned yet"
    failures = [failure for cell in cells if (failure := plan.store.failure(cell)) is not None]
    return f"no learning rate worked{f': {failures[-1]}' if failures else ': all diverged'}"


def _against(row: Row, reference: Row | None) -> Row | None:
    if reference is None or row is reference:
        return None
    losses = [{seed: found["validation_loss"] for seed, found in each["seeds"].items()} for each in (row, reference)]
    difference = paired_difference(losses[0], losses[1])
    return None if difference is None else {**vars(difference), "word": difference.word}


def _rates(plan: Plan, tuning: Tuning) -> Row:
    (method, budget, seed), choice = tuning.slot, plan.choice_of(tuning)
    losses = choice.losses if choice is not None else {}
    return {
        "name": tuning.name, "method": method.name, "budget": budget, "seed": seed, "grid": list(tuning.grid),
        "chosen": choice.rate if choice is not None else None, "edge": choice.edge if choice is not None else None,
        "validation_losses": {f"{rate:g}": loss for rate, loss in losses.items()},
    }  # fmt: skip
