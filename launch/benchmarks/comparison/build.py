"""From settings and files to a plan: sizes come from a model without weights, so that bad flags end before any cell."""

from __future__ import annotations

import json
from pathlib import Path

from comparison.cells import CellStore
from comparison.methods import Size, check_installed, size_of
from comparison.plan import WHOLE, Plan, Sizes
from comparison.plots import write_plots
from comparison.report import build_report
from comparison.settings import Settings
from comparison.table import markdown
from comparison.tasks import Counts, prepare
from torch import nn

from smt_dist.config import SMTConfig, parse_model
from smt_dist.errors import SMTError
from smt_dist.files import replace_file
from smt_dist.models.folder import check_model_folder, empty_model, load_tokenizer
from smt_dist.selection.custom_scores import load_score_function

DATA_SEED = 0  # of the sets: all seeds of a comparison train on the same rows, in another order


def build_plan(
    settings: Settings, model: str, task: str, source: Path | None, counts: Counts, output: Path
) -> tuple[Plan, list[str]]:
    """Check everything, make the data, work the sizes out.

    Returns:
        The plan, and a line for each budget that a method can't reach, and for each grid that nothing takes.

    Raises:
        SMTError: whatever is wrong with model, data, methods, targets or blocks, in one line.
    """
    check_installed(settings.methods)
    for method in settings.methods:
        if method.score is not None and "." in method.score:
            load_score_function(method.score)
    config = check_model_folder(model)
    if settings.prompt_style == "chat" and not load_tokenizer(model).chat_template:
        raise SMTError(f"--prompt_style chat: the tokenizer of {model} has no chat template; use plain")
    sizes = _sizes(settings, empty_model(model, config))
    data = prepare(task, source, counts, DATA_SEED, output / "data")
    if data.rows["test"] < 2:
        raise SMTError(f"--task {task}: {data.rows['test']} test row: at least 2 are needed")
    plan = Plan(settings, model, task, data, sizes, CellStore(output))
    unreachable = [
        f"{method}, {100 * budget:.3g} %: not reachable ({size.problem})"
        for (method, budget), size in sizes.items()
        if size.problem is not None
    ]
    return plan, [*unreachable, *_unused_grids(plan)]


def _unused_grids(plan: Plan) -> list[str]:
    """A line for each grid of one budget or one score that nothing takes: it was meant for something."""
    settings = plan.settings
    used = {settings.grid_name(method, budget) for method in settings.methods for budget in plan.reachable(method)}
    special = [name for name in settings.rates if "@" in name or ":" in name]
    return [f"--learning_rates {name}: no method here takes this grid" for name in special if name not in used]


def _sizes(settings: Settings, model: nn.Module) -> Sizes:
    """(method, budget) -> size; ("", 1): all parameters of the model."""
    content = {
        "block_size": settings.block_size,
        "groups": [{"name": "targets", "target_modules": list(settings.targets)}],
        "selection": {"strategy": settings.strategy},
        "warmup": {"steps": settings.selection_steps},
    }
    config = parse_model(SMTConfig, json.dumps(content), "the flags")
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes: Sizes = {("", WHOLE): Size(total)}
    for method in settings.methods:
        for budget in settings.budgets if method.has_budget else (WHOLE,):
            sizes[method.name, budget] = size_of(method, budget, model, config)
    return sizes


def write_report(plan: Plan, output: Path) -> str:
    """Write ``comparison.json``, ``.md``, ``.png`` and ``.html`` from what is finished; returns the table."""
    report = build_report(plan)
    table = markdown(report)
    for name, text in (("comparison.json", json.dumps(report, indent=1) + "\n"), ("comparison.md", table)):
        replace_file(output / name, lambda beside, text=text: beside.write_text(text, encoding="utf-8"))
    write_plots(report, output / "comparison.html")
    return table
