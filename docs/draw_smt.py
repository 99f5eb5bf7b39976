"""Draw docs/images/smt.svg: what SMT trains, and what each rank keeps for it.

The standard library alone draws it, and every run writes the same bytes. Text stays text, in the reader's own font.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

IMAGE = Path(__file__).parent / "images" / "smt.svg"
WIDTH, HEIGHT = 1100, 500
FONT = "-apple-system, BlinkMacSystemFont, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
ALT = "SMT cuts weights into blocks, scores them, and trains the selected ones; each rank keeps a shard of their state"

INK, MUTED, BORDER, PAPER, SHADE = "#1f2937", "#586474", "#d0d7de", "#ffffff", "#f4f6f8"
FROZEN = ("#e9edf2", "#dce2e9", "#ccd4de")  # the better the score, the darker
SELECTED = "#ef8a2c"
STATES = {"fp32 master": "#1f4e8c", "Adam m": "#3d7cc2", "Adam v": "#7fb0e0"}

LAYERS, KINDS = 3, ("q_proj", "k_proj", "v_proj")
SIDE, CELL = 8, 12  # blocks along a weight's side, and a block's side as drawn
BUDGET = 10  # blocks: the best of each weight, then the next best
RANKS = 4
RIGHT = 534  # width of the right half

LLAMA_2_7B, LLAMA_2_7B_TRAINED = 6_738_415_616, 56_557_568  # configs/smt.json, as configs/README.md counts it
STATE_BYTES = 12  # of a trained parameter: fp32 master and two moments

CORNERS = list(product(range(SIDE), repeat=2))  # row and column of each block of a weight
Scores = dict[tuple[int, str], list[list[float]]]


class Block(NamedTuple):
    """A block's score and place."""

    score: float
    layer: int
    kind: str
    row: int
    col: int


def make_scores() -> Scores:
    """Invent scores of every block that share rows and columns, as those of real weights do."""
    draw = random.Random(14)
    scores: Scores = {}
    for layer in range(LAYERS):
        for kind in KINDS:
            rows, cols = ([draw.random() for _ in range(SIDE)] for _ in range(2))
            scores[layer, kind] = [[row + col + draw.random() for col in cols] for row in rows]
    return scores


def select(scores: Scores) -> set[Block]:
    """Select the best block of each weight, then the next best, as the strategy ``even`` does."""
    places = [(*weight, row, col) for weight in scores for row, col in CORNERS]
    ranked = sorted((Block(scores[place[:2]][place[2]][place[3]], *place) for place in places), reverse=True)
    best = {(block.layer, block.kind): block for block in reversed(ranked)}
    rest = [block for block in ranked if block not in best.values()]
    return {*best.values(), *rest[: BUDGET - len(best)]}


def draw() -> str:
    """Return the whole image."""
    parts = [*card(), *weights(110, 124), *base(530, 92), *state(530, 216), *comparison(530, 438)]
    return "\n".join([*parts, "</svg>", ""])


def card() -> Iterator[str]:
    """Draw the light card behind everything, the headings, and the arrow between both halves."""
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" role="img">'
    yield f"<title>{ALT}</title>"
    yield f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="14" fill="{PAPER}" stroke="{BORDER}"/>'
    yield text(36, 50, strong("Weights are cut into blocks"), 22)
    yield text(36, 77, "A warm-up scores them by gradient and selects the best.", 16, MUTED)
    yield text(530, 50, strong("Only the selected blocks are trained"), 22)
    yield text(530, 77, "The model computes with W + delta.", 16, MUTED)
    yield f'<g stroke="{SELECTED}" stroke-width="3" stroke-linecap="round" fill="none">'
    yield '<path d="M468 282h34m-10 -9l10 9l-10 9"/></g>'


