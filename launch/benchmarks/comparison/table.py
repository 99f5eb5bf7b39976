"""The report as a Markdown table."""

from __future__ import annotations

from typing import Any

from comparison.plan import WHOLE
from comparison.report import Row

HEAD = (
    "method", "trainable", "learning rate", "validation loss", "test loss", "accuracy", "step", "peak memory",
    "on disk", "validation loss against {}",
)  # fmt: skip
NOTHING = "-"


def markdown(report: dict[str, Any]) -> str:
    """The table, with what is needed to read it above and below."""
    settings, rows = report["settings"], report["rows"]
    reference = report["reference"] or "SMT"
    head = [name.format(reference) for name in HEAD]
    lines = [_introduction(report), "", _line(head), _line(["---"] * len(head))]
    for budget in [WHOLE, *settings["budgets"]]:
        lines += [_line(_columns(row, reference)) for row in rows if row["budget"] == budget]
    lines += ["", *_notes(report)]
    return "\n".join(lines) + "\n"


def _introduction(report: dict[str, Any]) -> str:
    settings, data = report["settings"], report["rows_of_data"]
    seeds = len(settings["seeds"])
    return (
        f"{report['task']}: {data['train']:,} rows to train on, {data['validation']:,} for validation, "
        f"{data['held_out']:,} for the test loss, {min(data['test'], settings['test_items']):,} questions; "
        f"{settings['steps']} steps of {settings['batch_size']} rows, base in {settings['dtype']}, targets "
        f"{', '.join(settings['targets'])}, blocks of {settings['block_size']}, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}. {report['cells']['finished']} of {report['cells']['of']} cells."
    )


def _notes(report: dict[str, Any]) -> list[str]:
    count, budgets = len(report["settings"]["seeds"]), report["settings"]["budgets"]
    tuned = sorted({(rates["budget"], rates["seed"]) for rates in report["learning_rates"]})
    where = ", ".join(f"{_percent(budget)} (seed {seed})" for budget, seed in tuned if budget != WHOLE) or "one budget"
    lines = [
        "Mean ± standard deviation over seeds. The last column is the difference of the validation losses, paired by "
        f"seed, with its 95 % t-interval: better or worse where 0 lies outside it, not worse where it lies inside; "
        f"methods without a budget are compared at {_percent(budgets[-1])}."
        if count > 1
        else "One seed: there is no spread and no interval.",
        f"Learning rates were chosen by validation loss at {where}. Step: median. Peak: resident memory of the whole "
        "process, by the end of training. Tests are of the merged model.",
    ]
    return [*lines, *(f"Warning: {warning}." for warning in report["warnings"])]


def _columns(row: Row, reference: str) -> list[str]:
    trainable = f"{row['trainable']:,} ({_percent(row['share'])})" if row["trainable"] else NOTHING
    if row["budget"] != WHOLE:
        name = f"{row['method']}, {_percent(row['budget'])}"
        name += f", {'blocks' if row['method'].startswith('smt') else 'rank'} {row['amount']}" if row["amount"] else ""
    else:
        name = row["method"]
    if row["state"] == "not reachable":
        return [name, f"not reachable: {row['problem']}", *[NOTHING] * (len(HEAD) - 2)]
    rate = NOTHING if row["rate"] is None else f"{row['rate']:g}"
    rate += f" ({row['edge']} of the grid!)" if row["edge"] else ""
    if not row["seeds"]:
        return [name, trainable, rate, f"missing: {_plain(row['state'])}", *[NOTHING] * (len(HEAD) - 4)]
    state = "" if row["state"] == "done" else f" ({_plain(row['state'])})"
    step = NOTHING if row["step_seconds"] is None else f"{row['step_seconds']:.3g} s"
    if row["selection_seconds"]:
        step += f" (once: selection, {row['selection_seconds']:.3g} s)"
    losses = [_mean(row["validation_loss"], "{:.4f}") + state, _mean(row["test_loss"], "{:.4f}")]
    accuracy = _mean(row["accuracy"], "{:.1%}")
    sizes = [_size(row["peak_bytes"]), _size(row["artefact_bytes"])]
    return [name, trainable, rate, *losses, accuracy, step, *sizes, _against(row, reference)]


def _against(row: Row, reference: str) -> str:
    found = row["against"]
    if found is None:
        return "the reference" if row["method"] == reference else NOTHING
    if found["low"] is None:
        return f"{found['mean']:+.4f}, {found['word']}"
    return f"**{found['word']}**: {found['mean']:+.4f} ({found['low']:+.4f} .. {found['high']:+.4f})"


def _mean(found: dict[str, float | None] | None, form: str) -> str:
    if found is None:
        return NOTHING
    spread = "" if found["spread"] is None else f" ± {form.format(found['spread'])}"
    return form.format(found["mean"]) + spread


def _size(count: int | None) -> str:
    return NOTHING if not count else f"{count / 2**20:,.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:.2f} MiB"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _plain(text: str) -> str:
    """Free text (a log's last line) that can't break the table, nor be taken for markup."""
    shown = "".join(c if c.isprintable() else " " for c in text)[:200]
    return "".join(f"\\{c}" if c in "\\`*_[]<>|" else c for c in shown)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
