"""Define the geometry of blocks: ``BlockGrid`` and ``BlockSelection``, without any model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

from smt_dist.config import MAX_AUTO_BLOCK_SIZE, parse_model
from smt_dist.errors import SMTError
from smt_dist.files import read_text

Block = tuple[int, int]
MIN_AUTO_BLOCK_SIZE = 8  # a layer with smaller blocks spends its time in overhead
# In files, an integer must not be a string, a bool or a fraction.
_Whole = Annotated[int, Field(strict=True)]
# Stop at the first error: a file can hold a million.
_Blocks = Annotated[list[tuple[_Whole, _Whole]], FailFast()]


@dataclass(frozen=True)
class BlockGrid:
    """Describe one weight ``[rows, cols]`` cut into blocks of ``[block_rows, block_cols]``.

    Raises:
        ValueError: the block doesn't divide the weight.
    """

    rows: int
    cols: int
    block_rows: int
    block_cols: int

    def __post_init__(self) -> None:
        if self.rows % self.block_rows or self.cols % self.block_cols:
            raise ValueError(
                f"a weight of {self.rows} x {self.cols} can't be cut into {self.block_rows} x {self.block_cols}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of block rows and block columns."""
        return self.rows // self.block_rows, self.cols // self.block_cols

    @property
    def block_elements(self) -> int:
        """Return the number of elements of one block."""
        return self.block_rows * self.block_cols

    def __len__(self) -> int:
        return math.prod(self.shape)

    def __contains__(self, block: Block) -> bool:
        return 0 <= block[0] < self.shape[0] and 0 <= block[1] < self.shape[1]

    def row_slice(self, row: int) -> slice:
        """Return the slice of the weight's rows (output features) in block row ``row``."""
        return slice(row * self.block_rows, (row + 1) * self.block_rows)

    def col_slice(self, col: int) -> slice:
        """Return the slice of the weight's columns (input features) in block column ``col``."""
        return slice(col * self.block_cols, (col + 1) * self.block_cols)


def largest_common_block(shapes: Iterable[tuple[int, int]], limit: int = MAX_AUTO_BLOCK_SIZE) -> int:
    """Return the side of the largest square block, up to ``limit``, that divides every shape."""
    common = math.gcd(*(side for shape in shapes for side in shape))
    return max(size for size in range(1, min(common, limit) + 1) if common % size == 0)


def resolve_block_size(
    block_size: int | tuple[int, int] | Literal["auto"], shapes: Mapping[str, tuple[int, int]]
) -> tuple[int, int]:
    """Return the block size as (rows, cols), checked against the weights.

    Args:
        block_size: as in :class:`SMTConfig`.
        shapes: module name -> weight shape (out, in).

    Raises:
        SMTError: the block size doesn't divide a weight; names the first one and a size that fits all.
    """
    fits = largest_common_block(shapes.values())
    if block_size == "auto":
        if fits < MIN_AUTO_BLOCK_SIZE:
            odd = min(shapes, key=lambda name: largest_common_block([shapes[name]]))
            raise SMTError(
                f'smt config block_size: "auto" finds no size above {fits} that divides every target; {odd} is '
                f"{shapes[odd][0]} x {shapes[odd][1]}: take it out of target_modules, or give a size"
            )
        return fits, fits
    rows, cols = (block_size, block_size) if isinstance(block_size, int) else block_size
    for name, shape in shapes.items():
        if shape[0] % rows or shape[1] % cols:
            raise SMTError(
                f"smt config block_size: {rows} x {cols} doesn't divide {name} ({shape[0]} x {shape[1]}); "
                f'{fits} fits every target, or use "auto"'
            )
    return rows, cols


def read_blocks(weight: torch.Tensor, grid: BlockGrid, blocks: list[Block]) -> torch.Tensor:
    """Copy blocks of ``weight [out, in]``, stacked as ``[n * block_rows, block_cols]``."""
    return torch.cat([weight.detach()[grid.row_slice(row), grid.col_slice(col)] for row, col in blocks])


def write_blocks(weight: torch.Tensor, grid: BlockGrid, blocks: list[Block], values: torch.Tensor) -> None:
    """Write stacked blocks into ``weight``, in place.

    Args:
        weight: ``[out, in]``.
        grid: of the weight.
        blocks: the (row, col) of each block.
        values: ``[len(blocks) * block_rows, block_cols]``.
    """
    with torch.no_grad():
        for index, (row, col) in enumerate(blocks):
            weight[grid.row_slice(row), grid.col_slice(col)] = values[grid.row_slice(index)]