def weights(left: int, top: int) -> Iterator[str]:
    """Draw every weight as a grid of blocks, the selected ones lit, and the legend below."""
    scores = make_scores()
    selected = {block[1:] for block in select(scores)}
    ranked = sorted(score for table in scores.values() for line in table for score in line)
    bounds = ranked[len(ranked) // 2], ranked[len(ranked) * 5 // 6]
    side = SIDE * CELL
    places: dict[str, list[tuple[int, int]]] = {}
    for column, kind in enumerate(KINDS):
        x = left + column * (side + 20)
        yield text(x + side / 2, top - 10, kind, 16, MUTED, "middle")
        for layer in range(LAYERS):
            y = top + layer * (side + 14)
            for row, col in CORNERS:
                shade = FROZEN[sum(scores[layer, kind][row][col] > bound for bound in bounds)]
                color = SELECTED if (layer, kind, row, col) in selected else shade
                places.setdefault(color, []).append((x + col * CELL, y + row * CELL))
    for layer in range(LAYERS):
        yield text(left - 12, top + layer * (side + 14) + side / 2 + 5, f"layer {layer}", 16, MUTED, "end")
    for color, corners in places.items():
        yield squares(corners, CELL - 1, color)
    yield from legend(36, top + LAYERS * (side + 14) + 18)


def legend(left: int, base_line: int) -> Iterator[str]:
    """Explain the colors of the blocks."""
    for index, color in enumerate(FROZEN):
        yield squares([(left + index * 15, base_line - 11)], CELL - 1, color)
    yield text(left + 54, base_line, "frozen blocks, by score", 16, MUTED)
    yield squares([(left + 272, base_line - 11)], CELL - 1, SELECTED)
    yield text(left + 290, base_line, "selected blocks", 16, MUTED)


def base(left: int, top: int) -> Iterator[str]:
    """Draw the frozen base: what it takes, and what it doesn't."""
    yield rect(left, top, RIGHT, 64, SHADE, 8)
    for index, color in enumerate(FROZEN):
        places = [(row, col) for row, col in product(range(4), repeat=2) if (2 * col * col + row * col) % 3 == index]
        own = [(left + 14 + col * 10, top + 13 + row * 10) for row, col in places]
        yield squares(own, 9, color)
    yield text(left + 68, top + 27, strong("Frozen base W") + ", 2 bytes a parameter", 16)
    yield text(left + 68, top + 50, "no gradients, no optimizer state; whole or sharded", 16, MUTED)


def state(left: int, top: int) -> Iterator[str]:
    """Draw the selected blocks one below the other, and their state as it is cut over the ranks."""
    height, gap, width, pitch = 180, 6, 106, 116
    shard = (height - gap * (RANKS - 1)) / RANKS
    yield from heading(left + 28, top, "delta", "2 bytes")
    for index in range(BUDGET):
        yield rect(left, top + index * height / BUDGET, 56, height / BUDGET - 1.5, SELECTED, 2)
    for rank in range(RANKS):
        y = top + rank * (shard + gap)
        start, end = (top + place * height / RANKS for place in (rank, rank + 1))
        fan = f"M{left + 60:g} {start:g}L{left + 106:g} {y:g}v{shard:g}L{left + 60:g} {end - 1.5:g}z"
        yield f'<path d="{fan}" fill="{FROZEN[0]}"/>'
        for column, color in enumerate(STATES.values()):
            yield rect(left + 110 + column * pitch, y, width, shard, color, 3)
        yield text(left + RIGHT, y + shard / 2 + 5.5, f"rank {rank}", 16, MUTED, "end")
    for column, name in enumerate(STATES):
        yield from heading(left + 110 + column * pitch + width / 2, top, name, "4 bytes")


def heading(middle: float, top: float, name: str, size: str) -> Iterator[str]:
    """Write what stands above a column."""
    yield text(middle, top - 31, strong(name), 16, anchor="middle")
    yield text(middle, top - 11, size, 16, MUTED, "middle")


def comparison(left: int, top: int) -> Iterator[str]:
    """Draw the state of a real model's selected blocks to scale, beside full fine-tuning's."""
    smt, full = (STATE_BYTES * count / 1e9 for count in (LLAMA_2_7B_TRAINED, LLAMA_2_7B))
    share, color = LLAMA_2_7B_TRAINED / LLAMA_2_7B, STATES["fp32 master"]
    yield text(left, top - 11, "Optimizer state of Llama-2-7B, all ranks together", 16, MUTED)
    yield rect(left, top, RIGHT, 12, FROZEN[0], 3) + rect(left, top, RIGHT * share, 12, color, 1)
    yield text(left, top + 34, strong(f"{smt:.2f} GB") + f": SMT at {share:.2%}", 16, color)
    yield text(left + RIGHT, top + 34, strong(f"{full:.1f} GB") + ": full fine-tuning", 16, MUTED, "end")


def squares(corners: Iterable[tuple[int, int]], side: int, color: str) -> str:
    """Return squares as one path.

    Their corners are round, for the path's outline is thick and turns in a curve.
    """
    inner = side - 4
    path = "".join(f"M{x + 2} {y + 2}h{inner}v{inner}h-{inner}z" for x, y in corners)
    return f'<path d="{path}" fill="{color}" stroke="{color}" stroke-width="4" stroke-linejoin="round"/>'


def rect(x: float, y: float, width: float, height: float, color: str, radius: float = 0) -> str:
    """Return a filled rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{color}"/>'


def strong(content: str) -> str:
    """Return bold text."""
    return f'<tspan font-weight="600">{content}</tspan>'


def text(x: float, y: float, content: str, size: float, color: str = INK, anchor: str = "start") -> str:
    """Return one line of text; its content is markup."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}" text-anchor="{anchor}">{content}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=IMAGE, help="the SVG file (default: %(default)s)")
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
