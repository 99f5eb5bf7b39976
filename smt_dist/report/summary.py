"""Compute the numbers of a report without a plotting library.

These are the maps of blocks, the shares, the score distribution and the learning curve.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smt_dist.selection.block_scores import BlockScores
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.sparse.layer_names import layer_key

# Cells of all maps together. With more, the page has tens of megabytes and a browser needs minutes to show it.
MAX_CELLS = 30_000
BINS = 60


@dataclass(frozen=True)
class Tile:
    """Hold one weight's map; if there are too many blocks, a cell stands for several.

    Attributes:
        module: the module's name.
        label: the numbers in this name, such as ``3`` of ``model.layers.3.self_attn.q_proj``; empty without any.
        scores: the best score in each cell; NaN if no block of it can be chosen, or the scores aren't known.
        chosen: the number of chosen blocks in each cell.
    """

    module: str
    label: str
    scores: np.ndarray
    chosen: np.ndarray


@dataclass(frozen=True)
class Summary:
    """Hold the numbers to draw.

    Attributes:
        sheets: kind of weight -> the maps of its weights.
        pooled: one cell stands for ``pooled x pooled`` blocks.
        block_size: (rows, cols) of a block in elements.
        has_scores: whether the scores are known.
        logarithmic: whether scores are shown as decimal logarithms; True if all scores that can be chosen are >= 0.
        blocks: kind -> number of its blocks, chosen or not.
        chosen_by_kind: kind -> number of chosen blocks.
        layers: names of layers, in the model's order.
        chosen_by_layer: (layer, kind) -> number of chosen blocks.
        blocks_by_layer: (layer, kind) -> number of blocks.
        edges: edges of the distribution's bins, as shown (see ``logarithmic``).
        all_counts: number of blocks in each bin.
        chosen_counts: number of chosen blocks in each bin.
        cut_offs: group -> its lowest chosen score, as shown.
        losses: name of a curve -> its (step, loss) points.
        facts: rows of the page's table.
    """

    sheets: dict[str, list[Tile]]
    pooled: int
    block_size: tuple[int, int]
    has_scores: bool
    logarithmic: bool
    blocks: dict[str, int]
    chosen_by_kind: dict[str, int]
    layers: list[str]
    chosen_by_layer: dict[tuple[str, str], int]
    blocks_by_layer: dict[tuple[str, str], int]
    edges: np.ndarray
    all_counts: np.ndarray
    chosen_counts: np.ndarray
    cut_offs: dict[str, float]
    losses: dict[str, list[tuple[float, float]]]
    facts: dict[str, str]

    @property
    def score_title(self) -> str:
        """Return the title of the colour scale and the distribution's axis."""
        return "log10(score)" if self.logarithmic else "score"

    def by_layer(self, kind: str) -> list[tuple[int, int]]:
        """Return (chosen blocks, blocks) of a kind of weight for each of :attr:`layers`."""
        return [
            (self.chosen_by_layer.get((layer, kind), 0), self.blocks_by_layer.get((layer, kind), 0))
            for layer in self.layers
        ]

    def shown(self, scores: np.ndarray) -> np.ndarray:
        """Return scores as shown; on a logarithmic scale, zeros become the smallest positive score."""
        if not self.logarithmic:
            return scores
        positive = scores[scores > 0]
        least = positive.min() if positive.size else 1.0
        return np.log10(np.where(scores > 0, scores, np.where(np.isnan(scores), np.nan, least)))


def summarise(
    selection: BlockSelection,
    scores: BlockScores | None,
    log_history: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
) -> Summary:
    """Compute the numbers; arguments as for :func:`smt_dist.report.write_selection_report`."""
    tables = _tables(selection, scores)
    marks = {module: _marks(selection, module, table.shape) for module, table in tables.items()}
    kinds = short_kinds(tables)
    pooled = _pooling([table.shape for table in tables.values()])
    sheets: dict[str, list[Tile]] = {}
    blocks: Counter[str] = Counter()
    chosen: Counter[str] = Counter()
    by_layer: Counter[tuple[str, str]] = Counter()
    chosen_by_layer: Counter[tuple[str, str]] = Counter()
    for module, table in tables.items():
        kind, layer = kinds[module], layer_key(module)
        tile = Tile(module, _numbers(module), _pool(table, pooled, np.fmax), _pool(marks[module], pooled, np.add))
        sheets.setdefault(kind, []).append(tile)
        blocks[kind] += table.size
        by_layer[layer, kind] += table.size
        chosen[kind] += int(marks[module].sum())
        chosen_by_layer[layer, kind] += int(marks[module].sum())
    every = np.concatenate([table.ravel() for table in tables.values()])
    taken = np.concatenate([mark.ravel() for mark in marks.values()]) > 0
    known = ~np.isnan(every)
    logarithmic = bool(known.any() and (every[known] >= 0).all() and (every[known] > 0).any())
    summary = Summary(
        sheets=sheets,
        pooled=pooled,
        block_size=selection.block_size,
        has_scores=scores is not None,
        logarithmic=logarithmic,
        blocks=dict(blocks),
        chosen_by_kind=dict(chosen),
        layers=list(dict.fromkeys(layer for layer, _ in by_layer)),
        chosen_by_layer=dict(chosen_by_layer),
        blocks_by_layer=dict(by_layer),
        edges=np.zeros(0),
        all_counts=np.zeros(0),
        chosen_counts=np.zeros(0),
        cut_offs={},
        losses=learning_curves(log_history),
        facts=_facts(selection, scores) | dict(facts),
    )
    return _with_distribution(summary, every, taken & known, selection, tables, marks) if known.any() else summary


