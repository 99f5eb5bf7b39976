"""Accuracy and validation loss against the trainable share: a PNG for papers, and a page that needs no network."""

from __future__ import annotations

import logging
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from comparison.plan import WHOLE

from smt_dist.files import replace_file

logger = logging.getLogger(__name__)

DPI = 200
PANELS = (("accuracy", "accuracy (exact answers), %", 100.0), ("validation_loss", "validation loss", 1.0))
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } p { max-width: 60rem; } table { border-collapse: collapse; font-size: 13px; }
td, th { padding: .2rem .6rem .2rem 0; vertical-align: top; text-align: left; border-bottom: 1px solid #ddd; }
"""


class Line(NamedTuple):
    """A method in one panel.

    Attributes:
        method: its name.
        shares: trainable parameters in % of all, ascending.
        means: over seeds.
        spreads: standard deviations; 0 with one seed.
        flat: the method trains nothing (the base): a level, not a point.
    """

    method: str
    shares: list[float]
    means: list[float]
    spreads: list[float]
    flat: bool


def lines_of(report: dict[str, Any], measure: str, factor: float) -> list[Line]:
    """A line for each method that has figures, in the table's order."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in report["rows"]:
        value = row.get(measure)
        if value is not None:
            point = (100 * row["share"], factor * value["mean"], factor * (value["spread"] or 0.0))
            found.setdefault(row["method"], []).append(point)
    lines = []
    for method, points in found.items():
        shares, means, spreads = (list(column) for column in zip(*sorted(points), strict=True))
        lines.append(Line(method, shares, means, spreads, flat=shares == [0.0]))
    return lines


def colours_of(report: dict[str, Any]) -> dict[str, str]:
    """Method -> colour: one for all panels, also where some have no figures yet."""
    return dict(zip(report["settings"]["methods"], cycle(_colours()), strict=False))


def is_beyond(level: Line, lines: list[Line]) -> bool:
    """Whether a level is so far from what was trained that an axis which holds both would show no differences."""
    ends = [
        end for line in lines if not line.flat for mean, spread in zip(line.means, line.spreads, strict=True)
        for end in (mean - spread, mean + spread)
    ]  # fmt: skip
    if not ends:
        return False
    low, high = min(ends), max(ends)
    return not 2 * low - high <= level.means[0] <= 2 * high - low


def write_plots(report: dict[str, Any], page: Path) -> bool:
    """Write ``page`` and ``<stem>.png``. Without matplotlib a line says so: the figures are worth more.

    Returns:
        Whether both were written.
    """
    # Imported late, as these import matplotlib: an optional extra, and slow to load.
    try:
        png = _png(report)
        replace_file(page.with_suffix(".png"), lambda beside: png.savefig(beside, dpi=DPI, format="png"))
        text = _page(report)
    except ImportError as error:
        logger.warning('no %s: %s; pip install "smt_dist[plots]"', page.name, error)
        return False
    replace_file(page, lambda beside: beside.write_text(text, encoding="utf-8"))
    return True


def _png(report: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _draw(axis, report, *panel)
    return figure


def _draw(axis: Any, report: dict[str, Any], measure: str, title: str, factor: float) -> None:
    """One panel: a line a method, with its spread over seeds."""
    ticks = [100 * budget for budget in (*report["settings"]["budgets"], WHOLE)]
    colours, lines = colours_of(report), lines_of(report, measure, factor)
    for line in lines:
        label, colour = line.method.replace("$", r"\$"), colours[line.method]
        if line.flat and is_beyond(line, lines):
            axis.plot([], [], color="#888", linestyle=":", label=_said_of(line))
        elif line.flat:
            axis.axhline(line.means[0], color="#888", linestyle=":", label=label)
        else:
            axis.errorbar(line.shares, line.means, line.spreads, marker="o", ms=4, capsize=3, color=colour, label=label)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("trainable parameters, % of all (log)")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def _page(report: dict[str, Any]) -> str:
    from smt_dist.report.panel_image import svg_image

    drawn = [svg_image(panel[0], lambda axis, panel=panel: _draw(axis, report, *panel), 4.4) for panel in PANELS]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>SMT beside other methods</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(report['task'])}: SMT beside other methods</h1>\n"
        f"<p>Mean over seeds; bars: standard deviation.</p>\n{''.join(drawn)}</body></html>\n"
    )


def _said_of(level: Line) -> str:
    return f"{level.method}: {level.means[0]:.3g}, off the axis"


def _colours() -> list[str]:
    """Twenty that can be told apart: matplotlib's and plotly's own first ten, then paler ones of the same hues."""
    strong = "1f77b4 ff7f0e 2ca02c d62728 9467bd 8c564b e377c2 7f7f7f bcbd22 17becf"
    pale = "aec7e8 ffbb78 98df8a ff9896 c5b0d5 c49c94 f7b6d2 c7c7c7 dbdb8d 9edae5"
    return [f"#{colour}" for colour in f"{strong} {pale}".split()]
