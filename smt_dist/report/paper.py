"""Draw PNG files for papers with matplotlib, without a browser or display."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from smt_dist.files import replace_file
from smt_dist.report.sheet import lay_out
from smt_dist.report.summary import Summary, layer_number

Panel = Callable[[Axes, Summary], None]
DPI = 200
MARK = "#d62728"
MAX_HEIGHT = 40.0  # inches


def write_png(page: Path, summary: Summary) -> None:
    """Write ``<stem>.png`` and ``<stem>_blocks.png`` beside the page."""
    for path, figure in ((page.with_suffix(".png"), overview(summary)), (_blocks_path(page), maps(summary))):
        # The format is given, because the temporary file's name doesn't end with .png.
        replace_file(path, lambda beside, figure=figure: figure.savefig(beside, dpi=DPI, format="png"))


def overview(summary: Summary) -> Figure:
    """Draw shares by weight, kind and depth, the score distribution and the learning curve."""
    panels = [_shares, kinds_of_weight, depth]
    if summary.has_scores and len(summary.edges):
        panels.append(distribution)
    if summary.losses:
        panels.append(curve)
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
    for index, panel in enumerate(panels):
        panel(figure.add_subplot(rows, 2, index + 1), summary)
    return figure


def maps(summary: Summary) -> Figure:
    """Draw one sheet of maps per kind of weight, with the chosen blocks marked."""
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
    """Escape dollar signs, which matplotlib reads as mathematics."""
    return text.replace("$", r"\$")


def _shares(axis: Axes, summary: Summary) -> None:
    kinds = list(summary.sheets)
    share = np.array(
        [[100 * chosen / total if total else np.nan for chosen, total in summary.by_layer(kind)] for kind in kinds]
    )
    image = axis.imshow(np.ma.masked_invalid(share), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axis.figure.colorbar(image, ax=axis, label="%")
    axis.set_yticks(range(len(kinds)), [_plain(kind) for kind in kinds], fontsize=8)
    _name_layers(axis, summary)
    axis.set_title("chosen share of each weight", fontsize=10)


def _name_layers(axis: Axes, summary: Summary) -> None:
    names = dict(enumerate(_plain(layer_number(layer)) for layer in summary.layers))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.xaxis.set_major_formatter(lambda place, _: names.get(place, ""))
    axis.set_xlabel("layer")


def kinds_of_weight(axis: Axes, summary: Summary) -> None:
    """Draw each kind's number of chosen blocks, and their share of all chosen and of the kind."""
    names, total = list(summary.chosen_by_kind), sum(summary.chosen_by_kind.values())
    axis.barh(range(len(names)), list(summary.chosen_by_kind.values()))
    for row, (kind, count) in enumerate(summary.chosen_by_kind.items()):
        own = summary.blocks[kind]
        axis.text(
            count, row, f" {count:,} ({count / total:.0%}); {count / own:.1%} of its {own:,}", va="center", size=7
        )
    axis.set_yticks(range(len(names)), [_plain(kind) for kind in names], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.7)  # room for the text beside the longest bar
    axis.set_xlabel("blocks")
    axis.set_title("chosen blocks by kind of weight", fontsize=10)


def depth(axis: Axes, summary: Summary) -> None:
    """Draw the chosen blocks by layer, as stacked bars of kinds of weight."""
    base = np.zeros(len(summary.layers))
    for kind in summary.sheets:
        counts = np.array([chosen for chosen, _ in summary.by_layer(kind)])
        if counts.any():
            axis.bar(range(len(base)), counts, bottom=base, label=_plain(kind))
            base += counts
    _name_layers(axis, summary)
    axis.set_title("chosen blocks by depth", fontsize=10)
    axis.legend(fontsize=7)


def distribution(axis: Axes, summary: Summary) -> None:
    """Draw the number of blocks by score, and each group's lowest chosen score."""
    axis.stairs(summary.all_counts, summary.edges, fill=True, color="#9ecae1", label="all")
    axis.stairs(summary.chosen_counts, summary.edges, fill=True, color=MARK, label="chosen")
    for group, value in summary.cut_offs.items():
        axis.axvline(value, color="#222", linestyle="--", linewidth=0.8)
        place = {"xy": (value, 0.98), "xycoords": ("data", "axes fraction"), "in_layout": False}
        axis.annotate(_plain(group), **place, rotation=90, ha="right", va="top", fontsize=7)
    axis.set_yscale("log")
    axis.set_xlabel(summary.score_title)
    axis.set_title("scores of all blocks, cut-off", fontsize=10)
    axis.legend(fontsize=7)


def curve(axis: Axes, summary: Summary) -> None:
    """Draw the losses by step."""
    for name, points in summary.losses.items():
        steps, losses = zip(*points, strict=True)
        axis.plot(steps, losses, label=name, marker="." if len(points) < 60 else None)
    axis.set_xlabel("step")
    axis.set_title("loss", fontsize=10)
    axis.legend(fontsize=7)