def _with_distribution(
    summary: Summary,
    every: np.ndarray,
    taken: np.ndarray,
    selection: BlockSelection,
    tables: Mapping[str, np.ndarray],
    marks: Mapping[str, np.ndarray],
) -> Summary:
    shown = summary.shown(every)
    counts, edges = np.histogram(shown[~np.isnan(shown)], bins=BINS)
    least: dict[str, float] = {}
    for module, table in tables.items():
        own = table[(marks[module] > 0) & ~np.isnan(table)]
        if own.size:
            group = selection.groups.get(module, "selected")
            least[group] = min(least.get(group, math.inf), float(own.min()))
    at = {group: float(summary.shown(np.append(every, value))[-1]) for group, value in least.items()}
    chosen_counts, _ = np.histogram(shown[taken], bins=edges)
    return Summary(
        **{**vars(summary), "edges": edges, "all_counts": counts, "chosen_counts": chosen_counts, "cut_offs": at}
    )


def learning_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return the finite training and evaluation losses of Trainer's log, by name of the curve."""
    curves = {}
    for key, name in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(float(entry["step"]), float(entry[key])) for entry in log_history if key in entry]
        if finite := [point for point in points if math.isfinite(point[1])]:
            curves[name] = finite
    return curves


def layer_number(layer: str) -> str:
    """Return a layer's number, or its whole name where it has none."""
    last = layer.rpartition(".")[2]
    return last if last.isdigit() else layer


def short_kinds(modules: Mapping[str, Any]) -> dict[str, str]:
    """Return module -> its kind of weight, such as ``q_proj``; all experts have one kind.

    If two kinds end with the same name, they keep the longer name, such as ``self_attn.q_proj``.
    """
    kinds = {module: _kind(module) for module in modules}
    leaves: dict[str, set[str]] = {}
    for kind in kinds.values():
        leaves.setdefault(kind.rpartition(".")[2], set()).add(kind)
    unique = {kind: leaf if len(found) == 1 else kind for leaf, found in leaves.items() for kind in found}
    return {module: unique[kind] for module, kind in kinds.items()}


def _kind(module: str) -> str:
    """Return a module's name inside its layer, with ``*`` for numbers.

    Example: ``self_attn.q_proj`` of ``model.layers.3.self_attn.q_proj``.
    """
    inside = module.removeprefix(layer_key(module)).lstrip(".")
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", inside or module)


def _numbers(module: str) -> str:
    return ".".join(part for part in module.split(".") if part.isdigit())


def _tables(selection: BlockSelection, scores: BlockScores | None) -> dict[str, np.ndarray]:
    """Return module -> scores; NaN where a block can't be chosen, or the scores aren't known."""
    if scores is not None:
        tables = {module: table.numpy() for module, table in scores.tables.items()}
        return {module: np.where(np.isfinite(table), table, np.nan) for module, table in tables.items()}
    rows, cols = selection.block_size
    found = {}
    for module, blocks in selection.blocks.items():
        shape = selection.shapes.get(module)
        last = max(row for row, _ in blocks) + 1, max(col for _, col in blocks) + 1
        found[module] = np.full((shape[0] // rows, shape[1] // cols) if shape else last, np.nan)
    return found


def _marks(selection: BlockSelection, module: str, shape: tuple[int, ...]) -> np.ndarray:
    marks = np.zeros(shape, dtype=np.int64)
    for block in selection.blocks.get(module, ()):
        marks[block] = 1
    return marks


def _pooling(shapes: list[tuple[int, ...]]) -> int:
    """Return the smallest cell side, in blocks, that keeps all maps within :data:`MAX_CELLS`."""
    largest = max(max(shape) for shape in shapes)
    for pooled in range(1, largest + 1):
        if sum(math.ceil(rows / pooled) * math.ceil(cols / pooled) for rows, cols in shapes) <= MAX_CELLS:
            return pooled
    return largest


def _pool(table: np.ndarray, size: int, combine: np.ufunc) -> np.ndarray:
    """Combine every ``size x size`` cells into one; those at the edges may be smaller."""
    if size == 1:
        return table
    by_row = combine.reduceat(table, np.arange(0, table.shape[0], size), axis=0)
    return combine.reduceat(by_row, np.arange(0, table.shape[1], size), axis=1)


def _facts(selection: BlockSelection, scores: BlockScores | None) -> dict[str, str]:
    rows, cols = selection.block_size
    facts = {
        "blocks": f"{len(selection):,} of {rows} x {cols}, in {len(selection.blocks)} weights",
        "trained parameters": f"{selection.parameters:,}",
    }
    if scores is None:
        return facts | {"score": "not known: the selection was read from a file without its scores"}
    available = sum(table.numel() for table in scores.tables.values())
    return facts | {
        "share of all 2-D parameters": f"{selection.parameters / scores.parameters_2d:.2%}",
        "share of the targets' blocks": f"{len(selection) / available:.2%} of {available:,}",
        "score": f"{scores.score}, {scores.steps} warm-up steps" if scores.steps else scores.score,
    }
