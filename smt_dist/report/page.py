"""Write ``selection.html``, one self-contained page that needs no network.

plotly, with its script inlined, draws the charts whose cells show a text on hover. matplotlib draws the others, as in
the PNG files.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from smt_dist.files import replace_file
from smt_dist.report.panel_image import svg_image
from smt_dist.report.paper import MARK, Panel, curve, depth, distribution, kinds_of_weight
from smt_dist.report.sheet import lay_out
from smt_dist.report.summary import Summary, Tile, layer_number

NOTE_SHARES = "Share of each weight's blocks that is chosen; a layer without a number is outside the decoder layers."
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; } p { max-width: 60rem; }
table { border-collapse: collapse; } td { padding: .15rem 1rem .15rem 0; vertical-align: top; }
td:first-child { color: #666; }
"""


def write_page(path: Path, summary: Summary) -> None:
    """Write the page of a summary to ``path``."""
    text = _page(summary)
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def _page(summary: Summary) -> str:
    counts = [_still(summary, "by-kind", kinds_of_weight), _still(summary, "by-depth", depth)]
    sections = [
        _section("Where the blocks are", NOTE_SHARES, [_live("by-weight", _by_weight(summary))]),
        _section("By kind and by depth", "", counts),
    ]
    if summary.has_scores and len(summary.edges):
        sections.append(_section("Scores", _note_scores(summary), [_still(summary, "scores", distribution)]))
    if summary.losses:
        sections.append(_section("Learning curve", "", [_still(summary, "curve", curve)]))
    maps = [_live(f"map-{i}", _map(summary, kind, tiles)) for i, (kind, tiles) in enumerate(summary.sheets.items())]
    sections.append(_section("Every block", _note_maps(summary), maps, "map"))
    facts = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in summary.facts.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>SMT block selection</title>'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head>\n"
        f"<body><h1>Block selection</h1>\n<table>{facts}</table>\n{''.join(sections)}</body></html>\n"
    )


def _section(title: str, note: str, plots: list[str], kind: str = "chart") -> str:
    drawn = "".join(f'<div class="{kind}">{plot}</div>\n' for plot in plots)
    return f"<h2>{escape(title)}</h2>\n" + (f"<p>{escape(note)}</p>\n" if note else "") + drawn


def _live(name: str, figure: go.Figure) -> str:
    options = {"displaylogo": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=options)


def _still(summary: Summary, name: str, panel: Panel) -> str:
    return f"<div>{svg_image(name, lambda axis: panel(axis, summary))}</div>"


def _note_scores(summary: Summary) -> str:
    groups = len(summary.cut_offs)
    return (
        f"All {int(summary.all_counts.sum()):,} blocks that may be chosen, by score. A line shows the lowest score "
        f"that was chosen{' in each of the groups' if groups > 1 else ''}."
    )


def _note_maps(summary: Summary) -> str:
    rows, cols = summary.block_size
    unit = f"a block of {rows} x {cols}" if summary.pooled == 1 else f"{summary.pooled} x {summary.pooled} blocks"
    pooled = (
        f" There are too many blocks to draw one by one: a cell shows the best score of its blocks and is marked if at "
        f"least one of them is chosen ({len(_marks(summary)):,} cells; hover for the number)."
        if summary.pooled > 1
        else ""
    )
    colours = "Brighter is a higher score. " if summary.has_scores else "The scores are not known. "
    return f"One map per weight, numbered by layer; a cell is {unit}. {colours}Red marks: chosen.{pooled}"


def _marks(summary: Summary) -> np.ndarray:
    chosen = [tile.chosen.ravel() for tiles in summary.sheets.values() for tile in tiles]
    return np.flatnonzero(np.concatenate(chosen))


def _figure(title: str, height: int, **layout: object) -> go.Figure:
    margin = {"l": 70, "r": 20, "t": 40, "b": 45}
    return go.Figure(layout={"title": title, "height": height, "margin": margin, "template": "plotly_white", **layout})


def _by_weight(summary: Summary) -> go.Figure:
    kinds = list(summary.sheets)
    share, texts = [], []
    for kind in kinds:
        pairs = summary.by_layer(kind)
        share.append([100 * chosen / total if total else None for chosen, total in pairs])
        texts.append([f"{chosen:,} of {total:,} blocks" if total else "" for chosen, total in pairs])
    layers = [escape(layer_number(layer)) for layer in summary.layers]
    figure = _figure("chosen share of each weight", 150 + 28 * len(kinds), xaxis={"title": "layer", "type": "category"})
    figure.add_heatmap(
        z=share, x=layers, y=[escape(kind) for kind in kinds], text=texts, colorscale="Viridis", zmin=0,
        hovertemplate="layer %{x}, %{y}: %{z:.2f} % (%{text})<extra></extra>", hoverongaps=False,
        colorbar={"title": "%"},
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def _map(summary: Summary, kind: str, tiles: list[Tile]) -> go.Figure:
    sheet = lay_out(summary, tiles)
    rows, cols = sheet.values.shape
    height = int(min(1000, max(180, 110 + rows * min(22, 1050 / cols))))
    figure = _figure(f"{escape(kind)}: {int(sum(tile.chosen.sum() for tile in tiles)):,} chosen blocks", height)
    values = [[None if np.isnan(value) else float(value) for value in row] for row in sheet.values]
    texts = [[escape(text) for text in row] for row in sheet.texts]
    if not summary.has_scores:
        values = [[0.0 if text else None for text in row] for row in texts]
    figure.add_heatmap(
        z=values, text=texts, hovertemplate="%{text}<extra></extra>", hoverongaps=False, showscale=summary.has_scores,
        colorscale="Viridis" if summary.has_scores else [[0, "#e6e6e6"], [1, "#e6e6e6"]],
        colorbar={"title": summary.score_title},
    )  # fmt: skip
    figure.add_scatter(
        x=[col for _, col, _ in sheet.marked], y=[row for row, _, _ in sheet.marked], mode="markers", name="chosen",
        marker={"color": MARK, "size": 6, "symbol": "square-open", "line": {"width": 1.5}}, hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    for row, col, label in sheet.labels:
        if label:
            figure.add_annotation(x=col, y=row, text=escape(label), showarrow=False, font={"size": 9}, yanchor="top")
    axis = {"visible": False, "showgrid": False}
    figure.update_xaxes(**axis, range=[-0.6, cols - 0.4])
    figure.update_yaxes(**axis, range=[rows + 0.6, -0.6])
    return figure