def merged_blocks(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return fp32(base) + fp32(delta), rounded to the base's dtype.

    Both are ``[blocks * block_rows, block_cols]``.
    """
    return summed_blocks(base, delta).to(base.dtype)


def summed_blocks(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return fp32(base) + fp32(delta), without rounding."""
    return base.float() + delta.to(base.device, torch.float32)


class BlockSelection(BaseModel):
    """Hold the chosen blocks: module name -> list of (row, col), in units of blocks.

    Equal selections give equal files: nothing here depends on engine, world size, path or date.

    Attributes:
        format_version: of the file.
        block_size: (rows, cols) of a block in elements.
        blocks: module name -> blocks, sorted by (row, col).
        shapes: module name -> weight shape (out, in), if known; checked when the selection is applied.
        groups: module name -> the config group that chose it, if known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    block_size: tuple[_Whole, _Whole]
    blocks: dict[str, _Blocks] = Field(min_length=1)
    shapes: dict[str, tuple[_Whole, _Whole]] = Field(default_factory=dict)
    groups: dict[str, str] = Field(default_factory=dict)

    @field_validator("block_size")
    @classmethod
    def _positive(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1:
            raise ValueError("both sides must be at least 1")
        return value

    @field_validator("blocks")
    @classmethod
    def _sorted_and_unique(cls, value: dict[str, list[Block]]) -> dict[str, list[Block]]:
        for module, blocks in value.items():
            if not blocks:
                raise ValueError(f"{module} has an empty list")
            if len(set(blocks)) != len(blocks):
                raise ValueError(f"{module} lists a block twice")
            if any(row < 0 or col < 0 for row, col in blocks):
                raise ValueError(f"{module} has a negative block index")
        return {module: sorted(blocks) for module, blocks in value.items()}

    @model_validator(mode="after")
    def _blocks_lie_in_their_weights(self) -> BlockSelection:
        for module, shape in self.shapes.items():
            if module in self.blocks:
                self.grid(module, shape)
        return self

    def grid(self, module: str, shape: tuple[int, int]) -> BlockGrid:
        """Return the grid of ``module``'s weight of ``shape`` (out, in).

        Raises:
            SMTError: the block size doesn't divide it, a block lies outside, or :attr:`shapes` has another shape.
        """
        if self.shapes.get(module, shape) != shape:
            raise SMTError(f"selection: {module} was {self.shapes[module]} when selected, this model has {shape}")
        try:
            grid = BlockGrid(*shape, *self.block_size)
        except ValueError as error:
            raise SMTError(f"selection: {module}: {error}") from None
        outside = [block for block in self.blocks[module] if block not in grid]
        if outside:
            raise SMTError(
                f"selection: {module}: block {outside[0]} lies outside its {grid.shape[0]} x {grid.shape[1]} grid"
            )
        return grid

    def __len__(self) -> int:
        """Return the number of blocks."""
        return sum(len(blocks) for blocks in self.blocks.values())

    @property
    def parameters(self) -> int:
        """Return the number of trainable elements."""
        return len(self) * self.block_size[0] * self.block_size[1]

    def to_json(self) -> str:
        """Return the selection file's text, with one line per module."""

        def lines(mapping: Mapping[str, object]) -> str:
            rows = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in mapping.items()]
            return "{\n" + ",\n".join(rows) + "\n  }" if rows else "{}"

        return (
            f'{{\n  "format_version": {self.format_version},\n'
            f'  "block_size": {json.dumps(self.block_size)},\n'
            f'  "blocks": {lines(self.blocks)},\n'
            f'  "shapes": {lines(self.shapes)},\n'
            f'  "groups": {lines(self.groups)}\n}}\n'
        )

    @classmethod
    def from_json_file(cls, path: str | Path) -> BlockSelection:
        """Load a selection file.

        Raises:
            SMTError: the file is missing, not JSON, or malformed; names the file and the field.
        """
        return parse_model(cls, read_text(path), str(path))


def rearrange(values: torch.Tensor | None, source: BlockSelection, target: BlockSelection, module: str) -> torch.Tensor:
    """Reorder a module's stacked blocks from one selection to another.

    Args:
        values: ``[source's blocks * block_rows, block_cols]``; None if ``source`` has no block of this module.
        source: the selection that ``values`` belong to.
        target: of the same block size, with blocks of the module.
        module: its name.

    Returns:
        fp32 ``[target's blocks * block_rows, block_cols]``; zeros for blocks that ``source`` doesn't have.
    """
    height, width = target.block_size
    places = {block: index for index, block in enumerate(source.blocks.get(module, ()))}
    result = torch.zeros(len(target.blocks[module]) * height, width)
    for index, block in enumerate(target.blocks[module]):
        if values is not None and block in places:
            start = places[block] * height
            result[index * height : (index + 1) * height] = values[start : start + height]
    return result


def without(ever_trained: BlockSelection, active: BlockSelection) -> BlockSelection | None:
    """Select the blocks of ``ever_trained`` that aren't in ``active``; None if all are."""
    left = {
        module: [block for block in blocks if block not in set(active.blocks.get(module, ()))]
        for module, blocks in ever_trained.blocks.items()
    }
    left = {module: blocks for module, blocks in left.items() if blocks}
    return ever_trained.model_copy(update={"blocks": left}) if left else None
