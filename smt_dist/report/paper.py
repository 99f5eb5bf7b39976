"""PNG files for papers, drawn by matplotlib: no browser, no display."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smt_dist.files import replace_file
from smt_dist.report.sheet import lay_out
from smt_dist.report.summary import Summary

DPI = 200
MARK = "#d62728"
MAX_HEIGHT = 40.0  # inches


def write_png(page: Path, summary: Summary) -> None:
    """Write ``<stem>.png`` and ``<stem>_blocks.png`` beside the page."""
    for path, figure in ((page.with_suffix(".png"), overview(summary)), (_blocks_path(page), maps(summary))):
        # The format is said: the file's name ends otherwise while it is written.
        replace_file(path, lambda beside, figure=figure: figure.savefig(beside, dpi=DPI, format="png"))


def overview(summary: Summary) -> Figure:
    """Shares by weight, kind and depth, the scores' distribution, and the learning curve where there is one."""
    panels = [_shares, _kinds, _depth]
    if summary.has_scores and len(summary.edges):
        panels.append(_distribution)
    if summary.losses:
        panels.append(_curve)
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
    for index, panel in enumerate(panels):
        panel(figure.add_subplot(rows, 2, index + 1), summary)
    return figure


def maps(summary: Summary) -> Figure:
    """One sheet of maps a kind, with the chosen blocks marked."""
    sheets = {kind: lay_out(summary, tiles) for kind, tiles in summary.sheets.items()}
    heights = [min(6.0, max(1.2, 10 * sheet.values.shape[0] / sheet.values.shape[1])) for sheet in sheets.values()]
    scale = min(1.0, MAX_HEIGHT / sum(heights))
    figure = Figure(figsize=(11, scale * sum(heights) + 0.6 * len(sheets)), layout="constrained")
    axes = figure.subplots(len(sheets), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (kind, sheet) in zip(axes, sheets.items(), strict=True):
        inside = np.array([[bool(text) for text in row] for row in sheet.texts])
        values = sheet.values if summary.has_scores else np.where(inside, 0.0, np.nan)
        image = axis.imshow(np.ma.masked_invalid(values), cmap="viridis" if summary.has_scores else "Greys", vmin=None)
        if summary.has_scores:
            figure.colorbar(image, ax=axis, label=summary.score_title, shrink=0.8)
        points = np.array([(col, row) for row, col, _ in sheet.marked]).reshape(-1, 2)
        size = max(0.5, min(30.0, (400 / max(values.shape)) ** 2 / 4))
        axis.scatter(points[:, 0], points[:, 1], s=size, marker="s", facecolors="none", edgecolors=MARK, linewidths=0.8)
        axis.set_title(_plain(f"{kind}: {sum(count for *_, count in sheet.marked):,} chosen"), fontsize=9)
        axis.set_axis_off()
    return figure


def _blocks_path(page: Path) -> Path:
    return page.with_name(f"{page.stem}_blocks.png")


def _plain(text: str) -> str:
    """Dollars would be read as mathematics."""
    return text.replace("$", r"\$")


def _shares(axis: Axes, summary: Summary) -> None:
    kinds = list(summary.sheets)
    share = np.full((len(kinds), len(summary.layers)), np.nan)
    for row, kind in enumerate(kinds):
        for col, layer in enumerate(summary.layers):
            if total := summary.blocks_by_layer.get((layer, kind), 0):
                share[row, col] = 100 * summary.chosen_by_layer.get((layer, kind), 0) / total
    image = axis.imshow(np.ma.masked_invalid(share), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axis.figure.colorbar(image, ax=axis, label="%")
    axis.set_yticks(range(len(kinds)), [_plain(kind) for kind in kinds], fontsize=8)
    axis.set_xlabel("layer")
    axis.set_title("chosen share of each weight", fontsize=10)


def _kinds(axis: Axes, summary: Summary) -> None:
    kinds = list(summary.chosen_by_kind)
    counts = [summary.chosen_by_kind[kind] for kind in kinds]
    axis.barh(range(len(kinds)), counts)
    for row, count in enumerate(counts):
        axis.text(count, row, f" {count:,}", va="center", fontsize=8)
    axis.set_yticks(range(len(kinds)), [_plain(kind) for kind in kinds], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title("chosen blocks by kind of weight", fontsize=10)


def _depth(axis: Axes, summary: Summary) -> None:
    base = np.zeros(len(summary.layers))
    for kind in summary.sheets:
        counts = np.array([summary.chosen_by_layer.get((layer, kind), 0) for layer in summary.layers])
        if counts.any():
            axis.bar(range(len(base)), counts, bottom=base, label=_plain(kind))
            base += counts
    axis.set_xlabel("layer")
    axis.set_title("chosen blocks by depth", fontsize=10)
    axis.legend(fontsize=7)


def _distribution(axis: Axes, summary: Summary) -> None:
    axis.stairs(summary.all_counts, summary.edges, fill=True, color="#9ecae1", label="all")
    axis.stairs(summary.chosen_counts, summary.edges, fill=True, color=MARK, label="chosen")
    for value in summary.cut_offs.values():
        axis.axvline(value, color="#222", linestyle="--", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_xlabel(summary.score_title)
    axis.set_title("scores of all blocks, cut-off", fontsize=10)
    axis.legend(fontsize=7)


def _curve(axis: Axes, summary: Summary) -> None:
    for name, points in summary.losses.items():
        steps, losses = zip(*points, strict=True)
        axis.plot(steps, losses, label=name, marker="." if len(points) < 60 else None)
    axis.set_xlabel("step")
    axis.set_title("loss", fontsize=10)
    axis.legend(fontsize=7)
