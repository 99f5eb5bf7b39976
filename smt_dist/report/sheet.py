"""Lay out the maps of all weights of one kind side by side, one cell apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from smt_dist.report.summary import Summary, Tile

ASPECT = 2.2  # the approximate ratio of a sheet's width to its height


@dataclass(frozen=True)
class Sheet:
    """Hold the cells to draw for one kind of weight.

    Attributes:
        values: scores as drawn, ``[rows, columns]``; NaN between tiles and where there is no score.
        texts: each cell's text on hover; empty between tiles.
        marked: (row, column, number of chosen blocks) of each cell with a chosen block.
        labels: (row, column, text) of each tile's label; it is drawn below that position.
    """

    values: np.ndarray
    texts: list[list[str]]
    marked: list[tuple[int, int, int]]
    labels: list[tuple[float, float, str]]


def lay_out(summary: Summary, tiles: list[Tile]) -> Sheet:
    """Place the tiles of one kind of weight in rows."""
    height = max(tile.chosen.shape[0] for tile in tiles)
    width = max(tile.chosen.shape[1] for tile in tiles)
    across = min(len(tiles), max(1, round(math.sqrt(ASPECT * len(tiles) * (height + 1) / (width + 1)))))
    down = math.ceil(len(tiles) / across)
    shape = down * (height + 1) - 1, across * (width + 1) - 1
    scores = np.full(shape, np.nan)
    texts = [[""] * shape[1] for _ in range(shape[0])]
    marked, labels = [], []
    for index, tile in enumerate(tiles):
        top, left = index // across * (height + 1), index % across * (width + 1)
        rows, cols = tile.chosen.shape
        scores[top : top + rows, left : left + cols] = tile.scores
        labels.append((top + rows - 0.5, left + (cols - 1) / 2, tile.label))
        for row in range(rows):
            for col in range(cols):
                texts[top + row][left + col] = _text(summary, tile, row, col)
                if count := int(tile.chosen[row, col]):
                    marked.append((top + row, left + col, count))
    values = summary.shown(scores) if summary.has_scores else scores
    return Sheet(values, texts, marked, labels)


def _text(summary: Summary, tile: Tile, row: int, col: int) -> str:
    score, count = tile.scores[row, col], int(tile.chosen[row, col])
    place = f"{tile.module} ({row}, {col})"
    if summary.pooled > 1:
        first = f"{row * summary.pooled}, {col * summary.pooled}"
        place = f"{tile.module}, blocks from ({first}) on: {count} chosen"
    shown = "" if np.isnan(score) else f", score {score:.3g}"
    return f"{place}{shown}{', chosen' if count and summary.pooled == 1 else ''}"
